"""Drawing beside diffusers: 20 steps of DPM-Solver++(2M) with guidance.

    python -m bench.sampling [--size small quarter full] [--batches 1 4 16]

The small base at 64 × 64 pixels, or Stable Diffusion 1.5 with random weights at 256 × 256, as it is
or with a quarter of its UNet's channels. Captions are encoded before, decoding is included. What
compiles does so in a pass before.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench import turns
from bench.whole_job import BASE, make_base

PIXELS = {"small": 64, "quarter": 256, "full": 256}
STEPS, SCALE = 20, 4.0
PICTURES = {64: 8, 256: 1}
"""Of a round by their width, at least; a pass is not cut."""
PROMPT = "ink emoji of penguin"


def ours(folder: Path, pixels: int) -> tuple[Any, Callable[[str], Any]]:
    """The pipeline of lora-sample."""
    import mindspore as ms

    from diffusion.config import load_model_config
    from diffusion.models import compile_graphs
    from diffusion.pipeline import Pipeline, Settings
    from weights.base import open_base

    compile_graphs()
    ms.set_device("CPU")
    model = "emoji" if folder == BASE else str(folder / "model.yaml")
    pipeline = Pipeline.load(load_model_config(model), open_base(folder))
    texts = pipeline.encode_pair(PROMPT, "")

    def draw(batch: int) -> None:
        settings = Settings(steps=STEPS, scale=SCALE, batch=batch, size=(pixels, pixels))
        both = [np.stack([text] * batch) for text in texts]
        pipeline.pixels(pipeline.latents(*both, range(batch), settings))

    return {}, timed(draw, PICTURES[pixels])


def theirs(folder: Path, pixels: int) -> tuple[Any, Callable[[str], Any]]:
    """diffusers' networks and scheduler, in the loop of its pipeline."""
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    from diffusion.tokenizer import Tokenizer, clip_vocabulary

    torch.set_num_threads(2)
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction" if folder == BASE else "epsilon",
    )
    vae = AutoencoderKL.from_pretrained(folder / "vae").float()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").float()
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").float()
    width = pixels // 2 ** (len(vae.config.block_out_channels) - 1)
    ids = torch.from_numpy(Tokenizer(clip_vocabulary(), 49407)(["", PROMPT])).long()
    with torch.no_grad():
        texts = encoder(ids)[0]

    @torch.no_grad()
    def draw(batch: int) -> None:
        text = texts.repeat_interleave(batch, 0)
        scheduler.set_timesteps(STEPS)
        latents = torch.randn(batch, 4, width, width) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
            plain, wanted = unet(both, timestep, text, return_dict=False)[0].chunk(2)
            guided = plain + SCALE * (wanted - plain)
            latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
        pictures = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        (pictures / 2 + 0.5).clamp(0, 1).numpy()

    return {}, timed(draw, PICTURES[pixels])


def timed(draw: Callable[[int], None], pictures: int) -> Callable[[str], Any]:
    """Seconds a picture, of some passes of so many."""
    warm: set[int] = set()

    def answer(asked: str) -> float:
        batch = int(asked)
        if batch not in warm:
            draw(batch)
            warm.add(batch)
        passes = max(1, pictures // batch)
        begun = time.monotonic()
        for _ in range(passes):
            draw(batch)
        return (time.monotonic() - begun) / passes / batch

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=["ours", "diffusers"])
    parser.add_argument("--base", type=Path, help="Of the side.")
    parser.add_argument("--size", nargs="+", choices=[*PIXELS], default=["small"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.side:
        side = ours if given.side == "ours" else theirs
        turns.serve(lambda: side(given.base, PIXELS[given.size[0]]))
        sys.exit()
    for size in given.size:
        figures = compare(size, given.batches, given.rounds)
        turns.show(figures)
        turns.keep(figures)


def compare(size: str, batches: list[int], rounds: int) -> list[turns.Figure]:
    """Seconds a picture, for each number of pictures in a pass."""
    figures = []
    with tempfile.TemporaryDirectory() as name:
        base = BASE
        if size != "small":
            base = Path(name)
            make_base(base, size)
        words = "--size", size, "--base", str(base), "--side"
        sides = {name: turns.Side("sampling", *words, name) for name in ("ours", "diffusers")}
        for batch in batches:
            found = turns.in_turns(sides, rounds, str(batch))
            what = "a picture" if size == "small" else f"a picture, {size}"
            what += f" of {PIXELS[size]}², {STEPS} steps, {batch} in a pass"
            goal = 0.8 if size != "full" else None
            figures.append(
                turns.figure(what, found["ours"], found["diffusers"], "s", "diffusers", goal)
            )
        for side in sides.values():
            side.end()
    return figures


if __name__ == "__main__":
    main()
