"""lora-sample: what is refused before MindSpore is loaded, and in which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from sampler.cli import main

BASE = Path(__file__).parents[2] / "assets" / "emoji-base"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lora", "x@1"], "error: there is no file x@1, and no registry is named; give"),
        (["--lora", "x@1", "--registry", "nowhere"], "nowhere"),
        (["--lora", "X/../y", "--registry", "nowhere"], "X/../y"),
        (["--lora", "x@1:strong"], "found 'strong' as the weight"),
        (["--registry", "nowhere"], "name a LoRA with --lora, or a --base"),
        (["--base", "nowhere", "--compare"], "--compare needs a --lora"),
        (["--lora", "x@1", "--steps", "0"], "--steps"),
        (["--lora", "x@1", "--size", "64x"], "--size 64x: expected pixels"),
        (["--lora", "x@1", "--grid", "wieght=1"], "--grid wieght=1: expected SETTING="),
        (["--lora", "x@1", "--grid", "steps=1", "--grid", "steps=2"], "use two settings"),
        (["--lora", "x@1", "--grid", "weight=0,1", "--compare"], "use --grid weight=0,1"),
        (["--again", "a.png"], "--again takes everything from the picture; leave out --prompt"),
        (["--lora", "x@1", "--prompts", "nowhere.txt"], "nowhere.txt: cannot be read"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, [*arguments, "--prompt", "a fox", "--out", "out"])
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base", str(BASE), "--prompt", "a", "--size", "62"], "use 64 × 64"),
        (["--base", str(BASE), "--prompt", "a", "--prompt", "b --h 6"], "use 64 × 8"),
        (["--base", str(BASE)], "nothing says what to draw"),
        (["--base", str(BASE), "--prompt", "a", "--devices", "9999"], "--devices"),
        (["--base", str(BASE), "--prompt", "a", "--seed", str(2**63 - 1), "--prompt", "b"], "seed"),
        (
            [
                "--base",
                str(BASE),
                "--prompt",
                "a",
                "--solver",
                "euler-karras",
                "--spacing",
                "trailing",
            ],
            "spacing",
        ),
        (["--base", str(BASE), "--prompt", "a", "--solver", "euler", "--eta", "0.5"], "eta"),
        (["--again", "nowhere.png"], "there is no picture nowhere.png"),
        (
            ["--base", str(BASE), "--prompt", "a", "--solver", "ddim", "--steps", "600"],
            "use 500 steps or fewer",
        ),
        (
            ["--base", str(BASE), "--prompt", "a", "--grid", "weight=0,1"],
            "needs a --lora whose weight",
        ),
    ],
)
def test_what_the_base_cannot_draw(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, [*arguments, "--out", "out"])
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_an_existing_sheet_is_kept(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    sheet.write_text("mine")
    arguments = ["--base", str(BASE), "--prompt", "a fox", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*arguments, "--sheet", str(sheet)])
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert sheet.read_text() == "mine"


def test_help_has_an_example_and_loads_no_mindspore() -> None:
    code = (
        "import sys; from sampler.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'mindspore' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "lora-sample --registry" in done.stdout
