"""Bad input ends in one sentence and exit code 2, and nothing is written; nor by a dry run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

import launcher.run
from launcher.cli import main
from launcher.errors import Failure, Interrupted, RunFailed

TOO_MANY = 65


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(folder: Path, *arguments: object) -> str:
    """The sentence with which these arguments are refused."""
    before = sorted(folder.rglob("*"))
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert sorted(folder.rglob("*")) == before
    return result.stderr.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "lora.rnk=8"], "unknown key `lora.rnk`; did you mean `rank`?"),
        (["--set", "lora.rank"], "expected key=value"),
        (["--set", "lora.rank=65"], "lora.rank is 65, but down_blocks.1"),
        (["--set", "global_batch=5", "--devices", "2"], "does not divide among 2 devices"),
        (["--set", "base.model=sd9"], "model 'sd9' is not known"),
        (["--set", "base.weights=nowhere"], "there is no such base model"),
        (["--set", "data.train=nowhere"], "there is no such data folder"),
        (["--set", "registry=s3://bucket/loras"], "s3://bucket/loras"),
        (["--set", "train=all"], "registry: expected null with `train: all`"),
        (["--devices", str(TOO_MANY)], "use at most 64"),
        (["--devices", "many"], "expected a number (8)"),
        (["--device-target", "TPU"], "'TPU' is not one of 'auto', 'CPU', 'Ascend'"),
        (["--master-port", "0"], "0 is not in the range 1<=x<=65535"),
        (["--devicse", "2"], "No such option '--devicse'"),
        (["other.yaml"], "unexpected extra argument"),
    ],
)
def test_bad_options(config: Path, arguments: list[str], message: str) -> None:
    if "--device-target" not in arguments:
        arguments = ["--device-target", "CPU", *arguments]
    assert message in refused(config.parent, *arguments, config)


def test_missing_config(tmp_path: Path) -> None:
    assert "there is no such config file" in refused(tmp_path, tmp_path / "none.yaml")
    assert "no config is named" in refused(tmp_path)
    assert "found no attempt in it" in refused(tmp_path, "--resume", tmp_path)


def empty_folder(folder: Path) -> str:
    for path in (folder / "train").iterdir():
        path.unlink()
    return f"{folder}/train: expected images (.png, .jpg, .jpeg, .webp, .bmp), found none"


def undecodable_image(folder: Path) -> str:
    (folder / "validation/1.png").write_bytes(b"\x89PNG, but not really")
    return f"{folder}/validation/1.png: expected an image, found a file that does not decode"


def missing_caption(folder: Path) -> str:
    (folder / "train/2.txt").unlink()
    return f"{folder}/train/2.png: expected a caption in 2.txt, found none"


def truncated_base(folder: Path) -> str:
    path = folder / "base/vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path}: expected a complete safetensors file, found a damaged or truncated one"


def altered_base(folder: Path) -> str:
    name = "unet/diffusion_pytorch_model.safetensors"
    (folder / "base/SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    return f"{folder}/base/{name}: expected sha256 000000000000…"


def missing_base_file(folder: Path) -> str:
    (folder / "base/text_encoder/model.safetensors").unlink()
    return f"{folder}/base: expected text_encoder/model.safetensors, found no such file"


def file_as_registry(folder: Path) -> str:
    (folder / "registry").write_text("")
    return f"registry: {folder}/registry: expected a folder, found that {folder}/registry is a file"


def other_folder_as_registry(folder: Path) -> str:
    (folder / "registry").mkdir()
    (folder / "registry/thesis.txt").write_text("")
    return f"{folder}/registry is not empty and has no registry.json"


def file_as_output(folder: Path) -> str:
    (folder / "runs").write_text("")
    return f"output: {folder}/runs: expected a folder, found that {folder}/runs is a file"


@pytest.mark.parametrize(
    "spoil",
    [
        empty_folder,
        undecodable_image,
        missing_caption,
        truncated_base,
        altered_base,
        missing_base_file,
        file_as_registry,
        other_folder_as_registry,
        file_as_output,
    ],
)
def test_bad_files(config: Path, spoil: Callable[[Path], str]) -> None:
    expected = spoil(config.parent)
    assert expected in refused(config.parent, "--device-target", "CPU", config)


def test_port_in_use(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        message = refused(config.parent, "--master-port", port, "--device-target", "CPU", config)
    assert message.startswith(f"--master-port {port}: the port is in use on 127.0.0.1")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = invoke("--debug", tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (RunFailed(Failure("a.png does not decode", 2)), 2, "a.png does not decode"),
        (RunFailed(Failure("rank 1 failed", 1, "Traceback ...")), 1, "rank 1 failed"),
        (Interrupted(15), 143, "interrupted by SIGTERM; nothing was published"),
        (Interrupted(2), 130, "interrupted by SIGINT; nothing was published"),
    ],
)
def test_exit_codes_of_a_run(
    monkeypatch: pytest.MonkeyPatch, error: Exception, exit_code: int, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(launcher.run, "launch", fail)
    result = invoke("config.yaml")
    assert result.exit_code == exit_code
    assert result.stderr.splitlines()[-1] == f"error: {message}"


def test_dry_run_prints_and_writes_nothing(config: Path) -> None:
    before = sorted(config.parent.rglob("*"))
    result = invoke("--dry-run", "--device-target", "CPU", "--master-port", "28118", config)
    assert result.exit_code == 0
    assert sorted(config.parent.rglob("*")) == before
    assert "--worker_num=1 --local_worker_num=1" in result.stdout
    assert "--master_port=28118" in result.stdout
    assert "MS_CPU_COMM_OP_TIMEOUT" in result.stdout
    for words in (
        "emoji, ",
        "LoRA of rank 2 on the UNet's attention: 15,360 parameters",
        "nothing, there is one device",
        "4, 10 epochs: 40 samples",
        "2 held-out images",
        "4 images a step = 1 × 4 at once × 1 accumulated",
        "0.0001, cosine",
        "tiny in ",
    ):
        assert words in result.stderr


def test_dry_run_as_json(config: Path, settings: dict[str, Any]) -> None:
    config.write_text(yaml.safe_dump({**settings, "registry": None}))
    result = invoke("--dry-run", "--json", "--device-target", "CPU", config)
    values = json.loads(result.stdout)
    assert values["plan"]["steps"] == 10
    assert values["device_ids"] == [0]
    assert values["environment"]["PYTHONUNBUFFERED"] == "1"
    assert values["rank_table"] is None
    assert "not published" in result.stderr


def test_help_and_dry_run_do_without_mindspore(config: Path) -> None:
    script = (
        "import sys; from click.testing import CliRunner; from launcher.cli import main\n"
        "result = CliRunner().invoke(main, sys.argv[1:])\n"
        "print(result.exit_code, result.output)\n"
        "print('loaded:', *sys.modules)"
    )

    def loaded(*arguments: object) -> set[str]:
        root = Path(launcher.__file__).parents[1]
        output = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        ).stdout
        assert output.startswith("0 ")
        return set(output.partition("loaded:")[2].split())

    slow_to_import = {"mindspore", "pydantic", "rich", "boto3", "numpy", "PIL"}
    assert not loaded("--help") & slow_to_import
    assert not loaded("--dry-run", "--device-target", "CPU", config) & {"mindspore", "boto3"}


def test_help_names_every_option() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for option in ("--devices", "--set", "--device-target", "--master-port", "--resume", "--json"):
        assert option in result.stdout
    assert "[OPTIONS] [CONFIG]" in result.stdout
