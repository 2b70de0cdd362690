"""Small networks with made-up weights: the same on both sides of a comparison.

A weight depends on its name and shape alone, so that no weight files are needed and a name that
differs is found at once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import numpy as np

from diffusion.config import (
    ModelConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
    load_model_config,
)
from diffusion.randomness import generator

RANK, ALPHA = 2, 3.0
CONTEXT = 24

UNETS = {
    "sd1": UNetConfig(
        block_out_channels=(16, 32, 32),
        cross_attention=(True, True, False),
        layers_per_block=2,
        attention_heads=(4, 4, 4),
        cross_attention_dim=CONTEXT,
        norm_num_groups=8,
    ),
    "sd2": UNetConfig(
        block_out_channels=(16, 32, 32),
        cross_attention=(True, True, False),
        layers_per_block=1,
        attention_heads=(2, 4, 8),
        cross_attention_dim=CONTEXT,
        use_linear_projection=True,
        norm_num_groups=8,
    ),
}
VAE = VAEConfig(
    block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, scaling_factor=0.5
)
TEXT_ENCODERS = {
    "sd1": TextEncoderConfig(
        hidden_size=CONTEXT,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="quick_gelu",
        pad_token_id=49407,
    ),
    "sd2": TextEncoderConfig(
        hidden_size=CONTEXT,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="gelu",
        pad_token_id=0,
    ),
}
MODEL = ModelConfig(
    prediction_type="v_prediction",
    resolution=16,
    unet=UNETS["sd2"],
    vae=VAE,
    text_encoder=TEXT_ENCODERS["sd1"],
)
PROMPTS = ("a photo of a cat", "an owl, at night")
STEPS, SCALE = 4, 4.0

TIMESTEPS = np.array([0, 1, 147, 354, 499, 999], np.int32)
SOLVER_STEPS = (8, 20)
ADAM = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "max_norm": 1.0}
ADAM_STEPS = 5


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The made-up value of a parameter, float32."""
    draw = generator(0, name).standard_normal(shape)
    if name.endswith("bias"):
        return (0.1 * draw).astype(np.float32)
    if len(shape) == 1:
        return (1 + 0.1 * draw).astype(np.float32)
    return (draw / math.sqrt(math.prod(shape[1:]))).astype(np.float32)


def array(name: str, *shape: int) -> np.ndarray:
    """A made-up input, float32."""
    return generator(1, name).standard_normal(shape).astype(np.float32)


def token_ids(pad: int) -> np.ndarray:
    """Two captions of different length, (2, 77) int32."""
    ids = np.full((2, 77), pad, np.int32)
    ids[0, :7] = [49406, 320, 1125, 539, 320, 2368, 49407]
    ids[1, :4] = [49406, 536, 3514, 49407]
    return ids


def digest(lines: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """sha256 over the sorted names and shapes of a network's parameters."""
    text = "".join(f"{name} {tuple(shape)}\n" for name, shape in sorted(lines))
    return hashlib.sha256(text.encode()).hexdigest()


def toy_prediction(x: np.ndarray, timestep: float) -> np.ndarray:
    """A smooth stand-in for the network: variance-preserving x and timestep → ε or v."""
    return 0.4 * x + 0.5 * np.sin(3 * x + timestep / 300)


def published(name: str) -> ModelConfig:
    """A full-size model."""
    return load_model_config(name)
