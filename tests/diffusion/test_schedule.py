"""The schedule with a zero terminal signal-to-noise ratio (Lin et al., 2023)."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion import schedule
from diffusion.schedule import ALPHAS_CUMPROD, zero_terminal
from diffusion.solvers import dpm_solver_pp_2m, noise_levels

RESCALED = zero_terminal(ALPHAS_CUMPROD)


def test_it_ends_at_zero_and_begins_as_before() -> None:
    assert RESCALED[0] == pytest.approx(0.99915, abs=1e-10)
    assert RESCALED[0] == pytest.approx(ALPHAS_CUMPROD[0], rel=1e-12)
    assert RESCALED[-1] == 0
    assert (np.diff(RESCALED) < 0).all()


def test_it_is_that_of_betas_rescaled() -> None:
    """The published code goes through β: ᾱ → √ᾱ, rescaled, → α → β, and from there to ᾱ."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    roots = np.sqrt(np.cumprod(1 - betas))
    first, last = roots[0].copy(), roots[-1].copy()
    roots -= last
    roots *= first / (first - last)
    bars = roots**2
    alphas = np.concatenate([bars[:1], bars[1:] / bars[:-1]])
    np.testing.assert_allclose(np.cumprod(1 - (1 - alphas)), RESCALED, rtol=1e-9)


def test_nothing_is_left_of_the_latents_at_the_end() -> None:
    latents, noise = np.random.default_rng(0).standard_normal((2, 2, 4, 3, 3)).astype(np.float32)
    timesteps = np.array([999, 0])
    noisy = schedule.add_noise(latents, noise, timesteps, RESCALED)
    np.testing.assert_array_equal(noisy[0], noise[0])
    velocity = schedule.velocity(latents, noise, timesteps, RESCALED)
    np.testing.assert_array_equal(velocity[0], -latents[0])
    first = schedule.add_noise(latents, noise, timesteps)[1]
    np.testing.assert_allclose(noisy[1], first, rtol=1e-6)


def test_min_snr_at_zero_snr() -> None:
    weights = schedule.min_snr_weights(np.array([999, 500]), 5.0, "v_prediction", RESCALED)
    assert weights[0] == 0
    assert weights[1] == pytest.approx(RESCALED[500], rel=1e-6)
    with pytest.raises(ValueError, match="SNR 0"):
        schedule.min_snr_weights(np.array([999]), 5.0, "epsilon", RESCALED)
    assert schedule.min_snr_weights(np.array([999]), None, "epsilon", RESCALED) == 1


def test_a_solver_starts_at_a_sigma_that_is_finite() -> None:
    sigmas = schedule.sigmas(RESCALED)
    assert sigmas[-1] == pytest.approx(4096, rel=1e-6)
    np.testing.assert_array_equal(schedule.sigmas(ALPHAS_CUMPROD), schedule.SIGMAS)
    levels = noise_levels("dpm++2m", 10, sigmas)
    assert levels[0] == sigmas[-1]
    # With the exact denoiser of one point the solver ends there, wherever it starts.
    target = np.full((1, 4, 2, 2), 0.5)
    found = dpm_solver_pp_2m(lambda x, sigma: target, np.full_like(target, 4096.0), levels)
    np.testing.assert_allclose(found, target)
