"""Which example, noise, timestep and dropout each sample of a run gets, from its number alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffusion import schedule
from diffusion.randomness import generator
from trainer.data import EncodedData


def sample_order(seed: int, examples: int, first: int, count: int) -> list[int]:
    """Which example each of the samples `first` … `first + count - 1` of a run shows.

    Epoch e (samples e·examples …) is a permutation of its own, so every example is seen once an
    epoch whatever the batch.
    """
    order: list[int] = []
    permutations: dict[int, np.ndarray] = {}
    for number in range(first, first + count):
        epoch, place = divmod(number, examples)
        if epoch not in permutations:
            permutations[epoch] = generator(seed, "order", epoch).permutation(examples)
        order.append(int(permutations[epoch][place]))
    return order


@dataclass(frozen=True)
class Batch:
    """One micro-batch, ready for the step.

    noisy, target: (batch, 4, h, w); timesteps (batch,) int32; text: token ids or hidden states;
    weights (batch,); masks (modules, batch, rank) of the LoRA dropout, or None.
    """

    noisy: np.ndarray
    timesteps: np.ndarray
    text: np.ndarray
    target: np.ndarray
    weights: np.ndarray
    masks: np.ndarray | None = None


@dataclass(frozen=True)
class Sampling:
    """The part of the config that decides what a sample is."""

    seed: int
    prediction_type: str
    caption_dropout: float
    min_snr_gamma: float | None
    noise_offset: float = 0.0
    dropout: float = 0.0
    rank: int = 0
    modules: int = 0


def noise_and_target(
    latents: np.ndarray, noise: np.ndarray, timesteps: np.ndarray, prediction_type: str
) -> tuple[np.ndarray, np.ndarray]:
    """x_t and what the network should predict of it."""
    noisy = schedule.add_noise(latents, noise, timesteps)
    if prediction_type == "epsilon":
        return noisy, noise
    return noisy, schedule.velocity(latents, noise, timesteps)


def training_batch(data: EncodedData, sampling: Sampling, first: int, count: int) -> Batch:
    """The samples `first` … `first + count - 1` of the run."""
    numbers = range(first, first + count)
    seed, shape = sampling.seed, data.mean.shape[1:]
    chosen = sample_order(seed, data.examples, first, count)
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
    dropped = [generator(seed, "caption", n).random() < sampling.caption_dropout for n in numbers]
    captions = np.where(dropped, len(data.text) - 1, data.caption[chosen])
    latents = data.mean[chosen] + data.std[chosen] * spread
    noisy, target = noise_and_target(latents, noise, timesteps, sampling.prediction_type)
    weights = schedule.min_snr_weights(timesteps, sampling.min_snr_gamma, sampling.prediction_type)
    masks = None
    if sampling.dropout:
        size = (sampling.modules, sampling.rank)
        kept = [generator(seed, "dropout", n).random(size) >= sampling.dropout for n in numbers]
        masks = np.stack(kept, axis=1).astype(np.float32) / np.float32(1 - sampling.dropout)
    return Batch(noisy, timesteps, data.text[captions], target, weights, masks)


VALIDATION_DRAWS = 4


def validation_batch(data: EncodedData, prediction_type: str, numbers: Sequence[int]) -> Batch:
    """Validation samples; the same for every run, whatever its seed.

    Sample n shows image n // 4 at a timestep from quarter n mod 4 of the schedule, with the mean
    of its latents and noise of its own.
    """
    quarter = schedule.TRAIN_TIMESTEPS // VALIDATION_DRAWS
    shape = data.mean.shape[1:]
    draws = [generator(0, "validation", n) for n in numbers]
    timesteps = np.array(
        [
            n % VALIDATION_DRAWS * quarter + draw.integers(quarter)
            for n, draw in zip(numbers, draws, strict=True)
        ],
        np.int32,
    )
    noise = np.stack([draw.standard_normal(shape, np.float32) for draw in draws])
    chosen = np.array(numbers) // VALIDATION_DRAWS
    noisy, target = noise_and_target(data.mean[chosen], noise, timesteps, prediction_type)
    text = data.text[data.caption[chosen]]
    return Batch(noisy, timesteps, text, target, np.ones(len(numbers), np.float32))
