from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cluster.devices import Machine
from launcher.cli import main


def doctor(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["doctor", *map(str, arguments)])


def findings(result: Result) -> dict[str, tuple[str, str]]:
    listed = json.loads(result.stdout)["findings"]
    return {one["check"]: (one["status"], one["text"]) for one in listed}


def test_this_machine(config: Path) -> None:
    before = sorted(config.parent.rglob("*"))
    result = doctor("--json", config)
    assert result.exit_code == 0, result.stdout
    found = findings(result)
    assert found["MindSpore"][0] == found["registry"][0] == found["nodes"][0] == "ok"
    assert found["devices"][1].endswith(("core", "cores")) or "NPU" in found["devices"][1]
    assert sorted(config.parent.rglob("*")) == before


def test_without_a_config_folders_are_not_looked_at() -> None:
    result = doctor()
    assert result.exit_code == 0
    assert "not checked  disk and registry" in result.stdout


def test_a_problem_is_exit_code_1(config: Path, tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "notes.txt").touch()
    result = doctor("--json", config)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["fit"] is False
    assert "is not a registry" in findings(result)["registry"][1]


def test_contradictory_nodes_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    result = doctor("--json")
    assert result.exit_code == 1
    assert findings(result)["nodes"][0] == "problem"


def test_npus_whose_tools_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine("Ascend", (0, 1), 2)
    monkeypatch.setattr("launcher.doctor.this_machine", lambda **_: machine)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    result = doctor("--json")
    assert result.exit_code == 1
    found = findings(result)
    assert found["CANN"] == ("problem", "ASCEND_HOME_PATH is not set; source CANN's set_env.sh")
    assert found["health"] == ("not checked", "npu-smi says nothing of devices 0, 1")
    assert found["links"][0] == found["device TLS"][0] == "not checked"


def test_bad_config(tmp_path: Path) -> None:
    result = doctor(tmp_path / "none.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "there is no such config file" in result.stderr


def test_mindspore_is_not_imported(project_root: Path) -> None:
    script = """
import sys, launcher.doctor
launcher.doctor.examine(None, {})
print("mindspore" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=project_root, capture_output=True)
    assert done.stdout == b"False\n", done.stderr
