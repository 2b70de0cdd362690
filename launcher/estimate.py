"""What a run would take on Ascend, from its plan alone: time, memory, bytes on the wire.

Nothing here was measured by this project: there was no NPU. Each constant says what it comes from,
and the text of an estimate says that it is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from diffusion import flops
from diffusion.config import ModelConfig, load_model_config
from diffusion.flops import Level
from launcher import account
from registry.words import human_time
from trainer.config import RunConfig
from trainer.plan import Plan, run_precision
from weights.structure import text_encoder_shapes, unet_shapes

CACHED_SPEEDUP = 1.4
"""From latents that are not encoded in every step: MosaicML's figure for SD 2 on A100."""
RATES = {"910A": 7.75 * CACHED_SPEEDUP * 1.73e12, "A2": 15.27 * CACHED_SPEEDUP * 1.73e12}
"""Operations a second that a device comes to in half precision. MindONE's benchmark.md has 7.75 and
15.27 images/s for a LoRA of SD 1.5 at 512 × 512, batch 4, on one device (MindSpore 2.1 and 2.3),
with VAE and text encoder in every step; without them an image costs 1.73e12 operations here. The
same table's SD 2.1 at 768 × 768 with fused attention comes to 1.5 times as many a second on A2."""
LEAST_SECONDS = 0.02
"""An assumption: the four thousand operators of a step are not started in less. Below it a step's
time does not follow from its operations."""
NAMES = {"910A": "910A", "A2": "910B (A2)"}
FP32_SLOWDOWN = 4.0
"""An assumption: the matrix unit works in half precision, and float32 takes several passes."""
MEMORY = {"910A": 32e9, "A2": 64e9}
LATENCY_SECONDS = 5e-3
"""By which a step of MindONE's LoRA was longer on eight 910B than on one: 262 and 267 ms."""
SERVER_BYTES = 100e9
"""A second, of one device's all-reduce in a server: what a full fine-tune of SD 1.5 there (3.4 GB,
318 ms instead of 253 ms on eight) leaves after that latency."""
ROUNDS_IN_SERVER = 3
"""Of halving and doubling among eight, which that latency is taken to be of: an assumption."""
NETWORK_BYTES = 25e9
"""A second, between servers: 200 Gbit/s of RoCE for each device of an Atlas 800T A2."""
DEVICES_PER_SERVER = 8
OTHER_BYTES = 3e9
"""An assumption: runtime, compiled graphs and workspaces."""


@dataclass(frozen=True)
class Estimate:
    """A run on so many devices of a product."""

    product: str
    devices: int
    step_seconds: float
    compute_seconds: float
    """Of a step: forward and backward passes."""
    allreduce_seconds: float
    allreduce_bytes: int
    """What one device puts into the all-reduce of a step."""
    images_per_second: float
    hours: float | None
    """Of training, without encoding into caches and compiling; None if the number of images is not
    known."""
    memory_bytes: float
    """Of a device."""
    parts: Mapping[str, float]
    """Of the memory, in bytes."""
    account: Mapping[str, float]
    """Of a step, in seconds: what each kind of work takes at the least, the all-reduce, and what
    that leaves of the whole. Empty if a step is more than one pass of a LoRA in half precision."""
    precision: str

    @property
    def fits(self) -> bool:
        """Is the memory there?"""
        return self.memory_bytes <= MEMORY[self.product]

    @property
    def too_small(self) -> bool:
        """Is there so little to compute that starting it takes longer?"""
        return self.compute_seconds < LEAST_SECONDS


def estimates(
    config: RunConfig, plan: Plan, product: str | None = None, servers: int = 1
) -> list[Estimate]:
    """The run as it is planned, on that product or on each; none if nothing was published of it.

    It is in the precision that it has on Ascend, wherever it is planned. Images that are not at
    hand are taken to be squares of the config's resolution.
    """
    model = load_model_config(plan.model)
    if not plan.shapes:
        side = config.data.resolution or model.resolution
        plan = replace(plan, shapes=((side, side, 1),))
    if plan.trained_parameters is None:
        trained = _count(unet_shapes(model.unet)) + _count(text_encoder_shapes(model.text_encoder))
        plan = replace(plan, trained_parameters=trained)
    plan = replace(plan, precision=run_precision(config, "Ascend"))
    return [
        estimate(config, plan, one, plan.devices, servers)
        for one in RATES
        if product in (None, one)
    ]


