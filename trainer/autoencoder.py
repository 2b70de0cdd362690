"""Training of the small base's autoencoder, from folders of images.

    python -m trainer.autoencoder --model emoji --images build/emoji/flat --steps 2000 OUT_DIR

A loop of its own because its loss is another one: L1 + MSE of the reconstruction plus a light
KL term. Writes OUT_DIR/vae.safetensors and prints the scaling factor for the model's YAML.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import click
import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from PIL import Image

from diffusion.config import load_model_config
from diffusion.randomness import generator
from diffusion.vae import AutoencoderKL
from trainer.batches import sample_order
from trainer.images import find_examples, read_images
from trainer.optimizer import FlatAdamW, flatten, learning_rate
from weights import files

KL_WEIGHT = 1e-5
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


class Step(nn.Cell):
    def __init__(self, loss: Loss, optimizer: FlatAdamW):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.gradients = ops.value_and_grad(loss, None, ms.ParameterTuple(optimizer.trained))

    def construct(self, images, noise, rate, correction1, correction2, decay):
        loss, gradients = self.gradients(images, noise)
        norm = self.optimizer(flatten(gradients), rate, correction1, correction2, decay)
        return ops.depend(loss, norm)


class Codec(nn.Cell):
    """Images → latent mean and reconstruction."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__(auto_prefix=False)
        self.vae = vae

    def construct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, _ = self.vae.encode(images)
        return mean, self.vae.decode(mean)


@click.command()
@click.option("--model", required=True, help="Name in configs/models, or a YAML file.")
@click.option("--images", multiple=True, required=True, help="Folder; may be given again.")
@click.option("--steps", default=2000, show_default=True)
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
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(seed)
    config = load_model_config(model)
    examples = [example for folder in images for example in find_examples(folder)]
    pixels = read_images(examples, config.resolution)
    vae = AutoencoderKL(config.vae)
    optimizer = FlatAdamW(vae.trainable_params(), (0.9, 0.99), 1e-8, 0.0, 1.0)
    step = Step(Loss(vae), optimizer)
    size = config.resolution // config.vae.factor
    shape = (batch, config.vae.latent_channels, size, size)
    started, smoothed = time.monotonic(), None
    out.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        averages = np.split(optimizer.average.asnumpy(), np.cumsum(optimizer.sizes)[:-1])
        for parameter, average in zip(optimizer.trained, averages, strict=True):
            parameter.set_data(Tensor(average.reshape(parameter.shape)))
        tensors = {p.name: p.asnumpy() for p in vae.get_parameters()}
        files.dump(out / "vae.safetensors", tensors, {"format": "pt"})

    for number in range(steps):
        chosen = sample_order(seed, len(examples), number * batch, batch)
        noise = generator(seed, "noise", number).standard_normal(shape, np.float32)
        scalars = (
            learning_rate(number, steps, rate, WARMUP, "cosine"),
            *optimizer.corrections(number + 1),
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
    save()
    codec = Codec(vae)
    shown = sample_order(seed + 1, len(examples), 0, 64)
    means, decoded = zip(
        *(map(Tensor.asnumpy, codec(Tensor(pixels[shown[i : i + 16]]))) for i in range(0, 64, 16)),
        strict=True,
    )
    means, decoded = np.concatenate(means), np.concatenate(decoded)
    mse = float(((np.clip(decoded, -1, 1) - pixels[shown]) ** 2).mean())
    log.info("scaling_factor: %.5f", 1 / means.std())
    log.info("reconstruction PSNR %.2f dB", 10 * np.log10(4 / mse))
    pairs = np.concatenate([pixels[shown][:16], np.clip(decoded[:16], -1, 1)])
    rows = [np.concatenate(list(pairs[i : i + 8]), axis=2) for i in (0, 16, 8, 24)]
    sheet = ((np.concatenate(rows, axis=1).transpose(1, 2, 0) + 1) * 127.5).round()
    Image.fromarray(sheet.astype(np.uint8)).save(out / "reconstructions.png")


if __name__ == "__main__":
    main()
