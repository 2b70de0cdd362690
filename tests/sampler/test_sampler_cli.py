"""lora-sample: what is refused before MindSpore is loaded, and in which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from sampler.cli import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--lora", "x@1"],
            "error: there is no file x@1, and no registry is named; give",
        ),
        (["--lora", "x@1", "--registry", "nowhere"], "nowhere"),
        (["--lora", "X/../y", "--registry", "nowhere"], "X/../y"),
        (["--registry", "nowhere"], "--lora"),
        (["--lora", "x@1", "--registry", "nowhere", "--steps", "0"], "--steps"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, [*arguments, "--prompt", "a fox", "--out", "sheet.png"])
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    out.write_text("mine")
    arguments = ["--lora", "x@1", "--registry", str(tmp_path), "--prompt", "a fox"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(out)])
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert out.read_text() == "mine"


def test_help_has_an_example_and_loads_no_mindspore() -> None:
    code = (
        "import sys; from sampler.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'mindspore' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "lora-sample --registry" in done.stdout
