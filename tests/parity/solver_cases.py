"""A made-up network for solvers, and where diffusers arrives with it."""

from __future__ import annotations

from collections.abc import Callable

import cases
import numpy as np

from diffusion.randomness import generator
from diffusion.schedule import SIGMAS
from diffusion.solvers import SOLVERS, noise_levels, solve, timesteps

CASES = {
    **{name: (name, None) for name in SOLVERS},
    "ddim, eta 1": ("ddim", 1.0),
}
"""Solver and η."""
START = np.array([-1.5, -0.4, 0.3, 1.2])
"""N(0, 1), more or less: the noisiest latents in the variance-preserving form."""
STEPS = 10


def noise(step: int) -> np.ndarray:
    return generator(2, "noise of a step", step).standard_normal(START.shape)


def given_timesteps(name: str, steps: int, table: np.ndarray, spacing: str | None) -> np.ndarray:
    """The timesteps that the scheduler of diffusers gives to the network.

    With Karras' levels they are between whole ones, and only Euler's is not rounded.
    """
    solver = SOLVERS[name]
    if not solver.karras:
        return timesteps(steps, spacing or solver.spacing, solver.drop_lowest, solver.fractional)
    found = looked_up(noise_levels(name, steps, table)[:-1], table)
    return found if name == "euler-karras" else found.round()


def looked_up(levels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The timesteps that `diffusion.pipeline` gives to the network."""
    return np.interp(np.log(levels), np.log(table), np.arange(len(table)))


def denoiser(prediction_type: str, given: np.ndarray) -> Callable[[np.ndarray, float], np.ndarray]:
    """(x, σ) → x₀; `given` has the timestep of every call."""
    remaining = iter(given)

    def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
        root = np.sqrt(sigma**2 + 1)
        output = cases.toy_prediction(x / root, next(remaining))
        if prediction_type == "epsilon":
            return x - sigma * output
        return x / root**2 - sigma / root * output

    return denoise


def ours(
    case: str,
    prediction_type: str,
    steps: int = STEPS,
    spacing: str | None = None,
    table: np.ndarray = SIGMAS,
    given: np.ndarray | None = None,
) -> np.ndarray:
    """From START to the end, in the variance-preserving form."""
    name, eta = CASES[case]
    levels = noise_levels(name, steps, table, spacing)
    if given is None:
        given = given_timesteps(name, steps, table, spacing)
    x = START * np.sqrt(levels[0] ** 2 + 1)
    x = solve(name, denoiser(prediction_type, given), x, levels, noise, eta)
    return x / np.sqrt(levels[-1] ** 2 + 1)


GOLDEN = {
    ("ddim", "epsilon"): (-3.867413291827, -1.253226859095, 1.820113183239, 1.952750689956),
    ("ddim", "v_prediction"): (-0.248606164200, -0.168363979815, -0.062887489141, 0.875931172172),
    ("dpm++2m", "epsilon"): (-4.462944396410, -1.212214347994, 1.809419043772, 2.052868302737),
    ("dpm++2m", "v_prediction"): (
        -0.258898390371,
        -0.152902517837,
        -0.061557497214,
        0.981273947071,
    ),
    ("dpm++2m-karras", "epsilon"): (
        -4.248356105256,
        -0.494668823916,
        1.821062799464,
        1.992033485296,
    ),
    ("dpm++2m-karras", "v_prediction"): (
        -0.364118153839,
        -0.164825060344,
        -0.010069071126,
        1.104726419088,
    ),
    ("euler", "epsilon"): (-5.300489190729, -2.175600138929, 1.854420679631, 3.597638451067),
    ("euler", "v_prediction"): (-0.215576975920, -0.157413298282, -0.060279601664, 0.819784709851),
    ("euler-karras", "epsilon"): (-5.377381065056, -2.202825134291, 1.905556656237, 3.329304651810),
    ("euler-karras", "v_prediction"): (
        -0.212709625327,
        -0.167362514145,
        -0.034542780843,
        0.749658687359,
    ),
    ("euler-a", "epsilon"): (-3.956849417247, -0.920657340997, 5.325420082422, 1.732058849081),
    ("euler-a", "v_prediction"): (
        -0.157242585192,
        -0.143485892544,
        0.006717306405,
        -0.020053519081,
    ),
    ("unipc", "epsilon"): (-4.339976838829, -1.480547448103, 1.821221534315, 1.991321134558),
    ("unipc", "v_prediction"): (-0.259625667895, -0.153802338689, -0.058806903341, 0.979263396528),
    ("unipc-karras", "epsilon"): (-4.256026065090, -1.288574747567, 1.904797574094, 2.039942467910),
    ("unipc-karras", "v_prediction"): (
        -0.340438547914,
        -0.172792539637,
        0.002169145351,
        1.060868235807,
    ),
    ("ddim, eta 1", "epsilon"): (-2.203724277254, -0.330558812417, 3.530460891155, 1.682560470615),
    ("ddim, eta 1", "v_prediction"): (
        -0.176941281425,
        -0.145813134947,
        0.146407739659,
        -0.043620099381,
    ),
}
"""Of diffusers in double precision, after STEPS. `test_solvers_against_diffusers.py` makes them."""
