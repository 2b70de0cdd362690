"""Which example, noise, timestep and dropout each sample of a run gets, from its number alone."""

from __future__ import annotations

import numpy as np

from diffusion.randomness import generator

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
