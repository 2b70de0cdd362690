"""What a run would take on Ascend, from its plan alone: time, memory, bytes on the wire.

Nothing here was measured by this project: there was no NPU. Each constant says what it comes from,
and the text of an estimate says that it is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.products import largest_device_id
from diffusion import flops
from diffusion.config import ModelConfig, load_model_config
from diffusion.flops import Level
from launcher import account
from registry.words import human_time
from trainer.config import RunConfig
from trainer.plan import Plan, run_precision
from weights.structure import text_encoder_shapes, unet_shapes, vae_shapes

CACHED_SPEEDUP = 1.4
"""From latents that are not encoded in every step: MosaicML's figure for SD 2 on A100."""
RATES = {"910A": 7.75 * CACHED_SPEEDUP * 1.74e12, "A2": 15.27 * CACHED_SPEEDUP * 1.74e12}
"""Operations a second that a device comes to in half precision. MindONE's benchmark.md has 7.75 and
15.27 images/s for a LoRA of SD 1.5 at 512 × 512, batch 4, on one device (MindSpore 2.1 and 2.3),
with VAE and text encoder in every step; without them an image costs 1.74e12 operations here, with
adapters of rank 4, which is taken to be theirs. The same table's SD 2.1 at 768 × 768 with fused
attention comes to 1.5 times as many a second on A2."""
LEAST_SECONDS = 0.02
"""An assumption: the four thousand operators of a pass are not started in less, five microseconds
each."""
NAMES = {"910A": "910A", "A2": "910B (A2)"}
MEMORY = {"910A": 32e9, "A2": 64e9}
"""Of a device, by the data sheets of Atlas 800 (9000) and Atlas 800T A2."""
LATENCY_SECONDS = 5e-3
"""By which a step of MindONE's LoRA was longer on eight 910B than on one: 262 and 267 ms. That of
the 910A is taken to be the same: there the published figures contradict each other."""
SERVER_BYTES = 100e9
"""A second, of one device's all-reduce in a server: what a full fine-tune of SD 1.5's UNet there
(3.4 GB, 318 ms instead of 253 ms on eight) leaves after that latency; of a 910A an assumption."""
ROUNDS_IN_SERVER = 3
"""Of halving and doubling among eight, which that latency is taken to be of: an assumption."""
NETWORK_BYTES = {"910A": 12.5e9, "A2": 25e9}
"""A second, between servers, for each device: 100 and 200 Gbit/s of RoCE, by the data sheets of
Atlas 800 (9000) and Atlas 800T A2."""
DEVICES_PER_SERVER = 8
"""Of 910A and A2; there are some of A2 with sixteen."""
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
    """What one device puts into the all-reduce of a step; 0 if it is alone."""
    images_per_second: float
    hours: float | None
    """Of training, without compiling, encoding into caches, validation, pictures and evaluation;
    None if the number of images is not known."""
    memory_bytes: float
    """Of a device."""
    parts: Mapping[str, float]
    """Of the memory, in bytes."""
    account: Mapping[str, float]
    """Of a step, in seconds: what each kind of work takes at the least, the all-reduce, and what
    that leaves of the whole. Empty if a step is more than a pass of a LoRA through the UNet in half
    precision, or too small."""
    precision: str
    too_small: bool
    """Is there so little to compute that starting it takes longer? Then a step takes at least what
    is said here."""
    fused: Estimate | None = None
    """The same with flash_attention, where that is possible and not asked for."""

    @property
    def fits(self) -> bool:
        """Is the memory there?"""
        return self.memory_bytes <= MEMORY[self.product]


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
    found = [
        estimate(config, plan, one, plan.devices, servers)
        for one in RATES
        if product in (None, one)
    ]
    fused = config.model_copy(update={"flash_attention": True})
    return [
        replace(one, fused=estimate(fused, plan, one.product, plan.devices, servers))
        if one.account and not config.flash_attention and one.product != "910A"
        else one
        for one in found
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
    rate = RATES[product] / (account.FP32_SLOWDOWN if plan.precision == "fp32" else 1.0)
    share = plan.micro_batch * plan.accumulation
    compute = share * work / seen / rate
    if config.flash_attention:  # the published figures were without
        compute -= _counted(config, plan, model, product, False).get(account.MATRICES, 0.0)
    counted = _counted(config, plan, model, product, config.flash_attention)
    servers = max(servers, math.ceil(devices / (largest_device_id(product) + 1)))
    least = LEAST_SECONDS * plan.accumulation
    too_small = compute < least
    compute = max(compute, least)
    synced = 4 * ((plan.trained_parameters or 0) + 2)
    reduce = allreduce_seconds(synced, devices, servers, product)
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
        {}
        if too_small or not counted
        else {
            **counted,
            "everything else": max(0.0, compute - sum(counted.values())),
            "all-reduce": reduce,
        },
        plan.precision,
        too_small,
    )


