"""Which example, noise, timestep and dropout each sample of a run gets, from its number alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from diffusion import schedule
from diffusion.randomness import generator
from trainer.dataset import Dataset, Example


class Order:
    """Which example each sample of a run shows.

    With pictures of one shape, epoch after epoch is a permutation of its own, and batches go over
    the end of one into the next. With several, a global batch is of one shape: within an epoch
    each shape's samples are filled up with the first of them, seen again, to whole batches, and
    the batches of all shapes are shuffled.
    """

    def __init__(self, dataset: Dataset, seed: int, global_batch: int):
        self.seed = seed
        self.global_batch = global_batch
        by_shape: dict[tuple[int, int], list[int]] = {}
        for row in dataset.epoch:
            by_shape.setdefault(dataset.examples[row].shape, []).append(row)
        self.groups = [np.array(by_shape[shape]) for shape in sorted(by_shape)]
        whole = len(dataset.epoch)
        if len(self.groups) > 1:
            whole = sum(math.ceil(len(g) / global_batch) * global_batch for g in self.groups)
        self.epoch_samples = whole
        """Samples of one epoch."""
        self.repeated = whole - len(dataset.epoch)
        """How many of them are there only to fill up batches."""
        self._epochs: dict[int, np.ndarray] = {}

    def rows(self, first: int, count: int) -> list[int]:
        """The rows of `dataset.examples` that samples `first` … `first + count - 1` show."""
        found = []
        for number in range(first, first + count):
            epoch, place = divmod(number, self.epoch_samples)
            if epoch not in self._epochs:
                # Nobody goes back further than a batch that began in the epoch before.
                self._epochs = {e: rows for e, rows in self._epochs.items() if e == epoch - 1}
                self._epochs[epoch] = self._epoch(epoch)
            found.append(int(self._epochs[epoch][place]))
        return found

    def _epoch(self, epoch: int) -> np.ndarray:
        orders = [
            group[generator(self.seed, f"order {i}", epoch).permutation(len(group))]
            for i, group in enumerate(self.groups)
        ]
        if len(orders) == 1:
            return orders[0]
        batches = np.concatenate(
            [
                np.resize(order, (math.ceil(len(order) / self.global_batch), self.global_batch))
                for order in orders
            ]
        )
        return batches[generator(self.seed, "shapes", epoch).permutation(len(batches))].ravel()


@dataclass(frozen=True)
class Sampling:
    """What decides how an example becomes a sample."""

    seed: int
    prediction_type: str
    latent_channels: int = 4
    factor: int = 8
    """Pixels per latent cell along one side."""
    scaling_factor: float = 1.0
    caption_dropout: float = 0.0
    shuffle_captions: bool = False
    keep_tokens: int = 0
    flip: bool = False
    random_crop: bool = False
    min_snr_gamma: float | None = None
    noise_offset: float = 0.0
    zero_terminal_snr: bool = False
    dropout: float = 0.0
    rank: int = 0
    modules: int = 0

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """ᾱ_t of the noise schedule."""
        alphas = schedule.ALPHAS_CUMPROD
        return schedule.zero_terminal(alphas) if self.zero_terminal_snr else alphas


@dataclass(frozen=True)
class Draws:
    """What the samples of one micro-batch are: examples, and everything random about them.

    noise, spread: (batch, channels, h, w), spread being that of the latents' distribution;
    timesteps (batch,) int32; weights (batch,) of timestep and set; masks (modules, batch, rank)
    of the LoRA dropout, or None.
    """

    examples: tuple[Example, ...]
    captions: tuple[str, ...]
    flips: tuple[bool, ...]
    positions: tuple[tuple[float, float], ...]
    timesteps: np.ndarray
    noise: np.ndarray
    spread: np.ndarray
    weights: np.ndarray
    masks: np.ndarray | None = None


@dataclass(frozen=True)
class Batch:
    """One micro-batch, ready for the step.

    noisy, target, weights: (batch, 4, h, w); timesteps (batch,) int32; text: token ids or hidden
    states; masks (modules, batch, rank) of the LoRA dropout, or None.
    """

    noisy: np.ndarray
    timesteps: np.ndarray
    text: np.ndarray
    target: np.ndarray
    weights: np.ndarray
    masks: np.ndarray | None = None


def training_draws(
    dataset: Dataset, order: Order, sampling: Sampling, first: int, count: int
) -> Draws:
    """The samples `first` … `first + count - 1` of the run."""
    numbers = range(first, first + count)
    seed = sampling.seed
    examples = tuple(dataset.examples[row] for row in order.rows(first, count))
    shape = _latent_shape(examples[0], sampling)
    spread, noise = (
        np.stack([generator(seed, use, n).standard_normal(shape, np.float32) for n in numbers])
        for use in ("vae", "noise")
    )
    if sampling.noise_offset:
        offsets = [generator(seed, "noise offset", n) for n in numbers]
        draws = [offset.standard_normal((shape[0], 1, 1), np.float32) for offset in offsets]
        noise = noise + np.float32(sampling.noise_offset) * np.stack(draws)
    timesteps = np.array(
        [generator(seed, "timestep", n).integers(schedule.TRAIN_TIMESTEPS) for n in numbers],
        np.int32,
    )
    weights = schedule.min_snr_weights(
        timesteps, sampling.min_snr_gamma, sampling.prediction_type, sampling.alphas_cumprod
    )
    weights = weights * np.array([example.loss_weight for example in examples], np.float32)
    flips, positions = (False,) * count, ((0.5, 0.5),) * count
    if sampling.flip:
        flips = tuple(bool(generator(seed, "flip", n).random() < 0.5) for n in numbers)
    if sampling.random_crop:
        crops = (generator(seed, "crop", n).random(2) for n in numbers)
        positions = tuple((float(x), float(y)) for x, y in crops)
    masks = None
    if sampling.dropout:
        size = (sampling.modules, sampling.rank)
        kept = [generator(seed, "dropout", n).random(size) >= sampling.dropout for n in numbers]
        masks = np.stack(kept, axis=1).astype(np.float32) / np.float32(1 - sampling.dropout)
    captions = tuple(_caption(e, sampling, n) for e, n in zip(examples, numbers, strict=True))
    return Draws(examples, captions, flips, positions, timesteps, noise, spread, weights, masks)


def _caption(example: Example, sampling: Sampling, number: int) -> str:
    """The caption of sample `number`: dropped, shuffled or as it is."""
    if generator(sampling.seed, "caption", number).random() < sampling.caption_dropout:
        return ""
    if not sampling.shuffle_captions:
        return example.caption
    parts = [part.strip() for part in example.caption.removeprefix(example.prefix).split(",")]
    kept, moved = parts[: sampling.keep_tokens], parts[sampling.keep_tokens :]
    places = generator(sampling.seed, "shuffle", number).permutation(len(moved))
    return example.prefix + ", ".join([*kept, *(moved[place] for place in places)])


def _latent_shape(example: Example, sampling: Sampling) -> tuple[int, int, int]:
    width, height = (side // sampling.factor for side in example.shape)
    return sampling.latent_channels, height, width


VALIDATION_DRAWS = 4


def validation_draws(dataset: Dataset, sampling: Sampling, numbers: Sequence[int]) -> Draws:
    """Validation samples; the same for every run, whatever its seed.

    Sample n shows image n // 4 at a timestep from quarter n mod 4 of the schedule, with the mean
    of its latents and noise of its own. The images of `numbers` must be of one shape.
    """
    quarter = schedule.TRAIN_TIMESTEPS // VALIDATION_DRAWS
    examples = tuple(dataset.examples[n // VALIDATION_DRAWS] for n in numbers)
    shape = _latent_shape(examples[0], sampling)
    draws = [generator(0, "validation", n) for n in numbers]
    timesteps = np.array(
        [
            n % VALIDATION_DRAWS * quarter + draw.integers(quarter)
            for n, draw in zip(numbers, draws, strict=True)
        ],
        np.int32,
    )
    noise = np.stack([draw.standard_normal(shape, np.float32) for draw in draws])
    count = len(numbers)
    return Draws(
        examples,
        tuple(example.caption for example in examples),
        (False,) * count,
        ((0.5, 0.5),) * count,
        timesteps,
        noise,
        np.zeros_like(noise),
        np.ones(count, np.float32),
    )


def noise_and_target(
    latents: np.ndarray,
    noise: np.ndarray,
    timesteps: np.ndarray,
    prediction_type: str,
    alphas_cumprod: np.ndarray = schedule.ALPHAS_CUMPROD,
) -> tuple[np.ndarray, np.ndarray]:
    """x_t and what the network should predict of it."""
    noisy = schedule.add_noise(latents, noise, timesteps, alphas_cumprod)
    if prediction_type == "epsilon":
        return noisy, noise
    return noisy, schedule.velocity(latents, noise, timesteps, alphas_cumprod)


def assemble(
    draws: Draws,
    moments: np.ndarray,
    picture_weights: np.ndarray | None,
    text: np.ndarray,
    sampling: Sampling,
) -> Batch:
    """The batch, from the latents' mean and log-variance, stacked: (batch, 2 · channels, h, w).

    `picture_weights` (batch, h, w) says what each part of a picture counts, None all alike.
    """
    mean, logvar = np.split(moments, 2, axis=1)
    scale = np.float32(sampling.scaling_factor)
    latents = scale * (mean + np.exp(np.float32(0.5) * logvar) * draws.spread)
    noisy, target = noise_and_target(
        latents, draws.noise, draws.timesteps, sampling.prediction_type, sampling.alphas_cumprod
    )
    weights = draws.weights[:, None, None, None] * np.ones_like(target)
    if picture_weights is not None:
        weights = weights * picture_weights[:, None]
    return Batch(noisy, draws.timesteps, text, target, weights, draws.masks)
