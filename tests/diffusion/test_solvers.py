"""Solvers beside exact solutions, their papers and, from a file, diffusers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))

import solver_cases

from diffusion.schedule import ALPHAS_CUMPROD, SIGMAS, sigmas, zero_terminal
from diffusion.solvers import (
    SOLVERS,
    SPACINGS,
    Denoise,
    ddim,
    dpm_solver_pp_2m,
    euler,
    euler_ancestral,
    karras_sigmas,
    noise_levels,
    rescale_guidance,
    solve,
    spaced_sigmas,
    timesteps,
    unipc,
)

ZERO_TERMINAL = sigmas(zero_terminal(ALPHAS_CUMPROD))
KARRAS = [name for name, solver in SOLVERS.items() if solver.karras]
SPACED = [name for name in SOLVERS if name not in KARRAS]
MEAN, SPREAD = 0.7, 0.5


def gaussian(x: np.ndarray, sigma: float) -> np.ndarray:
    """E[x₀ | x] of data from N(MEAN, SPREAD²)."""
    return (SPREAD**2 * x + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)


def flow(x: np.ndarray, sigma: float, sigma_next: float) -> np.ndarray:
    """The exact solution of the probability-flow ODE for that data."""
    return MEAN + (x - MEAN) * np.hypot(SPREAD, sigma_next) / np.hypot(SPREAD, sigma)


def silence(step: int) -> np.ndarray:
    raise AssertionError("noise was asked for")


@pytest.mark.parametrize("case", solver_cases.CASES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_diffusers_arrives_at_the_same_place(case: str, prediction_type: str) -> None:
    found = solver_cases.ours(case, prediction_type)
    expected = solver_cases.GOLDEN[case, prediction_type]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)


Plain = Callable[[Denoise, np.ndarray, np.ndarray], np.ndarray]


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (euler, 1),
        (lambda denoise, x, levels: ddim(denoise, x, levels, silence), 1),
        (dpm_solver_pp_2m, 2),
        (unipc, 3),
    ],
    ids=["euler", "ddim", "dpm++2m", "unipc"],
)
def test_order_of_convergence(solver: Plain, order: int) -> None:
    x, errors = np.array([-20.0, 3.0, 14.0]), []
    for steps in (40, 80, 160):
        levels = np.geomspace(14.6, 0.05, steps + 1)
        if solver is unipc:
            # Its last step is of first order, and that before it is corrected in the last.
            levels = np.append(levels, 0.05 * (1 - 1e-9))
        found = solver(gaussian, x, levels)
        errors.append(np.abs(found - flow(x, levels[0], levels[-1])).max())
    measured = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(measured, order, atol=0.25)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("ddim", 0.03),
        ("euler", 0.03),
        ("euler-karras", 0.03),
        # What is left is the last step, of first order, from timestep 10.
        ("dpm++2m", 0.02),
        ("unipc", 0.02),
        ("dpm++2m-karras", 0.002),
        ("unipc-karras", 0.002),
    ],
)
def test_a_hundred_steps_of_an_ode_that_is_known(name: str, error: float) -> None:
    levels = noise_levels(name, 100)
    x = levels[0] * np.array([-1.5, 0.2, 1.0])
    found = solve(name, gaussian, x, levels, silence)
    np.testing.assert_allclose(found, flow(x, levels[0], levels[-1]), rtol=0, atol=error)


def test_the_first_two_predictions_of_unipc() -> None:
    """Those of DPM-Solver++(2M), the second from a corrected point: x₀ = λ there."""
    levels = np.array([10.0, 4.0, 1.0, 0.0])
    seen: list[float] = []

    def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
        seen.append(x[0])
        return np.full_like(x, -np.log(sigma))

    unipc(denoise, np.array([3.0]), levels)
    ours = seen.copy()
    seen.clear()
    dpm_solver_pp_2m(denoise, np.array([3.0]), levels)
    assert ours[:2] == pytest.approx(seen[:2], rel=1e-14)
    # With x₀ at both ends known, the first step takes their mean: half a step of λ more.
    correction = (1 - levels[1] / levels[0]) * np.log(levels[0] / levels[1]) / 2
    assert ours[2] - seen[2] == pytest.approx(levels[2] / levels[1] * correction, rel=1e-12)


def test_unipc_is_exact_for_a_parabola() -> None:
    """x₀ = λ² does not depend on x, so that every step is an integral of its own."""
    lambdas = np.array([-2.0, -1.2, -0.9, 0.3, 0.3 + 1e-9])
    levels = np.exp(-lambdas)

    def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
        return np.full_like(x, np.log(sigma) ** 2)

    def exact(x: float, start: float, end: float) -> float:
        """x(λ) = e^{-(λ - start)} x + ∫ e^{-(λ - s)} s² ds."""
        decay = np.exp(start - end)
        return float(x * decay + (end**2 - 2 * end + 2) - decay * (start**2 - 2 * start + 2))

    after_first = unipc(denoise, np.array([3.0]), [*levels[:2], levels[1] * (1 - 1e-12)])[0]
    expected = exact(exact(after_first, *lambdas[1:3]), *lambdas[2:4])
    found = unipc(denoise, np.array([3.0]), levels)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_that_of_the_paper(eta: float) -> None:
    """Eq. 12 and 16 as they stand, in the variance-preserving form."""
    chosen = timesteps(8, "leading").astype(int)
    alphas = np.append(ALPHAS_CUMPROD[chosen], ALPHAS_CUMPROD[0])
    generator = np.random.default_rng(0)
    draws, x = generator.standard_normal((8, 5)), generator.standard_normal(5)
    levels = noise_levels("ddim", 8)
    np.testing.assert_allclose(levels, np.sqrt((1 - alphas) / alphas), rtol=1e-12)

    def epsilon(x: np.ndarray, step: int) -> np.ndarray:
        return 0.3 * x + np.sin(2 * x + step)

    steps = iter(range(8))

    def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
        return x - sigma * epsilon(x / np.sqrt(sigma**2 + 1), next(steps))

    scaled = x * np.sqrt(levels[0] ** 2 + 1)
    found = solve("ddim", denoise, scaled, levels, lambda step: draws[step], eta)
    for step, (a, b) in enumerate(zip(alphas, alphas[1:], strict=False)):
        spread = eta * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)
        noise = epsilon(x, step)
        predicted = (x - np.sqrt(1 - a) * noise) / np.sqrt(a)
        x = np.sqrt(b) * predicted + np.sqrt(1 - b - spread**2) * noise + spread * draws[step]
    np.testing.assert_allclose(found / np.sqrt(levels[-1] ** 2 + 1), x, rtol=1e-12)


def test_without_noise_ancestral_sampling_is_eulers_method() -> None:
    x = np.array([-9.0, 3.0, 12.0])
    levels = noise_levels("euler-a", 12)
    found = euler_ancestral(gaussian, x, levels, silence, eta=0.0)
    np.testing.assert_allclose(found, euler(gaussian, x, levels), rtol=1e-13)
    found = ddim(gaussian, x, levels, silence)
    np.testing.assert_allclose(found, euler(gaussian, x, levels), rtol=1e-13)


def test_ancestral_sampling_makes_the_spread_of_the_data() -> None:
    generator = np.random.default_rng(0)
    levels = karras_sigmas(200, SIGMAS[0], SIGMAS[-1])
    x = levels[0] * generator.standard_normal(20_000)

    def noise(step: int) -> np.ndarray:
        return generator.standard_normal(20_000)

    for eta in (0.3, 1.0):
        found = euler_ancestral(gaussian, x, levels, noise, eta)
        assert found.mean() == pytest.approx(MEAN, abs=0.02)
        assert found.std() == pytest.approx(SPREAD, rel=0.05)


@pytest.mark.parametrize(
    ("name", "eta", "asked"),
    [
        ("ddim", None, []),
        ("ddim", 0.5, [0, 1, 2, 3, 4]),
        ("euler-a", None, [0, 1, 2, 3]),  # nothing is added at σ = 0
        ("euler-a", 0.0, []),
        *((name, eta, []) for name in SOLVERS for eta in (None, 0.0) if SOLVERS[name].eta is None),
    ],
)
def test_noise_is_asked_for_by_step_where_it_is_added(
    name: str, eta: float | None, asked: list[int]
) -> None:
    calls = []

    def noise(step: int) -> np.ndarray:
        calls.append(step)
        return np.zeros(2)

    solve(name, gaussian, np.array([1.0, 2.0]), noise_levels(name, 5), noise, eta)
    assert calls == asked


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize("table", [SIGMAS, ZERO_TERMINAL], ids=["ordinary", "zero terminal"])
def test_the_exact_denoiser_of_one_point_ends_there(
    name: str, steps: int, table: np.ndarray
) -> None:
    target = np.full((1, 4, 2, 2), 0.5)
    for spacing in [None] if name in KARRAS else SPACINGS:
        levels = noise_levels(name, steps, table, spacing)
        assert levels.shape == (steps + 1,)
        x = target + levels[0]
        noise = np.ones_like(target)
        found = solve(name, lambda x, sigma: target, x, levels, lambda step, n=noise: n)
        assert np.isfinite(found).all()
        if spacing == "trailing":
            assert levels[0] == table[-1]
        # Of the noise, one σ of the last level is left.
        np.testing.assert_allclose(found, target + levels[-1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_zero_terminal_table_gives_numbers(name: str) -> None:
    """From pure noise, for v-prediction; x₀ = x / (σ² + 1) − σ v / √(σ² + 1)."""
    levels = noise_levels(name, 10, ZERO_TERMINAL, None if name in KARRAS else "trailing")
    assert levels[0] == pytest.approx(4096, rel=1e-6)
    start, generator = np.array([-1.5, 0.3, 1.1]), np.random.default_rng(0)

    def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
        root = np.sqrt(sigma**2 + 1)
        return x / root**2 - sigma / root * np.tanh(x / root)

    x = start * np.sqrt(levels[0] ** 2 + 1)
    with np.errstate(all="raise"):
        found = solve(name, denoise, x, levels, lambda step: generator.standard_normal(3))
    assert np.isfinite(found).all()
    assert np.abs(found).max() < 10


def test_timesteps_of_every_spacing() -> None:
    leading, linspace, trailing = (timesteps(20, spacing) for spacing in SPACINGS)
    assert leading.tolist() == list(range(951, 0, -50))  # CompVis: range(0, 1000, 50) + 1
    assert trailing.tolist() == list(range(999, 0, -50))
    assert linspace[[0, 1, 2, -2, -1]].tolist() == [999, 946, 894, 53, 0]
    fractional = timesteps(20, "linspace", fractional=True)
    np.testing.assert_allclose(fractional, 999 - np.arange(20) * 999 / 19)
    assert timesteps(20, "linspace", drop_lowest=True)[[0, 1, -1]].tolist() == [999, 949, 50]
    assert timesteps(20, "leading", drop_lowest=True)[[0, 1, -1]].tolist() == [941, 894, 48]
    assert timesteps(20, "trailing", drop_lowest=True).tolist() == trailing.tolist()
    for steps in (1, 61, 998):
        for spacing in SPACINGS:
            for drop_lowest in (False, True):
                found = timesteps(steps, spacing, drop_lowest)
                assert len(found) == steps
                assert 0 <= found.min() <= found.max() <= 999
    assert timesteps(1, "linspace") == timesteps(1, "trailing") == 999


def test_levels_of_every_solver() -> None:
    for name in SPACED:
        for spacing in SPACINGS:
            levels = noise_levels(name, 10, spacing=spacing)
            assert levels[-1] == (SIGMAS[0] if name == "ddim" else 0)
            assert (np.diff(levels[:-1]) < 0).all()
    for name in KARRAS:
        np.testing.assert_array_equal(
            noise_levels(name, 10), karras_sigmas(10, SIGMAS[0], SIGMAS[-1])
        )
    expected = np.append(SIGMAS[range(951, 0, -50)], SIGMAS[0])
    np.testing.assert_array_equal(noise_levels("ddim", 20), expected)
    between = spaced_sigmas(np.array([0.25]))
    np.testing.assert_allclose(between, [0.75 * SIGMAS[0] + 0.25 * SIGMAS[1], 0])


def test_levels_of_karras() -> None:
    """Of k-diffusion, from the range of Stable Diffusion."""
    levels = karras_sigmas(20, SIGMAS[0], SIGMAS[-1])
    assert levels.shape == (21,)
    np.testing.assert_allclose(levels[:3], [14.6146, 11.7254, 9.3402], atol=6e-5)
    np.testing.assert_allclose(levels[-3:], [0.04848, 0.02917, 0], atol=6e-6)
    assert karras_sigmas(1, 0.1, 10.0).tolist() == pytest.approx([10, 0])
    np.testing.assert_allclose(karras_sigmas(3, 1.0, 3.0, rho=1), [3, 2, 1, 0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("dpm++2m", 0), "at least 1 step"),
        (("ddim", 10, SIGMAS, "middling"), "leading, linspace, trailing, not 'middling'"),
        (("dpm++2m", 1000), "1000 steps are too many"),
        (("unipc", 999, SIGMAS, "leading"), "999 steps are too many"),
        (("euler", 1000, SIGMAS, "leading"), "1000 steps are too many"),
        (("euler-karras", 10, SIGMAS, "trailing"), "euler-karras .* without trailing"),
    ],
)
def test_levels_that_do_not_exist(arguments: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        noise_levels(*arguments)


def test_eta_of_a_solver_without_noise() -> None:
    with pytest.raises(ValueError, match="unipc adds no noise: eta must be 0"):
        solve("unipc", gaussian, np.ones(1), noise_levels("unipc", 3), silence, 0.5)


def test_names() -> None:
    titles = [solver.title for solver in SOLVERS.values()]
    assert len(set(titles)) == len(titles)
    for name, solver in SOLVERS.items():
        assert name.endswith("-karras") == solver.karras == solver.title.endswith(" Karras")


def test_rescaled_guidance_has_the_spread_of_the_text() -> None:
    guided, conditional = np.random.default_rng(0).standard_normal((2, 3, 4, 8, 8))
    guided = guided * np.array([1, 4, 7.5])[:, None, None, None] + 0.5
    found = rescale_guidance(guided, conditional, 1.0)
    axes = (1, 2, 3)
    np.testing.assert_allclose(found.std(axes), conditional.std(axes), rtol=1e-12)
    np.testing.assert_array_equal(rescale_guidance(guided, conditional, 0.0), guided)
    half = rescale_guidance(guided, conditional, 0.5)
    np.testing.assert_allclose(half, (found + guided) / 2, rtol=1e-12)
    # Each sample by itself.
    alone = rescale_guidance(guided[1:2], conditional[1:2], 1.0)
    np.testing.assert_allclose(alone[0], found[1], rtol=1e-12)


def test_rescaled_guidance_without_a_spread_stays() -> None:
    guided = np.full((2, 4, 2, 2), 0.5)
    conditional = np.random.default_rng(0).standard_normal((2, 4, 2, 2))
    np.testing.assert_array_equal(rescale_guidance(guided, conditional, 0.7), guided)