def _counted(
    config: RunConfig, plan: Plan, model: ModelConfig, product: str, fused: bool
) -> dict[str, float]:
    """Seconds of a step by kind of work, with `fused` attention or without; empty if the step is
    not a plain one."""
    more = config.train == "all" or config.gradient_checkpointing or any(_encoded(config))
    if more or plan.precision == "fp32":
        return {}
    found: dict[str, float] = {}
    seen = sum(count for *_, count in plan.shapes)
    images = plan.micro_batch * plan.accumulation
    for width, height, count in plan.shapes:
        latents = height // model.vae.factor, width // model.vae.factor
        lora = config.lora
        kinds = account.unet_step(model.unet, *latents, product, lora.rank, lora.targets, fused)
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
    upcast = model.unet.upcast_attention and plan.precision != "fp32"
    products = account.attention_products(upcast, config.flash_attention)
    unet = whole * costs["unet"].layers + products * costs["unet"].attention
    if config.gradient_checkpointing:
        unet += costs["unet"].total
    if config.train != "all":
        sides = pixels[0] // model.vae.factor, pixels[1] // model.vae.factor
        unet += sum(
            account.adapter_operations(level, config.lora.targets, config.lora.rank)
            for level in flops.unet_levels(model.unet, *sides)
        )
    text, images = _encoded(config)
    if text:
        trained = config.train == "all" or config.lora.text_encoder
        unet += (whole if trained else 1) * costs["text_encoder"].total
    if images:
        unet += costs["vae"].total
    return unet


def _encoded(config: RunConfig) -> tuple[bool, bool]:
    """Does every step encode captions, and images?"""
    without = config.cache is None
    trained = config.train == "all" or config.lora.text_encoder
    text = trained or without or config.data.shuffle_captions
    return text, without or config.data.crop == "random"


def allreduce_seconds(
    size: float, devices: int, servers: int | None = None, product: str = "A2"
) -> float:
    """Of `size` bytes on each device: within a server, then each device's part between servers,
    whose number of rounds grows as the logarithm (HCCL's H-D_R and NHR, of which it chooses).

    None is as many servers as so many devices make.
    """
    if devices == 1:
        return 0.0
    if servers is None:
        servers = math.ceil(devices / DEVICES_PER_SERVER)
    local = devices / servers
    seconds = LATENCY_SECONDS + 2 * (local - 1) / local * size / SERVER_BYTES
    if servers > 1:
        part = 2 * (servers - 1) / servers * size / local / NETWORK_BYTES[product]
        seconds += LATENCY_SECONDS * math.log2(servers) / ROUNDS_IN_SERVER + part
    return seconds


