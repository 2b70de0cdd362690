"""What comes before the first step: networks loaded, images and captions encoded into the caches.

    python -m bench.preparing [--size small quarter full]

Beside diffusers and transformers, which load the same folder, encode the same images and captions
in batches as large, and keep them in memory; ours are written to disk. What compiles does so
before; the figures of the first time say how long that takes.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench import turns
from bench.training_step import model_of
from bench.whole_job import BASE, IMAGES, make_base

IMAGES_A_ROUND = 32
PIXELS = {"small": 64, "quarter": 128, "full": 256}


def pictures() -> list[Path]:
    """The first of the assets' images."""
    return sorted(IMAGES.glob("*.png"))[:IMAGES_A_ROUND]


def captions() -> list[str]:
    """Theirs."""
    return [path.with_suffix(".txt").read_text().strip() for path in pictures()]


def ours(size: str, folder: Path) -> tuple[Any, Callable[[str], Any]]:
    """The trainer's way, through its cache."""
    import mindspore as ms

    from diffusion import models
    from diffusion.images import read_image
    from diffusion.tokenizer import Tokenizer, clip_vocabulary
    from trainer import cache as store
    from trainer.data import ENCODE_BATCH, Encode
    from weights.base import open_base

    models.compile_graphs()
    ms.set_device("CPU")
    config, pixels = model_of(size), PIXELS[size]

    def load() -> dict[str, Any]:
        base = open_base(folder)
        names = ("unet", "vae", "text_encoder")
        return {name: models.load(config, base, name) for name in names}

    networks = load()
    models.transform_convolutions(networks["vae"], "encoder")
    encode, read = Encode(networks["vae"]), networks["text_encoder"]
    tokenizer = Tokenizer(clip_vocabulary(), config.text_encoder.pad_token_id)

    def kept(rows: np.ndarray) -> None:
        with tempfile.TemporaryDirectory() as name:
            for number, row in enumerate(rows):
                store.write(Path(name) / f"{number}.npy", row)

    def images() -> None:
        found = np.stack([read_image(path, (pixels, pixels)) for path in pictures()])
        kept(models.in_batches(encode, found, ENCODE_BATCH))

    def texts() -> None:
        kept(models.in_batches(read, tokenizer(captions()), ENCODE_BATCH))

    return timed({"loading": load, "images": images, "captions": texts})


def theirs(size: str, folder: Path) -> tuple[Any, Callable[[str], Any]]:
    """diffusers and transformers."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from PIL import Image
    from transformers import CLIPTextModel

    from diffusion.tokenizer import Tokenizer, clip_vocabulary
    from trainer.data import ENCODE_BATCH

    torch.set_num_threads(2)
    pixels = PIXELS[size]

    def load() -> dict[str, Any]:
        return {
            "unet": UNet2DConditionModel.from_pretrained(folder / "unet").float(),
            "vae": AutoencoderKL.from_pretrained(folder / "vae").float(),
            "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder").float(),
        }

    networks = load()
    tokenizer = Tokenizer(clip_vocabulary(), 49407)

    def read(path: Path) -> torch.Tensor:
        with Image.open(path) as image:
            small = image.convert("RGB").resize((pixels, pixels), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(small, np.float32) / 127.5 - 1).permute(2, 0, 1)

    @torch.no_grad()
    def images() -> None:
        found = torch.stack([read(path) for path in pictures()])
        torch.cat(
            [networks["vae"].encode(part).latent_dist.mean for part in found.split(ENCODE_BATCH)]
        )

    @torch.no_grad()
    def texts() -> None:
        ids = torch.from_numpy(tokenizer(captions())).long()
        torch.cat([networks["text_encoder"](part)[0] for part in ids.split(ENCODE_BATCH)])

    return timed({"loading": load, "images": images, "captions": texts})


def timed(ways: dict[str, Callable[[], Any]]) -> tuple[Any, Callable[[str], Any]]:
    """Seconds of each, the first time and then as it is asked for."""

    def seconds(name: str) -> float:
        begun = time.monotonic()
        ways[name]()
        found = time.monotonic() - begun
        gc.collect()
        return found

    return {name: seconds(name) for name in ways}, seconds


def compare(size: str, folder: Path, rounds: int) -> list[turns.Figure]:
    """Loading, images, captions."""
    sides = {
        name: turns.Side("preparing", "--side", name, "--size", size, "--base", str(folder))
        for name in ("ours", "diffusers")
    }
    pixels = PIXELS[size]
    figures = []
    for asked, what in (
        ("loading", "networks loaded"),
        ("images", f"{IMAGES_A_ROUND} images of {pixels}² encoded"),
        ("captions", f"{IMAGES_A_ROUND} captions encoded"),
    ):
        found = turns.in_turns(sides, rounds, asked)
        first = {name: side.ready[asked] for name, side in sides.items()}
        name = f"{what}, {size}"
        peer = "diffusers and transformers"
        figures.append(turns.figure(name, found["ours"], found["diffusers"], "s", peer))
        if asked != "loading":
            figures.append(
                turns.Figure(f"{name}, first time", first["ours"], first["diffusers"], "s", peer)
            )
    for side in sides.values():
        side.end()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=["ours", "diffusers"])
    parser.add_argument("--size", nargs="+", choices=[*PIXELS], default=["small", "quarter"])
    parser.add_argument("--base", type=Path, help="Of a side.")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.side:
        side = ours if given.side == "ours" else theirs
        turns.serve(lambda: side(given.size[0], given.base))
        sys.exit()
    for size in given.size:
        with tempfile.TemporaryDirectory() as name:
            folder = BASE
            if size != "small":
                folder = Path(name)
                make_base(folder, size)
            figures = compare(size, folder, given.rounds)
            turns.show(figures)
            turns.keep(figures)


if __name__ == "__main__":
    main()
