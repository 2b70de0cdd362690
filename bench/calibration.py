"""Do the scores order right? Real pictures against real ones, blurred ones, and another style.

    python -m bench.calibration --styles DIR      # DIR: python -m assets.recipe.images DIR
    python -m bench.calibration --times           # seconds for 100 and 10,000 pictures

The last part of the first asks of captions: the denoising loss of a base and a LoRA with the right
captions of held-out drawings, and with shuffled ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor
from PIL import Image, ImageFilter

from diffusion.config import recognise
from diffusion.images import read_image, read_whole
from diffusion.models import compile_graphs, evaluating
from diffusion.pipeline import Pipeline
from diffusion.schedule import add_noise, velocity
from sampler import features, metrics
from sampler.evaluate import images_in
from weights import lora_files
from weights.base import open_base

INK = Path("assets/emoji-ink")


def blurred(picture: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def noisy(picture: np.ndarray, level: float) -> np.ndarray:
    draw = np.random.default_rng(0).normal(0, 255 * level, picture.shape)
    return np.clip(picture + draw, 0, 255).astype(np.uint8)


def of_pictures(styles: Path) -> None:
    lite = features.efficientnet()
    ink = [read_whole(path) for path in images_in(INK / "train")]
    half = np.random.default_rng(0).permutation(len(ink))
    first, second = ([ink[n] for n in part] for part in (half[::2], half[1::2]))
    flat = [read_whole(styles / "flat" / path.name) for path in images_in(INK / "train")]
    noto = [read_whole(styles / "noto" / path.name) for path in images_in(INK / "train")]
    real = lite(first)
    print(f"against {len(first)} ink drawings: KID × 10³ with interval, Fréchet distance")
    for name, pictures in {
        "the other half": second,
        "blurred by 0.5 pixels": [blurred(one, 0.5) for one in second],
        "blurred by 1 pixel": [blurred(one, 1) for one in second],
        "blurred by 2 pixels": [blurred(one, 2) for one in second],
        "with 5 % noise": [noisy(one, 0.05) for one in second],
        "with 20 % noise": [noisy(one, 0.2) for one in second],
        "flat, other concepts": [flat[n] for n in half[1::2]],
        "noto, other concepts": [noto[n] for n in half[1::2]],
        "one drawing, a hundred times": second[:1] * len(second),
    }.items():
        seen = lite(pictures)
        score = metrics.kid(real, seen)
        print(
            f"  {name:30} {1000 * score.value:7.1f} ({1000 * score.lower:.1f} to "
            f"{1000 * score.upper:.1f})   {metrics.frechet_distance(real, seen):.3g}",
            flush=True,
        )


def of_captions(lora: Path | None) -> None:
    base = open_base("assets/emoji-base")
    _, config = recognise(base)
    pipeline = Pipeline.load(config, base)
    assert pipeline.vae is not None
    if lora is not None:
        pipeline.merge_loras([(lora_files.read(lora).adapters, 1.0)])
    paths = images_in(INK / "validation")
    captions = [path.with_suffix(".txt").read_text().strip() for path in paths]
    pixels = np.stack([read_image(path, (64, 64)) for path in paths])
    latents = pipeline.vae.encode(Tensor(pixels))[0].asnumpy() * config.vae.scaling_factor
    draw = np.random.default_rng(0)
    shuffled = [captions[n] for n in np.roll(np.arange(len(captions)), 1)]
    texts = {"right": captions, "shuffled": shuffled, "none": [""] * len(captions)}
    losses: dict[str, list[float]] = {name: [] for name in texts}
    states = {name: np.stack([pipeline.encode(t) for t in said]) for name, said in texts.items()}
    with evaluating(pipeline.unet):
        for timestep in (100, 300, 500, 700, 900):
            noise = draw.standard_normal(latents.shape).astype(np.float32)
            at = np.full(len(latents), timestep)
            target, seen = velocity(latents, noise, at), add_noise(latents, noise, at)
            for name, hidden in states.items():
                inputs = (Tensor(seen), Tensor(at.astype(np.float32)), Tensor(hidden))
                found = pipeline.unet(*inputs).asnumpy()
                losses[name].append(float(((found - target) ** 2).mean()))
    means = ", ".join(f"{name} {np.mean(found):.4f}" for name, found in losses.items())
    print(f"denoising loss of {lora or 'the base'} by captions: {means}", flush=True)


def seconds(work: Callable[[], object]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def of_time() -> None:
    draw = np.random.default_rng(0)
    for count in (100, 10_000):
        lite, fid, clip = (
            draw.normal(0, 1, (2, count, d)).astype(np.float32) for d in (1280, 2048, 768)
        )
        print(
            f"{count} a side: KID {seconds(lambda x=lite: metrics.kid(*x)):.2f} s, "
            f"FID {seconds(lambda x=fid: metrics.frechet_distance(*x)):.2f} s, "
            f"CMMD {seconds(lambda x=clip: metrics.cmmd(*x)):.2f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--styles", type=Path)
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--times", action="store_true")
    given = parser.parse_args()
    compile_graphs()
    ms.set_device("CPU")
    if given.times:
        of_time()
        return
    if given.styles:
        of_pictures(given.styles)
    of_captions(None)
    if given.lora:
        of_captions(given.lora)


if __name__ == "__main__":
    main()