def memory(config: RunConfig, plan: Plan, model: ModelConfig) -> dict[str, float]:
    """Bytes on a device, by what they are for."""
    size = 4 if plan.precision == "fp32" else 2
    text, images = _encoded(config)
    frozen = 0 if config.train == "all" else size * _count(unet_shapes(model.unet))
    if text and config.train != "all":
        frozen += size * _count(text_encoder_shapes(model.text_encoder))
    if images:  # it is float32 in any case
        frozen += 4 * _count(vae_shapes(model.vae))
    width, height, _ = max(plan.shapes, key=lambda shape: shape[0] * shape[1])
    factor = model.vae.factor
    levels = list(flops.unet_levels(model.unet, height // factor, width // factor))
    kept = sum(_kept(level, config) for level in levels)
    matrices = [
        level.heads * level.positions * (level.positions + flops.TOKENS) for level in levels
    ]
    # The probabilities of all blocks, or of the one that is computed again, and two to work in.
    scores = (max if config.gradient_checkpointing else sum)(matrices) + 2 * max(matrices)
    batch = plan.micro_batch
    # float32: weights, gradient, what is all-reduced, two moments, and perhaps their average.
    trained = (6 if config.optimizer.ema_decay else 5) * 4 * (plan.trained_parameters or 0)
    scores *= 4 if model.unet.upcast_attention else size
    return {
        "weights": float(frozen),
        "trained": float(trained),
        "activations": float(size * batch * kept),
        "attention": 0.0 if config.flash_attention else float(batch * scores),
        "other": OTHER_BYTES,
    }


def _kept(level: Level, config: RunConfig) -> float:
    """Numbers that a block keeps for its backward pass, for one image.

    Normalisations, activations, the gate, attention and the adapters need what they were given:
    the widths of all these in multiples of the channels. A frozen layer does not; one that is
    trained does.
    """
    if config.gradient_checkpointing:
        return float(level.channels_in * level.positions)
    whole = config.train == "all"
    if level.kind == "resnet":
        return (3.0 if whole else 2.0) * (level.channels_in + level.channels) * level.positions
    inputs = 2 + 1 + 1 + 1 + 4 if whole else 0  # ahead of in, out, q to v twice, the feed-forward
    return (1 + 3 + 2 + 4 + 2 + 8 + 4 + inputs) * float(level.channels * level.positions)


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


TOO_MUCH = (
    "too much: a smaller micro_batch, gradient_checkpointing=true or, on a 910B, "
    "flash_attention=true takes less"
)


def text(found: list[Estimate]) -> str:
    """A table, and what it is worth."""
    if not found:
        return "estimate\n  not known: nothing was published of that product"
    rows = [("", "step", "images/s", "training", "memory a device", "all-reduce a step")]
    for one in found:
        least, most = ("≥ ", "≤ ") if one.too_small else ("", "")
        room = "" if one.fits else f" of {MEMORY[one.product] / 1e9:.0f}"
        speed, size = one.images_per_second, one.allreduce_bytes
        sent = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
        rows.append(
            (
                f"{one.devices} × {NAMES[one.product]}, {one.precision}",
                f"{least}{1000 * one.step_seconds:,.0f} ms",
                f"{most}{speed:,.0f}" if speed >= 10 else f"{most}{speed:.2g}",
                "-" if one.hours is None else f"{least}{human_time(3600 * one.hours)}",
                f"{one.memory_bytes / 1e9:.1f}{room} GB",
                f"{sent}, {1000 * one.allreduce_seconds:.1f} ms" if size else "none",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for one in found:
        if one.account:
            shares = (f"{name} {1000 * seconds:.0f}" for name, seconds in one.account.items())
            lines.append(f"ms of {NAMES[one.product]}, all but the last two at the least: "
                         f"{', '.join(shares)}")  # fmt: skip
        if one.fused is not None:
            lines.append(
                f"with flash_attention=true: {1000 * one.fused.step_seconds:,.0f} ms, "
                f"{one.fused.memory_bytes / 1e9:.1f} GB"
            )
        if not one.fits:
            lines.append(f"{NAMES[one.product]}: {TOO_MUCH}")
    if any(one.too_small for one in found):
        lines.append("≥: so little to compute that starting the operators takes longer")
    if any(one.hours is None for one in found):
        lines.append(
            "the images are not at hand: squares of the config's resolution are assumed, and how "
            "long training takes is said with --set epochs=null --set images=N, the samples in all"
        )
    else:
        lines.append(
            "training: without compiling, encoding into caches, validation, pictures and evaluation"
        )
    title = (
        "estimate, from operations and figures published for another program: this project had no "
        "NPU to measure on"
    )
    return "\n  ".join([title, *lines])


def as_json(found: list[Estimate]) -> list[dict[str, Any]]:
    """The same as plain values."""
    return [
        {**asdict(one), "fits": one.fits, "device_memory_bytes": MEMORY[one.product]}
        for one in found
    ]
