"""The whole demo: does the LoRA learn, and does what it draws look like ink?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
CONFIG = "configs/runs/emoji-ink.yaml"
HELD_OUT = (
    "penguin",
    "hamster",
    "birthday cake",
    "bus",
    "taco",
    "violin",
    "crying face",
    "nerd face",
)


def colour(pictures: np.ndarray) -> tuple[float, float]:
    """Mean HSV saturation and mean chroma (0 to 1) of the inked pixels of uint8 (n, h, w, 3).

    Inked is what is not nearly white. Saturation is chroma over brightness, so that the faintest
    tint of a black line counts as fully coloured; chroma is what the eye sees.
    """
    pixels = pictures.reshape(-1, 3).astype(np.float64)
    inked = pixels[pixels.min(axis=1) < 230]
    highest = inked.max(axis=1)
    chroma = highest - inked.min(axis=1)
    return float((chroma / np.maximum(highest, 1)).mean()), float(chroma.mean() / 255)


@pytest.mark.slow
def test_the_demo_learns_ink(tmp_path: Path) -> None:
    from diffusion.config import load_model_config
    from diffusion.pipeline import Pipeline, Settings
    from weights.base import open_base
    from weights.lora_files import read

    settings = (f"output={tmp_path}", f"registry={tmp_path / 'registry'}")
    options = [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "launcher.cli",
            "--devices",
            "2",
            "--json",
            *options,
            "configs/runs/emoji-ink.yaml",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    losses = result["validation_loss"]
    assert losses["lora"] <= 0.8 * losses["base"]

    pipeline = Pipeline.load(load_model_config("emoji"), open_base(ROOT / "assets" / "emoji-base"))
    prompts = [f"ink emoji of {name}" for name in HELD_OUT]
    drawn = Settings(steps=20, scale=3.0)
    _, base = colour(pipeline.text_to_image(prompts, range(8), drawn))
    pipeline.merge_loras([(read(Path(result["artifact"])).adapters, 1.0)])
    _, lora = colour(pipeline.text_to_image(prompts, range(8), drawn))
    assert base > 0.3
    assert lora < 0.1
