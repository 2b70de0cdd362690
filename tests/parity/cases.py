"""Small networks with made-up weights: the same on both sides of a comparison.

A weight depends on its name and shape alone, so that no weight files are needed and a name that
differs is found at once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

import numpy as np

from diffusion.config import (
    ModelConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
    load_model_config,
)
from diffusion.randomness import generator
from weights.lora import Adapter, target_modules

RANK, ALPHA = 2, 3.0
CONTEXT = 24
EMOJI = load_model_config("emoji")
"""The model that comes with the project, with made-up weights too."""

UNETS = {
    "sd1": UNetConfig(
        block_out_channels=(16, 32),
        cross_attention=(True, False),
        layers_per_block=1,
        attention_heads=(4, 4),
        cross_attention_dim=CONTEXT,
        norm_num_groups=8,
    ),
    "sd2": UNetConfig(
        block_out_channels=(16, 32),
        cross_attention=(True, False),
        layers_per_block=2,
        attention_heads=(2, 8),
        cross_attention_dim=CONTEXT,
        use_linear_projection=True,
        norm_num_groups=8,
    ),
    "emoji": EMOJI.unet,
}
LATENTS = {"sd1": (2, 4, 8, 8), "sd2": (2, 4, 8, 8), "emoji": (2, 4, 16, 16)}
TRAINED = {"sd1": "transformer", "sd2": "attention", "emoji": "transformer"}
"""The LoRA targets of a training step: with `sd1`, convolutions are among them."""
JOINT = ("sd1", "emoji")
"""Where the text encoder is trained too, from token ids; elsewhere hidden states are given."""
PREDICTION_TYPES = ("epsilon", "v_prediction")

VAES = {
    "sd": VAEConfig(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, scaling_factor=0.5
    ),
    "emoji": EMOJI.vae,
}
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
    "emoji": EMOJI.text_encoder,
}
PROMPTS, NEGATIVE, SEEDS = ("a photo of a cat", "an owl, at night"), "blurry", (5, 6)
STEPS, SCALE = 4, 4.0

STEP_TIMESTEPS = np.array([60, 750], np.int32)
"""Signal-to-noise ratios on both sides of GAMMA."""
TIMESTEPS = np.array([0, 1, 147, 354, 499, 999], np.int32)
SOLVER_STEPS = (8, 20)
GAMMA = 5.0
ADAM = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-2, "weight_decay": 0.1, "max_norm": 0.2}
"""An epsilon as large as the clipped gradients: with a much smaller one the first update is their
sign, which rounding decides for the smallest of them."""
ADAM_STEPS = 5
SAMPLE = 1500
"""How many values of an array are kept."""


INTO_THE_STREAM = ("conv_in.weight", "conv2.weight", "proj_out.weight")
"""Small, so that a variance is small too and the epsilon of a normalisation is seen."""


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The made-up value of a parameter, float32.

    A LoRA as strong as this one changes the output by about half; a much stronger one saturates
    the attention, and single precision is then several digits away from double precision.
    """
    draw = generator(0, name).standard_normal(shape)
    if name.endswith(INTO_THE_STREAM):
        draw *= 0.1
    if name.endswith("lora_up.weight"):
        draw *= 0.3
    if name.endswith("bias"):
        return (0.1 * draw).astype(np.float32)
    if len(shape) == 1:
        return (1 + 0.1 * draw).astype(np.float32)
    return (draw / math.sqrt(math.prod(shape[1:]))).astype(np.float32)


def array(name: str, *shape: int) -> np.ndarray:
    """A made-up input, float32."""
    return generator(1, name).standard_normal(shape).astype(np.float32)


def images_and_latents(vae: str) -> tuple[np.ndarray, np.ndarray]:
    """What an autoencoder encodes and what it decodes, two of each."""
    side = {"sd": 8, "emoji": 16}[vae]
    pixels = side * VAES[vae].factor
    return array("images", 2, 3, pixels, pixels), array("latents", 2, 4, side, side)


def adapters(shapes: Mapping[str, tuple[int, ...]], targets: str) -> dict[str, Adapter]:
    """Made-up adapters for a network with parameters of these names and shapes."""
    found = {}
    for module in target_modules(shapes, targets):
        out, *rest = shapes[f"{module}.weight"]
        ones = (1,) * (len(rest) - 1)
        down = weight(f"{module}.lora_down.weight", (RANK, *rest))
        up = weight(f"{module}.lora_up.weight", (out, RANK, *ones))
        found[module] = Adapter(down, up, ALPHA)
    return found


def sketch(values: np.ndarray) -> np.ndarray:
    """What is kept of an array: a small one whole; of a large one a sample of the values, evenly
    spaced, and the root mean square of each sixteenth."""
    if values.size <= SAMPLE:
        return values
    flat = values.ravel()
    parts = np.array_split(flat.astype(np.float64), 16)
    roots = [math.sqrt((part**2).mean()) for part in parts]
    # An odd step, so that all rows and columns of an image are met.
    step = math.ceil(flat.size / SAMPLE) | 1
    return np.concatenate((flat[::step], roots)).astype(values.dtype)


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
