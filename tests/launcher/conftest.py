from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

_MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def write_images(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """A config, as plain values, that trains on a tiny base and four images."""
    base = tmp_path / "base"
    for file in (
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ):
        (base / file).parent.mkdir(parents=True)
        save_file({f"{_MODULE}.weight": np.zeros((8, 8), np.float32)}, base / file)
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
