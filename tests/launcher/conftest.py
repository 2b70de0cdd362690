from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from PIL import Image

import launcher
from tests.launcher.launching import LAUNCH, Launch, of_run

ROOT = Path(__file__).parents[2]


def write_images(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """A config, as plain values, that trains on a copy of the small base and four images."""
    base = tmp_path / "base"
    shutil.copytree(ROOT / "assets" / "emoji-base", base)
    write_images(tmp_path / "train", 4)
    write_images(tmp_path / "validation", 2)
    return {
        "name": "tiny",
        "base": {"model": "emoji", "weights": str(base)},
        "data": {"train": str(tmp_path / "train"), "validation": str(tmp_path / "validation")},
        "lora": {"rank": 2},
        "epochs": 10,
        "global_batch": 4,
        "output": str(tmp_path / "runs"),
        "registry": str(tmp_path / "registry"),
        "evaluation": None,
    }


@pytest.fixture
def config(tmp_path: Path, settings: dict[str, Any]) -> Path:
    """The config as a file."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Launch]:
    """Start `lora-launch` with the stand-in worker; nothing that it started outlives the test."""
    root, here = Path(launcher.__file__).parents[1], Path(__file__).parent
    path = os.pathsep.join([str(root), str(here), os.environ.get("PYTHONPATH", "")])
    started: list[psutil.Popen] = []

    def begin(
        behaviour: str, *arguments: object, within: Sequence[str] = (), failing: int = 1
    ) -> psutil.Popen:
        process = psutil.Popen(
            [*within, sys.executable, "-c", LAUNCH, *map(str, arguments)],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "STAND_IN": behaviour,
                "STAND_IN_RANK": str(failing),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in [*started, *of_run(tmp_path)]:
        if process.is_running():
            process.kill()
