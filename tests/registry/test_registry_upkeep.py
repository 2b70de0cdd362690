"""Verification and garbage collection."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from registry.aliases import set_alias
from registry.api import Registry, RegistryError, blob_key
from registry.cli import main
from registry.states import remove
from registry.upkeep import collect, superfluous, verify

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
    blob = folder / blob_key(manifest.files[0])
    os.utime(blob, (0, 0))
    loras.push("ink", file)
    assert blob.stat().st_mtime > 0
    assert list((folder / "garbage").iterdir()) == []
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
