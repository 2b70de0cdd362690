"""The commands about the life of versions, as a user types them, on a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from registry.api import Registry, open_registry
from registry.cli import main

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(folder: Path) -> Invoke:
    def run(*arguments: object, code: int = 0) -> Result:
        runner = CliRunner(env={"LORA_REGISTRY": str(folder)})
        result = runner.invoke(main, [str(word) for word in arguments])
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def three(loras: Registry, make_lora: Any) -> Registry:
    for number, kid in enumerate((4.0, 3.0, 3.5), start=1):
        loras.push(
            "ink",
            make_lora(seed=number),
            metrics={"kid": kid},
            metadata={"config": {"lora": {"rank": 4 * number}}},
        )
    return loras


def test_aliases(invoke: Invoke, three: Registry, tmp_path: Path) -> None:
    assert "no aliases yet" in invoke("alias", "list", "ink").stderr
    assert invoke("alias", "set", "ink@1", "prod").stdout == "ink@prod means ink@1\n"
    assert invoke("promote", "ink@2", "prod", "--gate", "kid < prod.kid").stdout.startswith(
        "ink@prod means ink@2"
    )
    refused = invoke("promote", "ink@3", "prod", "--gate", "kid < prod.kid", code=2)
    assert refused.stderr.startswith("error: ink@3 is not promoted to prod: kid < prod.kid (3.5 <")
    assert invoke("alias", "list", "ink", "--json").stdout == '{\n  "prod": 2\n}\n'
    assert "ink@2" in invoke("alias", "list", "ink").stdout
    pulled = Path(invoke("pull", "ink@prod", "--out", tmp_path / "out").stdout.strip())
    assert three.resolve("ink@2").files[0].sha256 in invoke("show", "ink@2").stdout
    assert pulled.exists()
    assert invoke("alias", "rollback", "ink", "prod").stdout == "ink@prod means ink@1\n"
    assert invoke("alias", "rm", "ink", "prod").stdout == "ink@prod means nothing\n"
    shown = invoke("alias", "history", "ink", "prod").stdout.splitlines()
    assert [line.split()[2] for line in shown[1:]] == ["set", "promote", "rollback", "remove"]
    assert len(json.loads(invoke("log", "ink", "--json").stdout)) == 8


def test_comparison_and_history(invoke: Invoke, three: Registry) -> None:
    shown = invoke("compare", "ink@1", "ink@2").stdout
    assert "-25.0 %" in shown
    assert "config.lora.rank  4  8" in shown
    found = json.loads(invoke("compare", "ink@1", "ink@2", "--json").stdout)
    assert found["metrics"] == {"kid": [4.0, 3.0]}
    assert found["measuring_unsaid"] == ["kid"]
    warned = invoke("compare", "ink@1", "ink@2").stderr
    assert "nothing says how kid was measured, of neither" in warned
    lines = invoke("history", "ink", "kid").stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["ink@1", "4"],
        ["ink@2", "3"],
        ["ink@3", "3.5"],
    ]
    assert lines[1].count("█") > lines[3].count("█") > lines[2].count("█") > 0
    assert "they have kid" in invoke("history", "ink", "fid", code=2).stderr


def test_upkeep(
    invoke: Invoke, three: Registry, folder: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    assert invoke("verify").stdout == "3 versions are what was pushed\n"
    assert invoke("yank", "ink@3", "--reason", "too dark").stdout == "ink@3 is yanked\n"
    refused = invoke("pull", "ink@3", "--out", tmp_path / "out", code=2)
    assert "ink@3 is yanked: too dark" in refused.stderr
    invoke("pull", "ink@3", "--out", tmp_path / "out", "--force")
    assert invoke("unyank", "ink@3").stdout == "ink@3 is no longer yanked\n"
    assert invoke("rm", "ink@3").stdout == "ink@3 is removed\n"
    assert invoke("gc", "--apply").stdout.startswith("wait")
    refused = invoke("gc", "--apply", "--grace", "0.5", code=2)
    assert "--grace 0.5 can take a file from under a push" in refused.stderr
    assert invoke("gc", "--apply", "--grace", "0", "--force").stdout.startswith("remove")
    assert invoke("gc").stdout == ""
    other = tmp_path / "other"
    assert invoke("copy", "ink@2", other).stdout == f"ink@1 in {other}\n"
    copied = open_registry(str(other)).resolve("ink@1")
    assert copied.metrics == {"kid": 3.0}
    assert copied.metadata["copied_from"] == {
        "registry": str(folder),
        "registry_id": three.settings.id,
        "version": "ink@2",
    }
    assert invoke("copy", "ink@2", other).stdout == f"ink@1 in {other} already\n"
    assert "is the registry that ink@2 is in" in invoke("copy", "ink@2", folder, code=2).stderr
    invoke("yank", "ink@2", "--reason", "too dark")
    third = tmp_path / "third"
    assert "is yanked: too dark" in invoke("copy", "ink@2", third, code=2).stderr
    assert invoke("copy", "ink@2", third, "--force").stdout == f"ink@1 in {third}\n"
    damage(next(path for path in (folder / "blobs").rglob("*") if path.is_file()))
    assert "is damaged" in invoke("verify", code=1).stdout


def test_init_and_doctor(invoke: Invoke, folder: Path) -> None:
    assert "a hard link for each" in invoke("init").stdout
    assert (folder / "registry.json").exists()
    assert "a hard link for each" in invoke("doctor").stdout
    assert json.loads(invoke("list", "--json").stdout) == []
