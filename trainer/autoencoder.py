"""Training of the small base's autoencoder, from folders of images.

    python -m trainer.autoencoder --images build/emoji/flat --images build/emoji/noto build/base

A loop of its own because its loss is another one: L1 + MSE of the reconstruction plus a light
KL term. Writes OUT_DIR/vae in the diffusers layout and a picture of reconstructions, and prints the
scaling factor for the model's YAML.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import click
import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from PIL import Image

from diffusion.config import load_model_config
from diffusion.images import DataError, read_image
from diffusion.layers import Network
from diffusion.models import compile_graphs, in_batches
from diffusion.randomness import generator
from diffusion.vae import AutoencoderKL
from trainer.artifact import save_base
from trainer.captions import listed
from trainer.config import OptimizerConfig
from trainer.data import Encode
from trainer.optimizer import AdamW, flatten, learning_rate

KL_WEIGHT = 1e-5
SHOWN = 64
WARMUP = 50
log = logging.getLogger("trainer.autoencoder")


class Loss(nn.Cell):
    def __init__(self, vae: AutoencoderKL):
        super().__init__(auto_prefix=False)
        self.vae = vae

    def construct(self, images: Tensor, noise: Tensor) -> Tensor:
        mean, logvar = self.vae.encode(images)
        difference = self.vae.decode(mean + ops.exp(0.5 * logvar) * noise) - images
        kl = 0.5 * (mean * mean + ops.exp(logvar) - 1 - logvar).sum() / images.shape[0]
        return difference.abs().mean() + (difference * difference).mean() + KL_WEIGHT * kl


class Step(Network):
    def __init__(self, loss: Loss, optimizer: AdamW):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.gradients = ops.value_and_grad(loss, None, ms.ParameterTuple(optimizer.trained))

    def construct(self, images, noise, rate, decay):
        loss, gradients = self.gradients(images, noise)
        return ops.depend(loss, self.optimizer(flatten(gradients), rate, decay))


@click.command()
@click.option("--model", default="emoji", show_default=True, help="Name in configs/models.")
@click.option("--images", multiple=True, required=True, help="Folder; may be given again.")
@click.option("--steps", default=2400, show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--rate", default=1.5e-3, show_default=True, help="Peak learning rate.")
@click.option("--seed", default=0, show_default=True)
@click.argument("out", type=click.Path(path_type=Path))
def main(
    model: str,
    images: tuple[str, ...],
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    out: Path,
) -> None:
    """Train the autoencoder of MODEL on folders of images."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    compile_graphs()
    ms.set_seed(seed)
    config = load_model_config(model)
    pixels = _pixels(images, config.resolution)
    vae = AutoencoderKL(config.vae)
    options = OptimizerConfig(betas=(0.9, 0.99), weight_decay=0)
    optimizer = AdamW(vae.trainable_params(), options)
    step = Step(Loss(vae), optimizer)
    size = config.resolution // config.vae.factor
    shape = (batch, config.vae.latent_channels, size, size)
    started, smoothed = time.monotonic(), None
    out.mkdir(parents=True, exist_ok=True)

    for number in range(steps):
        chosen = _rows(seed, len(pixels), number * batch, batch)
        noise = generator(seed, "noise", number).standard_normal(shape, np.float32)
        scalars = (
            learning_rate(number, steps, rate, WARMUP, "cosine"),
            min(0.999, (1 + number) / (10 + number)),
        )
        loss = step(
            Tensor(pixels[chosen]), Tensor(noise), *(Tensor(s, ms.float32) for s in scalars)
        )
        if number % 20 == 0 or number == steps - 1:
            value = float(loss.asnumpy())
            smoothed = value if smoothed is None else 0.8 * smoothed + 0.2 * value
            pace = (number + 1) / (time.monotonic() - started)
            left = (steps - number - 1) / pace / 60
            log.info("step %d loss %.4f  %.2f steps/s  %.0f min left", number, smoothed, pace, left)
    optimizer.set_weights(optimizer.average.asnumpy())
    save_base(out, {"vae": {p.name: p.asnumpy() for p in vae.get_parameters()}})
    shown = pixels[_rows(seed + 1, len(pixels), 0, SHOWN)]
    latents = in_batches(Encode(vae), shown, batch)[:, : config.vae.latent_channels]
    decoded = np.clip(in_batches(vae, latents, batch), -1, 1)
    log.info("reconstruction PSNR %.2f dB", 10 * np.log10(4 / ((decoded - shown) ** 2).mean()))
    rows = [(decoded if odd else shown)[start : start + 8] for start in (0, 8) for odd in (0, 1)]
    sheet = np.concatenate([np.concatenate(list(row), axis=2) for row in rows], axis=1)
    pixels_out = ((sheet.transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)
    Image.fromarray(pixels_out).save(out / "reconstructions.png")
    click.echo(f"{1 / latents.std():.5f}")


def _pixels(folders: Sequence[str], resolution: int) -> np.ndarray:
    """All images of the folders as float32 (n, 3, resolution, resolution) in [-1, 1].

    Raises DataError, with a line for each fault of a folder.
    """
    listings = [listed(Path(folder)) for folder in folders]
    if problems := [problem for listing in listings for problem in listing.problems]:
        raise DataError("\n".join(problems))
    paths = [path for listing in listings for path, _ in listing.rows]
    return np.stack([read_image(path, (resolution, resolution)) for path in paths])


def _rows(seed: int, length: int, first: int, count: int) -> list[int]:
    """The images of samples `first` … `first + count - 1`, every epoch in another order."""
    places = (divmod(number, length) for number in range(first, first + count))
    return [int(generator(seed, "order", e).permutation(length)[place]) for e, place in places]


if __name__ == "__main__":
    main()
