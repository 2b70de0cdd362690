"""Solvers of the reverse process, as free functions over a list of noise levels.

All work in the variance-exploding form x = x₀ + σ ε: `denoise(x, sigma)` returns the estimate of
x₀, whatever the network predicts, and `sigmas` falls to 0 (DDIM: to the smallest of the table).
Division by √(σ² + 1) with the last σ gives the variance-preserving form, that of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from diffusion.schedule import SIGMAS, TRAIN_TIMESTEPS

Denoise = Callable[[np.ndarray, float], np.ndarray]
Noise = Callable[[int], np.ndarray]
"""N(0, 1) of the shape of x, for a step by its number from 0."""
Sigmas = Sequence[float] | np.ndarray

SPACINGS = ("leading", "linspace", "trailing")


def timesteps(
    steps: int, spacing: str, drop_lowest: bool = False, fractional: bool = False
) -> np.ndarray:
    """`steps` falling timesteps, Lin et al. (2023), arXiv 2305.08891, table 2; float64 (steps,).

    "trailing" begins with 999; "linspace" has both ends, 999 and 0; "leading", Stable Diffusion's
    own, is one above the multiples of 1000 // steps and begins below 999. With `drop_lowest` the
    latter two are made of one timestep more, and the lowest, too near to σ = 0, is left out.
    Timesteps are whole, but with `fractional` those of "linspace" are not rounded.

    Raises ValueError for an unknown spacing and for more steps than there are timesteps.
    """
    points = steps + drop_lowest
    if steps < 1:
        raise ValueError(f"at least 1 step is needed, not {steps}")
    if spacing == "leading":
        found = np.arange(points)[::-1] * (TRAIN_TIMESTEPS // points) + 1.0
    elif spacing == "trailing":
        found = np.arange(TRAIN_TIMESTEPS, 0, -TRAIN_TIMESTEPS / steps).round() - 1
    elif spacing == "linspace":
        # A single one is 999, where the noise is.
        found = np.linspace(0, TRAIN_TIMESTEPS - 1, max(points, 2))[::-1]
        found = found if fractional else found.round()
    else:
        raise ValueError(f"the spacing is one of {', '.join(SPACINGS)}, not {spacing!r}")
    found = found[:steps]  # one less than was made, or than `arange` made by rounding
    if found[0] >= TRAIN_TIMESTEPS or (np.diff(found) >= 0).any():
        raise ValueError(f"{steps} steps are too many for {TRAIN_TIMESTEPS} timesteps")
    return found


def spaced_sigmas(
    timesteps: np.ndarray, table: np.ndarray = SIGMAS, last: float = 0.0
) -> np.ndarray:
    """σ at the timesteps, then `last`; shape (steps + 1,).

    `table` (1000,) has the σ of every timestep; between two, σ is interpolated linearly.
    """
    return np.append(np.interp(timesteps, np.arange(len(table)), table), last)


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> np.ndarray:
    """Karras et al. (2022), arXiv 2206.00364, eq. 5: σ_max … σ_min, then 0; shape (steps + 1,)."""
    ramp = np.linspace(0, 1, steps)
    roots = sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))
    return np.append(roots**rho, 0.0)


def euler(denoise: Denoise, x: np.ndarray, sigmas: Sigmas) -> np.ndarray:
    """Euler's method, Karras et al. (2022), arXiv 2206.00364, algorithm 1 without lines 6–8."""
    for sigma, sigma_next in pairwise(sigmas):
        d = (x - denoise(x, sigma)) / sigma
        x = x + (sigma_next - sigma) * d
    return x


