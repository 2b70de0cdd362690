"""The validation loss: the held-out images at fixed noise and timesteps, the same for every run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mindspore as ms
import numpy as np

from trainer.batches import VALIDATION_DRAWS, Sampling, assemble, validation_draws
from trainer.data import Latents, Text
from trainer.dataset import Dataset
from trainer.distributed import Group
from trainer.step import DiffusionLoss


def validation_losses(
    loss: DiffusionLoss,
    dataset: Dataset,
    latents: Latents,
    text: Text,
    sampling: Sampling,
    group: Group,
    size: int,
) -> tuple[float, ...]:
    """The mean loss of each quarter of the timesteps, from the least noise to the most.

    All processes share the work, in batches of `size`, and get the same figures.
    """
    loss.set_train(False)
    sums = np.zeros(VALIDATION_DRAWS)
    for numbers in _batches(dataset, group, size):
        padded = [*numbers, *numbers[-1:] * (size - len(numbers))]
        draws = validation_draws(dataset, sampling, padded)
        read, picture_weights = latents.read(draws)
        batch = assemble(
            draws, latents.moments(read), picture_weights, text(draws.captions), sampling
        )
        inputs = (batch.noisy, batch.timesteps, batch.text, batch.target, batch.weights)
        losses = loss(*(ms.Tensor(array) for array in inputs)).asnumpy()
        for number, value in zip(numbers, losses[: len(numbers)], strict=True):
            sums[number % VALIDATION_DRAWS] += value
    loss.set_train(True)
    return tuple(float(total) for total in group.sum(sums) / len(dataset.examples))


def _batches(dataset: Dataset, group: Group, size: int) -> Iterator[Sequence[int]]:
    """This process's samples, those of one shape together."""
    for shape, _ in dataset.shapes():
        numbers = [
            row * VALIDATION_DRAWS + draw
            for row, example in enumerate(dataset.examples)
            if example.shape == shape
            for draw in range(VALIDATION_DRAWS)
        ]
        mine = numbers[group.rank_id :: group.world_size]
        for start in range(0, len(mine), size):
            yield mine[start : start + size]
