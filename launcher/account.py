"""Where the milliseconds of an Ascend step would go, from what is counted: operations at the rate
of the matrix unit, bytes at that of the memory. Each is the least that it can take: normalisations,
for instance, are counted as reading and writing half precision, though they compute in float32.

Nothing here was measured by this project: there was no NPU.
"""

from __future__ import annotations

from collections.abc import Mapping

from diffusion import flops
from diffusion.config import UNetConfig
from diffusion.flops import Level

PEAK = {"910A": 256e12, "A2": 313e12}
"""Operations a second of the matrix unit in half precision: Huawei at Hot Chips 31 (2019) for the
910, and of Atlas 800T A2, eight at 2.5 PFLOPS."""
BANDWIDTH = {"910A": 1.2e12, "A2": 1.6e12}
"""Bytes a second of the device's memory, from the same."""

# How often a number of a feature map goes through memory, forward and back, if each operator reads
# what it is given and writes what it makes, in multiples of the channels. A normalisation: 3, back
# 5. An activation: 2, back 3. A sum: 3. A transpose: 2.
RESNET_IN, RESNET = 3 + 2 + 5 + 3 + 3, 2 + 3 + 2 + 3 + 5 + 3
TRANSFORMER = (3 + 4 + 9 + 9 + 3 + 8 + 12) + (5 + 4 + 15 + 8 + 12 + 20)
"""GroupNorm, transposes around the blocks, three LayerNorms, residuals, the heads' transposes and
the gate, of four times the channels and eight before it."""
ADAPTER_IN, ADAPTER_OUT = 1 + 5, 4 + 2
"""An adapter: forward one pass over its input and four to add to the output; back two over the
output's gradient, one over the input and four to add to its gradient."""
ADAPTED = {"attention": (8, 8), "transformer": (8 + 2 + 1 + 4, 8 + 2 + 8 + 1)}
"""Widths of the inputs and of the outputs that adapters of a transformer have, in multiples of its
channels; those of text are far shorter than they are counted here."""
SIZE = 2
"""Bytes of a number."""
MATRICES = "attention's matrices"
SCORES = 4 + 7
"""Passes over an attention matrix: made, softmax, read; back its gradient made, dS of both, and
three products."""
PRODUCTS, PRODUCTS_FUSED = 3.0, 3.5
"""Products of attention in a step, in multiples of a forward pass: four in a backward pass, beside
two; the fused operator computes the scores once more there."""
FP32_SLOWDOWN = 4.0
"""An assumption: the matrix unit works in half precision, and float32 takes several passes."""


def attention_products(upcast: bool, fused: bool) -> float:
    """Of a step, in multiples of a forward pass in half precision."""
    if fused:
        return PRODUCTS_FUSED
    return PRODUCTS * (FP32_SLOWDOWN if upcast else 1.0)


def adapted(level: Level, targets: str) -> tuple[int, int]:
    """Widths of the inputs and of the outputs of all adapters of a block, in channels."""
    if level.kind == "transformer":
        inputs, outputs = ADAPTED["attention" if targets == "attention" else "transformer"]
        return inputs * level.channels, outputs * level.channels
    if targets == "convolution":
        return level.channels_in + level.channels, 2 * level.channels
    return 0, 0


def adapter_operations(level: Level, targets: str, rank: int) -> float:
    """Of a step, for one image: two thin products forward, four back. Those of a residual block
    begin with convolutions of 3 × 3."""
    inputs, outputs = adapted(level, targets)
    if level.kind == "resnet":
        inputs *= 9
    return 3 * 2.0 * rank * (inputs + outputs) * level.positions


def unet_step(
    config: UNetConfig,
    height: int,
    width: int,
    product: str,
    rank: int,
    targets: str = "attention",
    fused: bool = False,
) -> Mapping[str, float]:
    """Seconds, by kind, of a LoRA's forward and backward pass for one image of so many latents,
    in half precision. With `fused` attention none of its matrices is written."""
    rate, bandwidth = PEAK[product], BANDWIDTH[product]
    seconds = dict.fromkeys(("convolutions", "linear layers", "attention", "adapters"), 0.0)
    bytes_of = dict.fromkeys((MATRICES, "other activations"), 0.0)
    upcast = config.upcast_attention and not fused
    for level in flops.unet_levels(config, height, width):
        inputs, outputs = adapted(level, targets)
        moved = (ADAPTER_IN * inputs + ADAPTER_OUT * outputs) * level.positions * SIZE / bandwidth
        seconds["adapters"] += max(moved, adapter_operations(level, targets, rank) / rate)
        cost = flops.level(level, config.cross_attention_dim)
        if level.kind == "resnet":
            seconds["convolutions"] += 2 * cost.layers / rate
            passes = RESNET_IN * level.channels_in + RESNET * level.channels
            bytes_of["other activations"] += passes * level.positions * SIZE
            continue
        seconds["linear layers"] += 2 * cost.layers / rate
        products = attention_products(upcast, fused)
        seconds["attention"] += products * cost.attention / rate
        scores = level.heads * level.positions * (level.positions + flops.TOKENS)
        bytes_of[MATRICES] += 0.0 if fused else SCORES * scores * (4 if upcast else SIZE)
        numbers = level.channels * level.positions
        bytes_of["other activations"] += TRANSFORMER * numbers * SIZE
    whole = flops.unet(config, height, width)
    counted = sum(
        flops.level(level, config.cross_attention_dim).layers
        for level in flops.unet_levels(config, height, width)
    )
    seconds["convolutions"] += 2 * (whole.layers - counted) / rate
    return {**seconds, **{name: count / bandwidth for name, count in bytes_of.items()}}