def euler_ancestral(
    denoise: Denoise, x: np.ndarray, sigmas: Sigmas, noise: Noise, eta: float = 1.0
) -> np.ndarray:
    """Ancestral sampling, Song et al. (2021), arXiv 2011.13456, appendix F, as in k-diffusion.

    Euler to σ_down, then fresh noise of σ_up, where σ_down² + σ_up² = σ'². With η = 1, σ_up² is
    the variance of x' given x and x₀; with η = 0 this is `euler`, and `noise` is not called.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        sigma_up = min(sigma_next, eta * sigma_next * np.sqrt(1 - (sigma_next / sigma) ** 2))
        sigma_down = np.sqrt(sigma_next**2 - sigma_up**2)
        d = (x - denoise(x, sigma)) / sigma
        x = x + (sigma_down - sigma) * d
        if sigma_up > 0:
            x = x + sigma_up * noise(i)
    return x


def ddim(
    denoise: Denoise, x: np.ndarray, sigmas: Sigmas, noise: Noise, eta: float = 0.0
) -> np.ndarray:
    """DDIM, Song et al. (2021), arXiv 2010.02502, eq. 12 with the noise of eq. 16.

    Eq. 12 divided by √ᾱ' is a step of `euler_ancestral`: x' = x̂₀ + √(σ'² − s²/ᾱ') ε̂ + s/√ᾱ' z,
    and by 1/ᾱ = σ² + 1, s of eq. 16 is η √((1 − ᾱ')/(1 − ᾱ)) √(1 − ᾱ/ᾱ') = √ᾱ' σ_up.
    """
    return euler_ancestral(denoise, x, sigmas, noise, eta)


def dpm_solver_pp_2m(denoise: Denoise, x: np.ndarray, sigmas: Sigmas) -> np.ndarray:
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


def unipc(denoise: Denoise, x: np.ndarray, sigmas: Sigmas) -> np.ndarray:
    """UniPC of order 2, Zhao et al. (2023), arXiv 2302.04867, algorithms 1 and 2.

    For data prediction, with B₂(h) = eʰ − 1 ("bh2"): the predictor UniP is the step of
    `dpm_solver_pp_2m`. When x₀ is known at its end, the corrector UniC makes the step again with
    that x₀ among the points, without another call of `denoise`. The first and the last step are
    of first order, and the last is not corrected.
    """
    start, last = x, len(sigmas) - 2
    m: list[np.ndarray] = []  # the last three x₀
    h: list[float] = []  # the last two steps of λ = −log σ
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        m = [*m[-2:], denoise(x, sigma)]
        if i > 0:
            x = _exponential(start, _corrected(m, h), sigmas[i - 1], sigma)
        start, d = x, m[-1]
        if i < last:
            h = [*h[-1:], np.log(sigma / sigma_next)]
            if i > 0:
                d = m[-1] + h[-1] / (2 * h[-2]) * (m[-1] - m[-2])
        x = _exponential(x, d, sigma, sigma_next)
    return x


def _exponential(x: np.ndarray, d: np.ndarray, sigma: float, sigma_next: float) -> np.ndarray:
    """From σ to σ' exactly if x₀ stays d: e⁻ʰ x + (1 − e⁻ʰ) d, where e⁻ʰ = σ'/σ."""
    ratio = sigma_next / sigma
    return ratio * x + (1 - ratio) * d


def _corrected(m: list[np.ndarray], h: list[float]) -> np.ndarray:
    """The d of UniC for the step from m[-2] to m[-1].

    Its weights solve ρ₁ + ρ₂ = b₁, r ρ₁ + ρ₂ = b₂. So the step is exact if x₀ is the parabola in λ
    through the last three values, at r, 0 and 1 in units of h. In the first step, ρ is ½.
    """
    ahead = m[-1] - m[-2]
    if len(h) == 1:
        return m[-2] + ahead / 2
    z, r = -h[-1], -h[-2] / h[-1]
    b1 = (np.expm1(z) / z - 1) / np.expm1(z)
    b2 = 2 * ((np.expm1(z) / z - 1) / z - 1 / 2) / np.expm1(z)
    rho = (b1 - b2) / (1 - r)
    return m[-2] + rho * (m[-3] - m[-2]) / r + (b1 - rho) * ahead


@dataclass(frozen=True)
class Solver:
    """A solver and its noise levels, those of the scheduler of this name in diffusers."""

    title: str
    """Its name in AUTOMATIC1111's web UI."""
    function: Callable[..., np.ndarray]
    spacing: str = "linspace"
    """Of the timesteps, unless another is asked for; none with `karras`."""
    karras: bool = False
    eta: float | None = None
    """The share of fresh noise unless another is asked for; None: it takes neither noise nor η."""
    drop_lowest: bool = False
    fractional: bool = False
    """How `timesteps` are made."""
    to_zero: bool = True
    """Whether the last level is 0 and not the smallest σ of the table."""


SOLVERS = {
    "ddim": Solver("DDIM", ddim, spacing="leading", eta=0.0, to_zero=False),
    "dpm++2m": Solver("DPM++ 2M", dpm_solver_pp_2m, drop_lowest=True),
    "dpm++2m-karras": Solver("DPM++ 2M Karras", dpm_solver_pp_2m, karras=True),
    "euler": Solver("Euler", euler, fractional=True),
    "euler-karras": Solver("Euler Karras", euler, karras=True),
    "euler-a": Solver("Euler a", euler_ancestral, eta=1.0, fractional=True),
    "unipc": Solver("UniPC", unipc, drop_lowest=True),
    "unipc-karras": Solver("UniPC Karras", unipc, karras=True),
}
"""Every solver by the name that the command line takes."""


def noise_levels(
    name: str, steps: int, table: np.ndarray = SIGMAS, spacing: str | None = None
) -> np.ndarray:
    """The levels (steps + 1,) of a solver; `table` (1000,) has the σ of every timestep.

    Raises ValueError as `timesteps`, and for a spacing where the levels are Karras'.
    """
    solver = SOLVERS[name]
    if solver.karras:
        if spacing is not None:
            raise ValueError(f"{name} has noise levels of its own, without {spacing} spacing")
        return karras_sigmas(steps, table[0], table[-1])
    chosen = timesteps(steps, spacing or solver.spacing, solver.drop_lowest, solver.fractional)
    return spaced_sigmas(chosen, table, 0.0 if solver.to_zero else table[0])


def solve(
    name: str,
    denoise: Denoise,
    x: np.ndarray,
    sigmas: Sigmas,
    noise: Noise,
    eta: float | None = None,
) -> np.ndarray:
    """x at the last of `sigmas`, from x at the first.

    Raises ValueError if η > 0 is asked of a solver that adds no noise.
    """
    solver = SOLVERS[name]
    if solver.eta is None:
        if eta:
            raise ValueError(f"{name} adds no noise: eta must be 0, not {eta}")
        return solver.function(denoise, x, sigmas)
    return solver.function(denoise, x, sigmas, noise, solver.eta if eta is None else eta)


def rescale_guidance(guided: np.ndarray, conditional: np.ndarray, phi: float) -> np.ndarray:
    """Guidance without over-exposure, Lin et al. (2023), arXiv 2305.08891, section 3.4.

    `guided` and `conditional` (n, …) are predictions of the network, with guidance and with the
    text alone. Each sample of `guided` is scaled to the standard deviation of `conditional`, and
    φ is the share of the result; 0 leaves it as it is. What has no spread stays too.
    """
    axes = tuple(range(1, guided.ndim))
    spread, wanted = (values.std(axes, keepdims=True) for values in (guided, conditional))
    factor = np.divide(wanted, spread, out=np.ones_like(spread), where=spread > 0)
    return guided * (phi * factor + (1 - phi))
