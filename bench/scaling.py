"""What a run would do on 1 to 1,024 devices, by simulation; writes the plots of docs/scaling.md.

    python -m bench.scaling

SD 1.5 at 512 × 512, LoRA of rank 4, four images on each 910B, with the constants of
launcher.estimate. A step ends when the slowest device's part and the all-reduce do; each device's
part varies from step to step (log-normal). Images come from object storage over each server's
network, or as cached latents.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench import turns
from diffusion import flops
from diffusion.config import load_model_config
from launcher import account, estimate

COMPUTE_SECONDS = 4 / (15.27 * estimate.CACHED_SPEEDUP)
GRADIENTS = {"LoRA of rank 4, 3.2 MB": 3.19e6, "all of the UNet, 3.4 GB": 3.438e9}
DEVICES = [2**n for n in range(11)]
STEPS = 400
JITTER = (0.0, 0.02, 0.1)
"""Standard deviation of the logarithm of a device's time for a step."""
IMAGE_BYTES, CACHED_BYTES = 500e3, 2 * 4 * 64 * 64 * 4 + 77 * 768 * 4
"""A photograph; mean and deviation of its latents, and its caption's hidden states, in float32."""
STORAGE_BYTES = 5e9
"""A second, of the storage for all servers together: an assumption."""
ENCODE_SECONDS = 1.117e12 / estimate.RATES["A2"]
"""Of one picture through the VAE, at the rate of training."""
PICTURES = 1e6

_UNET = flops.unet(load_model_config("sd15").unet, 64, 64)
WHOLE_SECONDS = COMPUTE_SECONDS * (
    (3 * _UNET.layers + account.PRODUCTS * _UNET.attention)
    / (2 * _UNET.layers + account.PRODUCTS * _UNET.attention)
)
"""The same if all weights of the UNet are trained in half precision, as MindONE does: their
gradients are a third pass."""


@dataclass(frozen=True)
class Point:
    """A run on so many devices."""

    devices: int
    images_per_second: float
    efficiency: float


def ring_seconds(size: float, devices: int) -> float:
    """One ring through all devices, as fast as its slowest link."""
    if devices <= estimate.DEVICES_PER_SERVER:
        return estimate.allreduce_seconds(size, devices)
    # Latency grows with the number of hops; that of a server's ring is what was published.
    hops = (devices - 1) / (estimate.DEVICES_PER_SERVER - 1)
    return estimate.LATENCY_SECONDS * hops + 2 * size / estimate.NETWORK_BYTES["A2"]


def simulate(
    devices: int,
    size: float,
    jitter: float,
    ring: bool = False,
    compute: float = COMPUTE_SECONDS,
) -> Point:
    """The mean over some steps, of so many seconds without the all-reduce."""
    draw = np.random.default_rng(devices)
    factors = np.exp(draw.normal(-jitter * jitter / 2, jitter, (STEPS, devices)))
    slowest = compute * factors.max(1) if devices > 1 else np.full(STEPS, compute)
    reduce = ring_seconds(size, devices) if ring else estimate.allreduce_seconds(size, devices)
    speed = 4 * devices / float((slowest + reduce).mean())
    return Point(devices, speed, speed / devices / (4 / compute))


ENCODED_SECONDS = COMPUTE_SECONDS + 4 * ENCODE_SECONDS
"""Of a step that encodes its pictures."""


def most_from_storage(size: float, compute: float) -> int:
    """Devices that the storage feeds with pictures of so many bytes."""
    return int(STORAGE_BYTES / size / (4 / compute))


def fill_hours(devices: int) -> float:
    """Until all pictures are read from the storage, encoded, and their latents written there."""
    moved = PICTURES * (IMAGE_BYTES + CACHED_BYTES) / STORAGE_BYTES
    return max(PICTURES * ENCODE_SECONDS / devices, moved) / 3600


def fed(devices: int, size: float, compute: float) -> float:
    """Images a second of a LoRA whose pictures of so many bytes come from the storage."""
    lora, _ = GRADIENTS.values()
    speed = simulate(devices, lora, 0.0, compute=compute).images_per_second
    return min(speed, STORAGE_BYTES / size)


COLOURS = ("#0b62a4", "#b8420f", "#4c7a1e", "#7a3b8f", "#666666")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 64, 190, 16, 44
LINE = 16
"""Pixels from one label to the next, at the least."""


