"""The noise schedule of Stable Diffusion and what follows from it, as numpy functions.

Notation of Ho et al. (2020) and Salimans & Ho (2022): x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε and
v = √ᾱ_t ε − √(1 − ᾱ_t) x₀. The tables are float64: 1 − ᾱ₀ formed from a half-precision ᾱ is
wrong by 15 %.
"""

from __future__ import annotations

import numpy as np

TRAIN_TIMESTEPS = 1000

_BETAS = np.linspace(0.00085**0.5, 0.012**0.5, TRAIN_TIMESTEPS, dtype=np.float64) ** 2
ALPHAS_CUMPROD = np.cumprod(1 - _BETAS)
"""ᾱ_t for t = 0 … 999 ("scaled linear"; CompVis `v1-inference.yaml` calls it "linear")."""

SIGMAS = np.sqrt((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD)
"""σ_t of the variance-exploding form x_t / √ᾱ_t = x₀ + σ_t ε."""

for _table in (ALPHAS_CUMPROD, SIGMAS):
    _table.flags.writeable = False


def _coefficients(timesteps: np.ndarray, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """√ᾱ_t and √(1 − ᾱ_t), shaped (batch, 1, …)."""
    alphas = ALPHAS_CUMPROD[timesteps].reshape((-1,) + (1,) * (dimensions - 1))
    return np.sqrt(alphas), np.sqrt(1 - alphas)


def add_noise(latents: np.ndarray, noise: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """x_t, in the dtype of `latents`; `timesteps` (batch,) integers."""
    signal, spread = _coefficients(timesteps, latents.ndim)
    return (signal * latents + spread * noise).astype(latents.dtype)


def velocity(latents: np.ndarray, noise: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """v, the target of v-prediction, in the dtype of `latents`."""
    signal, spread = _coefficients(timesteps, latents.ndim)
    return (signal * noise - spread * latents).astype(latents.dtype)


def min_snr_weights(timesteps: np.ndarray, gamma: float | None, prediction_type: str) -> np.ndarray:
    """Loss weights (batch,) of min-SNR-γ (Hang et al., 2023); ones if `gamma` is None.

    min(SNR, γ) / SNR for ε-prediction, min(SNR, γ) / (SNR + 1) for v-prediction.
    """
    if gamma is None:
        return np.ones(len(timesteps), np.float32)
    snr = SIGMAS[timesteps] ** -2
    divisor = snr if prediction_type == "epsilon" else snr + 1
    return (np.minimum(snr, gamma) / divisor).astype(np.float32)
