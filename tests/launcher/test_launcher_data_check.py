"""`lora-launch data-check`: the report on a config's data, and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from launcher.cli import main


def check(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["data-check", *map(str, arguments)])


def add(folder: Path, name: str, size: tuple[int, int], caption: str = "a thing") -> None:
    number = len(list(folder.iterdir()))
    Image.new("RGB", size, (number, 90, 90)).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(caption)


def test_clean_data_is_exit_code_0(config: Path) -> None:
    for path in (config.parent / "train").glob("*.png"):
        with Image.open(path) as image:
            image.resize((64, 64)).save(path)
    result = check("--set", "data.validation=null", config)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        "images",
        "  4; 4 samples in an epoch",
        "sizes",
        "  smallest 64 × 64, median 64 × 64, largest 64 × 64",
        "shapes",
        "  64 × 64: 4 samples",
        "no problems",
    ]


def test_every_problem_is_printed_and_is_exit_code_2(config: Path) -> None:
    folder = config.parent
    (folder / "train/1.png").write_bytes(b"")
    (folder / "train/2.txt").unlink()
    (folder / "validation/0.txt").write_text("\n")
    result = check(config)
    assert result.exit_code == 2
    assert result.stderr == ""
    title, *problems = result.stdout.splitlines()[-4:]
    assert title == "3 problems, to be put right before training"
    assert [problem.partition(":")[0].strip() for problem in problems] == [
        f"{folder}/train/2.png",
        f"{folder}/train/1.png",
        f"{folder}/validation/0.png",
    ]


def test_the_report_as_json(config: Path) -> None:
    folder = config.parent / "train"
    for number in range(5):
        add(folder, f"upright {number}", (60, 100))
    add(folder, "long", (300, 200), "word " * 100)
    result = check("--json", "--set", "data.shapes=2", config)
    assert result.exit_code == 0
    values: dict[str, Any] = json.loads(result.stdout)
    assert values["problems"] == []
    held_out, *_, small = values["notes"]  # train and validation hold the same pictures
    assert held_out.startswith(f"{config.parent}/validation/0.png: held out, but trained on as")
    assert small.startswith("6 images are smaller than what is trained on")
    assert (values["examples"], values["epoch_samples"], values["validation_examples"]) == (
        10,
        10,
        2,
    )
    assert values["sizes"] == [[16, 16], [60, 100], [300, 200]]
    assert values["shapes"] == [
        {"width": 48, "height": 80, "samples": 5, "repeated": 3},
        {"width": 64, "height": 64, "samples": 5, "repeated": 3},
    ]
    assert values["long_captions"] == [[f"{folder}/long.png", 102]]


def test_shapes_and_long_captions_in_words(config: Path) -> None:
    folder = config.parent / "train"
    for number in range(5):
        add(folder, f"upright {number}", (60, 100), "word " * 75)
    add(folder, "long", (64, 64), "word " * 76)
    lines = check("--set", "data.shapes=2", config).stdout.splitlines()
    assert "  10; 10 samples in an epoch; 2 held out" in lines
    assert "  48 × 80: 5 samples, 3 more to fill the last batch" in lines
    place = lines.index("captions above 77 tokens, of which the rest is not seen")
    assert lines[place + 1] == f"  {folder}/long.png: 78 tokens"
    assert lines[place + 2] == "notes"


@pytest.mark.parametrize(
    ("base", "overrides", "size"),
    [
        ({"weights": "nowhere", "model": "emoji"}, [], "64 × 64"),
        ({"weights": "nowhere"}, ["--set", "data.resolution=128"], "128 × 128"),
        ({"weights": "nowhere", "model": "sd21-v"}, [], "768 × 768"),
    ],
)
def test_the_base_need_not_be_there(
    config: Path, settings: dict[str, Any], base: dict[str, str], overrides: list[str], size: str
) -> None:
    config.write_text(yaml.safe_dump({**settings, "base": base}))
    result = check(*overrides, config)
    assert result.exit_code == 0
    assert f"\n  {size}: 4 samples\n" in result.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["base.weights=nowhere", "base.model=null"], "give it with --set data.resolution=512"),
        (["data.resolution=100"], "expected a multiple of 16 pixels, found 100; use 96 or 112"),
        (["base.model=sd15"], "these are not the weights of base.model sd15"),
        (["data.shape=2"], "unknown key `data.shape`; did you mean `shapes`?"),
    ],
)
def test_what_cannot_be_checked_is_one_sentence(
    config: Path, overrides: list[str], message: str
) -> None:
    options = [word for override in overrides for word in ("--set", override)]
    result = check(*options, config)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert "Traceback" in check("--debug", *options, config).stderr


def test_nothing_is_written_and_mindspore_is_not_loaded(config: Path) -> None:
    before = sorted(config.parent.rglob("*"))
    script = (
        "import sys; from launcher.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('loaded:', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "data-check", str(config)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert "no problems" in done.stdout
    assert not set(done.stdout.partition("loaded:")[2].split()) & {"mindspore", "boto3"}
    assert sorted(config.parent.rglob("*")) == before


def test_help_shows_the_command_and_its_example_is_real() -> None:
    general = CliRunner().invoke(main, ["--help"]).stdout
    assert "  data-check  Look at every image and caption of CONFIG" in general
    result = check("--help")
    assert "lora-launch data-check configs/runs/emoji-ink.yaml" in result.stdout
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "launcher.cli", "data-check", "configs/runs/emoji-ink.yaml"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "200; 200 samples in an epoch; 40 held out" in done.stdout
