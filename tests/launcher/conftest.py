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
    # What tells the model apart, and in each file one module that a LoRA can adapt.
    for file, name, shape in (
        ("unet/diffusion_pytorch_model", "conv_in", (64, 4, 3, 3)),
        ("vae/diffusion_pytorch_model", "encoder.conv_in", (16, 3, 3, 3)),
        ("text_encoder/model", "text_model.embeddings.token_embedding", (49408, 64)),
    ):
        path = base / f"{file}.safetensors"
        path.parent.mkdir(parents=True)
        shapes = {name: shape, _MODULE: (8, 8)}
        save_file({f"{n}.weight": np.zeros(s, np.float16) for n, s in shapes.items()}, path)
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