def estimate(
    config: RunConfig, plan: Plan, product: str, devices: int, servers: int = 1
) -> Estimate:
    """The planned run on so many devices, with the micro-batch that it has.

    On a 910A it is in float32 whatever is planned: in half precision it would be refused there.
    """
    if product == "910A":
        plan = replace(plan, precision="fp32")
        config = config.model_copy(update={"flash_attention": False})
    model = load_model_config(plan.model)
    seen = sum(count for *_, count in plan.shapes)
    work = sum(
        count * operations(config, plan, model, (height, width))
        for width, height, count in plan.shapes
    )
    rate = RATES[product] / (FP32_SLOWDOWN if plan.precision == "fp32" else 1.0)
    share = plan.micro_batch * plan.accumulation
    compute = share * work / seen / rate
    if config.flash_attention:  # the published figures were without
        compute -= _counted(config, plan, model, product, False).get(account.MATRICES, 0.0)
    counted = _counted(config, plan, model, product, config.flash_attention)
    synced = 4 * ((plan.trained_parameters or 0) + 2)
    reduce = allreduce_seconds(synced, devices, servers)
    speed = share * devices / (compute + reduce)
    parts = memory(config, plan, model)
    return Estimate(
        product,
        devices,
        compute + reduce,
        compute,
        reduce,
        synced if devices > 1 else 0,
        speed,
        plan.images / speed / 3600 if plan.images else None,
        sum(parts.values()),
        parts,
        counted
        and {
            **counted,
            "everything else": max(0.0, compute - sum(counted.values())),
            "all-reduce": reduce,
        },
        plan.precision,
    )


def _counted(
    config: RunConfig, plan: Plan, model: ModelConfig, product: str, fused: bool
) -> dict[str, float]:
    """Seconds of a step by kind of work, with `fused` attention or without; empty if the step is
    not a plain one."""
    if config.train == "all" or config.gradient_checkpointing or plan.precision == "fp32":
        return {}
    found: dict[str, float] = {}
    seen = sum(count for *_, count in plan.shapes)
    images = plan.micro_batch * plan.accumulation
    for width, height, count in plan.shapes:
        latents = height // model.vae.factor, width // model.vae.factor
        kinds = account.unet_step(model.unet, *latents, 2, product, config.lora.targets, fused)
        for name, seconds in kinds.items():
            found[name] = found.get(name, 0.0) + images * count / seen * seconds
    return {name: seconds for name, seconds in found.items() if seconds}


def operations(config: RunConfig, plan: Plan, model: ModelConfig, pixels: tuple[int, int]) -> float:
    """Of a training step, for one image of this height and width.

    Backward passes cost a forward one: no gradient of a frozen weight is computed. Those of
    attention have four products for two, and take the probabilities from the forward pass.
    """
    costs = flops.model(model, pixels)
    whole = 3.0 if config.train == "all" else 2.0
    products = account.PRODUCTS_FUSED if config.flash_attention else account.PRODUCTS
    unet = whole * costs["unet"].layers + products * costs["unet"].attention
    if config.gradient_checkpointing:
        unet += costs["unet"].total
    text = costs["text_encoder"].total
    if config.train == "all" or config.lora.text_encoder:
        unet += whole * text
    elif config.cache is None or config.data.shuffle_captions:
        unet += text
    if config.cache is None or config.data.crop == "random":
        unet += costs["vae"].total
    return unet


def allreduce_seconds(size: float, devices: int, servers: int = 1) -> float:
    """Of `size` bytes on each device: within a server, then each device's part between servers,
    whose number of rounds grows as the logarithm (HCCL's H-D_R and NHR, of which it chooses)."""
    if devices == 1:
        return 0.0
    servers = max(servers, math.ceil(devices / DEVICES_PER_SERVER))
    local = devices / servers
    seconds = LATENCY_SECONDS + 2 * (local - 1) / local * size / SERVER_BYTES
    if servers > 1:
        part = 2 * (servers - 1) / servers * size / local / NETWORK_BYTES
        seconds += LATENCY_SECONDS * math.log2(servers) / ROUNDS_IN_SERVER + part
    return seconds


