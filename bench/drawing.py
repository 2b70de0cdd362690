"""Pictures a second of `lora-sample`'s engine: in passes of 1, 4 and 16, LoRA merged and apart.

    python -m bench.drawing [--base PATH] [--lora FILE] [--size 64] [--steps 20]

After one pass that compiles, each row is the median of three; 20 steps of DPM-Solver++(2M) with
guidance, decoding included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import mindspore as ms
import numpy as np

from diffusion.config import recognise
from diffusion.models import compile_graphs
from diffusion.pipeline import Pipeline, Settings
from weights import lora_files
from weights.base import open_base
from weights.lora import Adapter, Adapters, target_modules

ROUNDS = 3


def made_up(pipeline: Pipeline, rank: int = 16) -> Adapters:
    """A LoRA of this rank on all of the UNet's transformers."""
    draw = np.random.default_rng(0)
    shapes = {p.name: tuple(p.shape) for p in pipeline.unet.get_parameters()}
    found = {}
    for module in target_modules(shapes, "transformer"):
        out, into = shapes[f"{module}.weight"][:2]
        down, up = (draw.normal(0, 0.01, shape) for shape in ((rank, into), (out, rank)))
        found[module] = Adapter(down.astype(np.float32), up.astype(np.float32), float(rank))
    return {"unet": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="assets/emoji-base")
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--size", type=int)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batches", default="1,4,16")
    given = parser.parse_args()
    compile_graphs()
    ms.set_device("CPU")
    base = open_base(given.base)
    _, config = recognise(base)
    for way in ("merged", "apart"):
        pipeline = Pipeline.load(config, base)
        lora = lora_files.read(given.lora).adapters if given.lora else made_up(pipeline)
        if way == "merged":
            pipeline.merge_loras([(lora, 1.0)])
        else:
            pipeline.attach_loras([lora])
            pipeline.weigh_loras([1.0])
        positive, negative = pipeline.encode_pair("ink emoji of penguin", "")
        for batch in map(int, given.batches.split(",")):
            size = (given.size, given.size) if given.size else None
            settings = Settings(steps=given.steps, scale=4.0, batch=batch, size=size)

            def draw(
                pipeline: Pipeline = pipeline,
                batch: int = batch,
                settings: Settings = settings,
                texts: tuple[np.ndarray, np.ndarray] = (positive, negative),
            ) -> float:
                begun = time.monotonic()
                both = [np.stack([text] * batch) for text in texts]
                pipeline.decode(pipeline.latents(*both, range(batch), settings))
                return time.monotonic() - begun

            first = draw()
            seconds = statistics.median(draw() for _ in range(ROUNDS))
            print(
                f"{way:6}  {batch:3} in a pass: {batch / seconds:7.2f} pictures/s "
                f"(first pass, with compiling: {first:.1f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
