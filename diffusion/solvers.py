"""Solvers of the probability-flow ODE, as free functions over a list of noise levels.

All work in the variance-exploding form x = x₀ + σ ε: `denoise(x, sigma)` returns the estimate of
x₀, whatever the network predicts, and `sigmas` falls to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from diffusion.schedule import SIGMAS, TRAIN_TIMESTEPS

Denoise = Callable[[np.ndarray, float], np.ndarray]


def linspace_sigmas(steps: int, table: np.ndarray = SIGMAS) -> np.ndarray:
    """σ at `steps` evenly spaced timesteps from 999 towards 0, then 0; shape (steps + 1,).

    `table` (1000,) has the σ of every timestep.
    """
    timesteps = np.linspace(0, TRAIN_TIMESTEPS - 1, steps + 1).round()[::-1][:-1].astype(int)
    return np.append(table[timesteps], 0.0)


def dpm_solver_pp_2m(
    denoise: Denoise, x: np.ndarray, sigmas: Sequence[float] | np.ndarray
) -> np.ndarray:
    """DPM-Solver++(2M), Lu et al. (2022), arXiv 2211.01095, algorithm 2.

    The first step and the last one, to σ = 0, are of first order.
    """
    previous, h_previous = None, 0.0
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
            break
        h = np.log(sigma / sigma_next)
        d = denoised
        if previous is not None:
            r = h_previous / h
            d = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * previous
        x = (sigma_next / sigma) * x - np.expm1(-h) * d
        previous, h_previous = denoised, h
    return x


SOLVERS = {"dpm++2m": dpm_solver_pp_2m}
"""Every solver by the name that the command line takes."""
