from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

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
    }


@pytest.fixture
def config(tmp_path: Path, settings: dict[str, Any]) -> Path:
    """The config as a file."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
