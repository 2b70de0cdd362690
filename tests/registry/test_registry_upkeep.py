"""Verification and garbage collection."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from registry import upkeep
from registry.aliases import set_alias
from registry.api import Registry, RegistryError, blob_key, open_registry
from registry.cli import main
from registry.pages import edit
from registry.states import log, remove, unyank, yank
from registry.upkeep import collect, superfluous, verify
from tests.registry import servers

NONE = timedelta(0)


def test_a_damaged_and_a_missing_file_are_named(
    loras: Registry, make_lora: Any, folder: Path, damage: Callable[[Path], None]
) -> None:
    first, second = (loras.push("ink", make_lora(seed=seed)) for seed in (1, 2))
    loras.push("oil", make_lora(seed=3))
    assert verify(loras, None) == []
    damage(folder / blob_key(first.files[0]))
    (folder / blob_key(second.files[0])).unlink()
    found = verify(loras, None)
    assert [finding.reference for finding in found] == ["ink@1", "ink@2"]
    assert "is damaged: its manifest says" in found[0].problem
    assert "is missing from the registry" in found[1].problem
    assert [finding.reference for finding in verify(loras, "ink@2")] == ["ink@2"]


def test_logs_are_read_back_too(
    loras: Registry, make_lora: Any, folder: Path, damage: Callable[[Path], None]
) -> None:
    for seed in range(3):
        loras.push("ink", make_lora(seed=seed))
    set_alias(loras, "ink", "prod", 1)
    set_alias(loras, "ink", "prod", 2)
    edit(loras, loras.resolve("ink@2"), "# mine")
    remove(loras, "ink@3")
    assert verify(loras, "ink") == verify(loras, None) == []
    entries = ["aliases/prod/00000001.json", "cards/00000002/00000001.json"]
    for entry in entries:
        damage(folder / "models/ink" / entry)
    damage(folder / "models/ink/versions/00000001.json")
    found = [finding.reference for finding in verify(open_registry(str(folder)), None)]
    assert sorted(found) == ["ink@1", *(f"models/ink/{entry}" for entry in entries)]
    result = CliRunner().invoke(main, ["verify", "ink@1", "--registry", str(folder)])
    assert result.exit_code == 1
    assert "\r" not in result.stderr
    result = CliRunner().invoke(main, ["verify", "ink@2", "--registry", str(folder)])
    assert result.stdout == "1 version is what was pushed\n"


def test_two_phases_and_the_grace_period(loras: Registry, make_lora: Any, folder: Path) -> None:
    files = [make_lora(f"{seed}.safetensors", seed) for seed in (1, 2)]
    kept, gone = (loras.push("ink", file) for file in files)
    assert collect(loras) == []
    remove(loras, "ink@2")
    (found,) = collect(loras)
    assert (found.key, found.due) == (blob_key(gone.files[0]), False)
    assert not (folder / "garbage").exists()
    collect(loras, dry_run=False)
    assert [found.due for found in collect(loras)] == [False]
    assert (folder / found.key).exists()
    time.sleep(0.01)
    assert [found.due for found in collect(loras, grace=NONE)] == [True]
    assert collect(loras, dry_run=False, grace=NONE)[0].due
    assert not (folder / found.key).exists()
    assert list((folder / "garbage").iterdir()) == []
    loras.check(kept)
    assert loras.push("ink", files[1]).version == 3
    assert verify(loras, None) == []


def test_a_push_of_what_is_marked_takes_the_mark_away(
    loras: Registry, make_lora: Any, folder: Path
) -> None:
    file = make_lora()
    manifest = loras.push("ink", file)
    loras.push("ink", make_lora("other.safetensors", 2))
    remove(loras, "ink@1")
    collect(loras, dry_run=False)
    (mark,) = (folder / "garbage").iterdir()
    assert mark.name == manifest.files[0].sha256
    loras.push("ink", file)
    assert not mark.exists()
    assert collect(loras, grace=NONE) == []


def test_no_registry(loras: Registry) -> None:
    for act in (lambda: verify(loras, None), lambda: collect(loras)):
        with pytest.raises(RegistryError, match="there is no registry"):
            act()


def test_what_is_kept(loras: Registry, make_lora: Callable[..., Path], folder: Path) -> None:
    for number, score in enumerate((0.4, 0.2, 0.5, 0.3, 0.6)):
        loras.push("ink", make_lora(f"{number}.safetensors", number), metrics={"loss": score})
    loras.push("oil", make_lora("oil.safetensors", 9))
    set_alias(loras, "ink", "prod", 3)
    assert superfluous(loras, "*", None, None) == []
    assert superfluous(loras, "*", 2, None) == ["ink@1", "ink@2"]
    assert superfluous(loras, "*", 1, "lowest:loss") == ["ink@1", "ink@4"]
    assert superfluous(loras, "o*", 1, None) == []
    assert superfluous(loras, "*", None, "highest:loss") == ["ink@1", "ink@2", "ink@4"]
    yank(loras, "ink@2", "wrong set")
    yank(loras, "ink@5", "wrong set")
    assert superfluous(loras, "*", 1, "lowest:loss") == ["ink@1", "ink@2", "ink@5"]
    unyank(loras, "ink@2")
    unyank(loras, "ink@5")
    with pytest.raises(
        RegistryError, match="expected lowest:METRIC or highest:METRIC, found 'loss'"
    ):
        superfluous(loras, "*", None, "loss")
    run, where = CliRunner(), ["--registry", str(folder)]
    shown = run.invoke(main, ["gc", "--keep-last", "2", *where])
    assert shown.stdout == "remove  ink@1\nremove  ink@2\n"
    assert loras.versions("ink") == [1, 2, 3, 4, 5]
    assert run.invoke(main, ["gc", "--keep-last", "2", "--apply", *where]).exit_code == 0
    assert loras.versions("ink") == [3, 4, 5]
    assert log(loras, "ink")[-1].reason == "gc --keep-last 2"


def test_a_version_that_cannot_be_removed_is_said(
    loras: Registry, make_lora: Callable[..., Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        loras.push("ink", make_lora(f"{number}.safetensors", number))
    real = upkeep.superfluous

    def late(registry: Registry, *rules: Any) -> list[str]:
        found = real(registry, *rules)
        set_alias(registry, "ink", "prod", 1)  # somebody else, in the meantime
        return found

    monkeypatch.setattr(upkeep, "superfluous", late)
    words = ["gc", "--keep-last", "1", "--apply", "--registry", str(folder)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "ink@1 is not removed: ink@1 is what prod means" in result.stderr
    assert loras.versions("ink") == [1, 4]


def test_copy_to_another_server(
    monkeypatch: pytest.MonkeyPatch, lora: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with servers.rclone(tmp_path / "one") as one, servers.rclone(tmp_path / "two") as two:
        for key, value in {**one.environment, "LORA_REGISTRY_CACHE": str(tmp_path / "c")}.items():
            monkeypatch.setenv(key, value)
        here, there = f"s3://{one.bucket}/x", f"s3://{two.bucket}/x"
        manifest = open_registry(here).push("ink", lora)
        words = ["copy", "ink", there, "--to-endpoint-url", two.endpoint_url, "--registry", here]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.stderr
        copied = open_registry(there, endpoint_url=two.endpoint_url).resolve("ink@1")
        assert copied.files[0] == manifest.files[0]
        assert open_registry(here).versions("ink") == [1]