def memory(config: RunConfig, plan: Plan, model: ModelConfig) -> dict[str, float]:
    """Bytes on a device, by what they are for."""
    size = 4 if plan.precision == "fp32" else 2
    in_step = _count(unet_shapes(model.unet))
    if config.train == "all" or config.lora.text_encoder or config.cache is None:
        in_step += _count(text_encoder_shapes(model.text_encoder))
    width, height, _ = max(plan.shapes, key=lambda shape: shape[0] * shape[1])
    factor = model.vae.factor
    levels = list(flops.unet_levels(model.unet, height // factor, width // factor))
    kept = sum(_kept(level, config.gradient_checkpointing) for level in levels)
    matrices = [
        level.heads * level.positions * (level.positions + flops.TOKENS) for level in levels
    ]
    # The probabilities of all blocks, or of the one that is computed again, and two to work in.
    scores = (max if config.gradient_checkpointing else sum)(matrices) + 2 * max(matrices)
    batch = plan.micro_batch
    # float32: weights, gradient, what is all-reduced, two moments, their average.
    trained = 6 * 4 * (plan.trained_parameters or 0)
    return {
        "weights": float(size * in_step),
        "trained": float(trained),
        "activations": float(size * batch * kept),
        "attention": 0.0 if config.flash_attention else float(size * batch * scores),
        "other": OTHER_BYTES,
    }


def _kept(level: Level, checkpointing: bool) -> float:
    """Numbers that a block keeps for its backward pass, for one image.

    A frozen layer needs none of its input. Normalisations, activations, the gate, attention and
    the adapters do: the widths of all these in multiples of the channels.
    """
    if checkpointing:
        return float(level.channels_in * level.positions)
    if level.kind == "resnet":
        return 2.0 * (level.channels_in + level.channels) * level.positions
    return (1 + 3 + 2 + 4 + 2 + 8 + 4) * float(level.channels * level.positions)


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def text(found: list[Estimate]) -> str:
    """A table, and what it is worth."""
    if not found:
        return "estimate\n  not known: nothing was published of that product"
    rows = [("", "step", "images/s", "training", "memory a device", "all-reduce a step")]
    for one in found:
        room = "" if one.fits else f", of {MEMORY[one.product] / 1e9:.0f} GB: too much"
        least, most = ("≥ ", "≤ ") if one.too_small else ("", "")
        speed = one.images_per_second
        training = "-" if one.hours is None else f"{least}{human_time(3600 * one.hours)}"
        rows.append(
            (
                f"{one.devices} × {NAMES[one.product]}, {one.precision}",
                f"{least}{1000 * one.step_seconds:.0f} ms",
                f"{most}{speed:,.0f}" if speed >= 10 else f"{most}{speed:.2g}",
                training,
                f"{one.memory_bytes / 1e9:.1f} GB{room}",
                f"{one.allreduce_bytes / 1e6:.3g} MB, {1000 * one.allreduce_seconds:.1f} ms",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    for one in found:
        if one.account and not one.too_small:
            shares = (f"{name} {1000 * seconds:.0f}" for name, seconds in one.account.items())
            lines.append(
                f"  ms of {NAMES[one.product]}, what is counted at the least: {', '.join(shares)}"
            )
    if any(one.too_small for one in found):
        lines.append("  ≥: so little to compute that starting the operators takes longer")
    if any(one.hours is None for one in found):
        lines.append("  how long training takes follows from the images, which are not at hand")
    return "\n".join(
        [
            "estimate, from operations and figures published for another program: no NPU was there "
            "to measure on",
            *lines,
        ]
    )


def as_json(found: list[Estimate]) -> list[dict[str, Any]]:
    """The same as plain values."""
    return [{**asdict(one), "fits": one.fits, "too_small": one.too_small} for one in found]