def plot(
    title: str, lines: Mapping[str, Sequence[float]], ticks: Mapping[float, str], log: bool = False
) -> str:
    """Values over the number of devices as an SVG, on its own ground for any page. The first and
    the last of the ticks are the ends of the axis."""
    shown = math.log10 if log else float
    low, high = shown(min(ticks)), shown(max(ticks))

    def x_of(index: int) -> float:
        return LEFT + index * (WIDTH - LEFT - RIGHT) / (len(DEVICES) - 1)

    def y_of(value: float) -> float:
        return TOP + (high - shown(value)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13" role="img">',
        f"<title>{title}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for value, text in ticks.items():
        y = y_of(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for index, devices in enumerate(DEVICES):
        place = f'x="{x_of(index):.1f}" y="{HEIGHT - 24}"'
        parts.append(f'<text {place} text-anchor="middle">{devices}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">devices</text>')
    coloured = list(zip(lines.items(), COLOURS[: len(lines)], strict=True))
    for (_, values), colour in coloured:
        points = " ".join(f"{x_of(i):.1f},{y_of(value):.1f}" for i, value in enumerate(values))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
    above = 0.0
    for (name, values), colour in sorted(coloured, key=lambda one: -one[0][1][-1]):
        above = max(above + LINE, y_of(values[-1]) + 4)
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{above:.1f}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def keep(name: str, svg: str) -> None:
    (turns.ROOT / "docs" / name).write_text(svg, encoding="utf-8")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("| devices | LoRA | images/s | one ring | all of the UNet | jitter 2 % | jitter 10 % |")
    print("|---|---|---|---|---|---|---|")
    lora, whole = GRADIENTS.values()
    names = ("LoRA", "LoRA, one ring", "all of the UNet", "LoRA, jitter 2 %", "LoRA, jitter 10 %")
    lines: dict[str, list[float]] = {name: [] for name in names}
    for devices in DEVICES:
        points = [
            simulate(devices, lora, 0.0),
            simulate(devices, lora, 0.0, ring=True),
            simulate(devices, whole, 0.0, compute=WHOLE_SECONDS),
            simulate(devices, lora, JITTER[1]),
            simulate(devices, lora, JITTER[2]),
        ]
        for values, point in zip(lines.values(), points, strict=True):
            values.append(point.efficiency)
        shares = [f"{point.efficiency:.0%}" for point in points]
        print(
            f"| {devices:,} | {shares[0]} | {points[0].images_per_second:,.0f} "
            f"| {' | '.join(shares[1:])} |"
        )
    shares_of = {0.0: "0%", 0.25: "25%", 0.5: "50%", 0.75: "75%", 1.0: "100%"}
    keep("scaling.svg", plot("Share of the speed of as many single devices", lines, shares_of))
    loading = {
        "a local cache": [fed(n, 1.0, COMPUTE_SECONDS) for n in DEVICES],
        "the cache in the storage": [fed(n, CACHED_BYTES, COMPUTE_SECONDS) for n in DEVICES],
        "photographs of 500 KB": [fed(n, IMAGE_BYTES, ENCODED_SECONDS) for n in DEVICES],
    }
    speeds = {10.0: "10", 100.0: "100", 1e3: "1,000", 1e4: "10,000", 1e5: "100,000"}
    title = f"Images a second, from storage of {STORAGE_BYTES / 1e9:g} GB/s"
    keep("scaling-loading.svg", plot(title, loading, speeds, log=True))
    for what, size, compute in (
        ("photographs", IMAGE_BYTES, ENCODED_SECONDS),
        ("what is cached", CACHED_BYTES, COMPUTE_SECONDS),
    ):
        count = most_from_storage(size, compute)
        print(f"storage of {STORAGE_BYTES / 1e9:g} GB/s feeds {count:,} devices with {what}")
    filling = {
        "encoding, once": [fill_hours(n) for n in DEVICES],
        "an epoch of training": [
            PICTURES / fed(n, CACHED_BYTES, COMPUTE_SECONDS) / 3600 for n in DEVICES
        ],
    }
    ticks = {0.01: "36 s", 1 / 6: "10 min", 1.0: "1 h", 24.0: "1 day"}
    title = "Hours for a million pictures"
    keep("scaling-filling.svg", plot(title, filling, ticks, log=True))
    for devices, hours in zip(DEVICES, filling["encoding, once"], strict=True):
        print(f"a million pictures are encoded on {devices:,} in {hours:.3g} h")


if __name__ == "__main__":
    main()
