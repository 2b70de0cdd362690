"""`lora-launch submit`, with stand-ins for kubectl and sbatch on PATH."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from launcher.cli import main
from trainer.config_file import load_config

KUBERNETES = ["--to", "kubernetes", "--image", "example/lora:1"]
ON_A_VOLUME = ["--volume", "loras:/data", "--set", "output=/data/runs"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands run in, and whose bin/ alone is on PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    return tmp_path


def fake(here: Path, name: str, body: str) -> None:
    program = here / "bin" / name
    program.write_text(f"#!/bin/bash\nPATH=/usr/bin:/bin\n{body}\n")
    program.chmod(0o755)


def submit(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["submit", *arguments, str(config)])


def refused(config: Path, *arguments: str) -> str:
    result = submit(config, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert line.startswith("error: ")
    return line


def test_slurm_files(here: Path, config: Path) -> None:
    result = submit(config, "--to", "slurm", "--nodes", "2", "--set", "seed=7")
    assert result.exit_code == 0
    copy, script = map(Path, result.stdout.split())
    assert copy.parent == script.parent == Path("submitted")
    assert load_config(copy).seed == 7
    text = script.read_text()
    assert "#SBATCH --nodes=2\n" in text
    assert f"config={here}/{copy}\n" in text
    assert subprocess.run(["/bin/bash", "-n", str(script)]).returncode == 0
    assert sorted(path.name for path in (here / "submitted").iterdir()) == [copy.name, script.name]


def test_sbatch_is_given_the_script(here: Path, config: Path) -> None:
    fake(here, "sbatch", 'echo "$@" > called.txt; echo 42')
    result = submit(config, "--to", "slurm", "--apply", "--out", "jobs")
    assert (result.exit_code, result.stdout) == (0, "42\n")
    (script,) = (here / "jobs").glob("*.sbatch")
    assert (here / "called.txt").read_text() == f"--parsable jobs/{script.name}\n"


@pytest.mark.parametrize(("kind", "name"), [("ascendjob", "AscendJob"), ("volcano", "Job")])
def test_kubectl_is_given_the_manifest(here: Path, config: Path, kind: str, name: str) -> None:
    fake(here, "kubectl", 'echo "$@" > called.txt; cat > given.yaml; echo created')
    result = submit(config, *KUBERNETES, *ON_A_VOLUME, "--kind", kind, "--nodes", "2", "--apply")
    assert (result.exit_code, result.stdout) == (0, "created\n")
    assert (here / "called.txt").read_text() == "apply -f -\n"
    (written,) = (here / "submitted").iterdir()
    assert (here / "given.yaml").read_text() == written.read_text()
    config_map, job = yaml.safe_load_all(written.read_text())
    assert job["kind"] == name
    inside = here / "inside.yaml"
    inside.write_text(config_map["data"]["config.yaml"])
    assert load_config(inside).output == "/data/runs"


def test_json(here: Path, config: Path) -> None:
    said = json.loads(submit(config, *KUBERNETES, *ON_A_VOLUME, "--json").stdout)
    assert said["answer"] is None
    assert said["command"] == ["kubectl", "apply", "-f", "-"]
    assert said["files"] == [f"submitted/{said['job']}.yaml"]


def test_inputs_that_are_on_no_volume_are_named(here: Path, config: Path) -> None:
    noted = submit(config, *KUBERNETES, *ON_A_VOLUME, "--set", "registry=/data/loras").stderr
    assert "note: base.weights: " in noted
    assert "note: data.train.0.folder: " in noted
    assert "note: registry" not in noted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "nowhere"], "'nowhere' is not one of 'kubernetes', 'slurm'"),
        ([], "--to: expected kubernetes or slurm, found nothing"),
        (["--to", "kubernetes"], "--image: expected the image that has lora-launch in it"),
        ([*KUBERNETES], "output: expected a folder on a volume"),
        ([*KUBERNETES, *ON_A_VOLUME, "--namespace", "A"], "--namespace 'A': expected lower-case"),
        ([*KUBERNETES, *ON_A_VOLUME, "--secret", "a b"], "--secret 'a b': expected"),
        ([*KUBERNETES, *ON_A_VOLUME, "--devices-per-node", "16"], "a server of A2 has 8 devices"),
        ([*KUBERNETES, *ON_A_VOLUME, "--set", "name=8bit"], "begins with a letter, found '8bit'"),
        (["--to", "slurm", "--partition", "-x"], "--partition '-x': expected names"),
        (["--to", "slurm", "--nodes", "0"], "0 is not in the range"),
        (["--to", "slurm", "--set", "lora.rnk=8"], "unknown key `lora.rnk`"),
        (["--to", "slurm", "--out", "a b"], "--out: expected a folder without spaces"),
        (["--to", "slurm", "--set", "registry=s3://me:secret@host/b"], "found an address with one"),
    ],
)
def test_bad_input(here: Path, config: Path, arguments: list[str], message: str) -> None:
    assert message in refused(config, *arguments)
    assert not (here / "submitted").exists()


def test_passwords_are_not_repeated(here: Path, config: Path) -> None:
    said = refused(config, "--to", "slurm", "--set", "registry=s3://me:secret@host/b")
    assert "secret" not in said


def test_no_sbatch(here: Path, config: Path) -> None:
    assert "sbatch: expected it on PATH" in refused(config, "--to", "slurm", "--apply")


def test_sbatch_refuses(here: Path, config: Path) -> None:
    fake(here, "sbatch", 'echo "sbatch: error: invalid partition: npu" >&2; exit 1')
    said = refused(config, "--to", "slurm", "--apply")
    assert "found 1 and: sbatch: error: invalid partition: npu; the files are written" in said


def test_kubectl_hangs(here: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.submit._SECONDS", 0.3)
    fake(here, "kubectl", "exec sleep 60")
    said = refused(config, *KUBERNETES, *ON_A_VOLUME, "--apply")
    assert "kubectl apply -f -: expected an answer within 0.3 s" in said


def test_folder_that_cannot_be_written(here: Path, config: Path) -> None:
    (here / "submitted").write_text("a file")
    assert "cannot write: File exists; name another folder" in refused(config, "--to", "slurm")


def test_help_lists_it_and_needs_no_schema(project_root: Path) -> None:
    script = "import sys, launcher.cli; print(sorted({'pydantic', 'yaml'} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=project_root,
        env={**os.environ},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[]\n"
    assert "submit " in CliRunner().invoke(main, ["--help"]).stdout
