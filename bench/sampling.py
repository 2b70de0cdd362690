"""Drawing beside diffusers: 20 steps of DPM-Solver++(2M) with guidance.

    python -m bench.sampling [--batches 1 4 16]

The small base, 64 × 64 pixels; captions are encoded before, decoding is included. What compiles
does so in a pass before.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import turns

BASE = turns.ROOT / "assets/emoji-base"
STEPS, SCALE, PICTURES = 20, 4.0, 8
"""The last: of a round, at least; a pass is not cut."""
PROMPT = "ink emoji of penguin"


def ours() -> tuple[Any, Callable[[str], Any]]:
    """The pipeline of lora-sample."""
    import mindspore as ms

    from diffusion.config import recognise
    from diffusion.models import compile_graphs
    from diffusion.pipeline import Pipeline, Settings
    from weights.base import open_base

    compile_graphs()
    ms.set_device("CPU")
    base = open_base(BASE)
    _, config = recognise(base)
    pipeline = Pipeline.load(config, base)
    texts = pipeline.encode_pair(PROMPT, "")

    def draw(batch: int) -> None:
        settings = Settings(steps=STEPS, scale=SCALE, batch=batch)
        both = [np.stack([text] * batch) for text in texts]
        pipeline.pixels(pipeline.latents(*both, range(batch), settings))

    return {}, timed(draw)


def theirs() -> tuple[Any, Callable[[str], Any]]:
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
        prediction_type="v_prediction",
    )
    vae = AutoencoderKL.from_pretrained(BASE / "vae").float()
    unet = UNet2DConditionModel.from_pretrained(BASE / "unet").float()
    encoder = CLIPTextModel.from_pretrained(BASE / "text_encoder").float()
    ids = torch.from_numpy(Tokenizer(clip_vocabulary(), 49407)(["", PROMPT])).long()
    with torch.no_grad():
        texts = encoder(ids)[0]

    @torch.no_grad()
    def draw(batch: int) -> None:
        text = texts.repeat_interleave(batch, 0)
        scheduler.set_timesteps(STEPS)
        latents = torch.randn(batch, 4, 16, 16) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
            plain, wanted = unet(both, timestep, text, return_dict=False)[0].chunk(2)
            guided = plain + SCALE * (wanted - plain)
            latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
        pictures = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        (pictures / 2 + 0.5).clamp(0, 1).numpy()

    return {}, timed(draw)


def timed(draw: Callable[[int], None]) -> Callable[[str], Any]:
    """Seconds a picture, of some passes of so many."""
    warm: set[int] = set()

    def answer(asked: str) -> float:
        batch = int(asked)
        if batch not in warm:
            draw(batch)
            warm.add(batch)
        passes = max(1, PICTURES // batch)
        begun = time.monotonic()
        for _ in range(passes):
            draw(batch)
        return (time.monotonic() - begun) / passes / batch

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=["ours", "diffusers"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.side:
        turns.serve(ours if given.side == "ours" else theirs)
        sys.exit()
    sides = {name: turns.Side("sampling", "--side", name) for name in ("ours", "diffusers")}
    figures = []
    for batch in given.batches:
        found = turns.in_turns(sides, given.rounds, str(batch))
        name = f"a picture of 64², {STEPS} steps, {batch} in a pass"
        figures.append(turns.figure(name, found["ours"], found["diffusers"], "s", "diffusers", 0.8))
    for side in sides.values():
        side.end()
    turns.show(figures)
    turns.keep(figures)


if __name__ == "__main__":
    main()
