"""Pictures drawn during training, from the same prompts and seeds each time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion.pipeline import Pipeline, Settings
from trainer.config import SamplesConfig
from trainer.distributed import Group
from weights.files import atomic_path

BATCH = 4
"""Pictures in one pass."""


def draw_samples(
    pipeline: Pipeline, text: np.ndarray, config: SamplesConfig, group: Group, path: Path
) -> None:
    """Draw one picture for each prompt and write them side by side as one PNG.

    `text` (prompts + 1, 77, width) holds the prompts' hidden states, those of the empty one last.
    The processes share the denoising; process 0 decodes and writes.
    """
    count = len(config.prompts)
    mine = list(group.share(count))
    seeds = [config.seed + number for number in mine]
    settings = Settings(steps=config.steps, scale=config.scale, batch=BATCH)
    latents = np.zeros((count, *pipeline.latent_shape(settings)), np.float32)
    if mine:
        negative = text[[count] * len(mine)]
        latents[mine] = pipeline.latents(text[mine], negative, seeds, settings)
    latents = group.sum(latents)
    if group.rank_id == 0:
        info = PngInfo()
        for number, prompt in enumerate(config.prompts):
            info.add_itxt(f"prompt {config.seed + number}", prompt)
        with atomic_path(path) as part:
            sheet = _side_by_side(pipeline.decode(latents))
            sheet.save(part, format="PNG", pnginfo=info)


def _side_by_side(pictures: Sequence[np.ndarray]) -> Image.Image:
    """Pictures (height, width, 3) in rows of four."""
    rows = [list(pictures[start : start + 4]) for start in range(0, len(pictures), 4)]
    blank = np.full_like(pictures[0], 255)
    width = len(rows[0])
    full = [row + [blank] * (width - len(row)) for row in rows]
    return Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in full]))
