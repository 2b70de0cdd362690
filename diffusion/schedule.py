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

_SMALLEST = 2.0**-24
"""Of ᾱ where σ is needed, as in diffusers: ᾱ = 0 would be an infinite σ, this is 4096."""


def sigmas(alphas_cumprod: np.ndarray) -> np.ndarray:
    """σ_t of the variance-exploding form x_t / √ᾱ_t = x₀ + σ_t ε."""
    alphas = np.maximum(alphas_cumprod, _SMALLEST)
    return np.sqrt((1 - alphas) / alphas)


SIGMAS = sigmas(ALPHAS_CUMPROD)

for _table in (ALPHAS_CUMPROD, SIGMAS):
    _table.flags.writeable = False


def zero_terminal(alphas_cumprod: np.ndarray) -> np.ndarray:
    """The schedule with ᾱ_T = 0 and the same ᾱ₀ (Lin et al., 2023, algorithm 1).

    √ᾱ is shifted and stretched. At ᾱ = 0 nothing of the latents is left in x_t, and ε-prediction
    has nothing to learn: for v-prediction only.
    """
    roots = np.sqrt(alphas_cumprod)
    return ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2


def _coefficients(
    timesteps: np.ndarray, dimensions: int, alphas_cumprod: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """√ᾱ_t and √(1 − ᾱ_t), shaped (batch, 1, …)."""
    alphas = alphas_cumprod[timesteps].reshape((-1,) + (1,) * (dimensions - 1))
    return np.sqrt(alphas), np.sqrt(1 - alphas)


def add_noise(
    latents: np.ndarray,
    noise: np.ndarray,
    timesteps: np.ndarray,
    alphas_cumprod: np.ndarray = ALPHAS_CUMPROD,
) -> np.ndarray:
    """x_t, in the dtype of `latents`; `timesteps` (batch,) integers."""
    signal, spread = _coefficients(timesteps, latents.ndim, alphas_cumprod)
    return (signal * latents + spread * noise).astype(latents.dtype)


def velocity(
    latents: np.ndarray,
    noise: np.ndarray,
    timesteps: np.ndarray,
    alphas_cumprod: np.ndarray = ALPHAS_CUMPROD,
) -> np.ndarray:
    """v, the target of v-prediction, in the dtype of `latents`."""
    signal, spread = _coefficients(timesteps, latents.ndim, alphas_cumprod)
    return (signal * noise - spread * latents).astype(latents.dtype)


def min_snr_weights(
    timesteps: np.ndarray,
    gamma: float | None,
    prediction_type: str,
    alphas_cumprod: np.ndarray = ALPHAS_CUMPROD,
) -> np.ndarray:
    """Loss weights (batch,) of min-SNR-γ (Hang et al., 2023); ones if `gamma` is None.

    min(SNR, γ) / SNR for ε-prediction, min(SNR, γ) / (SNR + 1) for v-prediction. Raises
    ValueError for ε-prediction at SNR 0.
    """
    if gamma is None:
        return np.ones(len(timesteps), np.float32)
    alphas = alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    if prediction_type != "epsilon":
        return (np.minimum(snr, gamma) / (snr + 1)).astype(np.float32)
    if not snr.all():
        raise ValueError("min-SNR weights of epsilon-prediction do not exist at SNR 0")
    return (np.minimum(snr, gamma) / snr).astype(np.float32)
