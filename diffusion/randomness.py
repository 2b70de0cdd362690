"""Randomness by address: what a sample draws depends on its number, not on who draws it."""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, purpose: str, number: int = 0) -> np.random.Generator:
    """The generator of sample `number` for one purpose ("noise", "timestep", …).

    Philox is counter-based: the key is (seed, purpose), the counter starts at `number`, so that
    any sample's draws can be made alone, in any order and on any rank.
    """
    key = np.array([seed, zlib.crc32(purpose.encode())], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, number]))
