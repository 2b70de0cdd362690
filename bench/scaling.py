"""What a run would do on 1 to 1,024 devices, by simulation; writes the plots of docs/scaling.md.

    python -m bench.scaling

SD 1.5 at 512 × 512, LoRA of rank 4, four images on each 910B, with the constants of
launcher.estimate. A step ends when the slowest device's part and the all-reduce do; each device's
part varies from step to step (log-normal). Images come from object storage over each server's
network, or as cached latents.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from bench import turns
from diffusion import flops
from diffusion.config import load_model_config
from launcher import estimate

COMPUTE_SECONDS = 4 / (15.27 * estimate.CACHED_SPEEDUP)
GRADIENTS = {"LoRA of rank 4, 3.2 MB": 3.19e6, "all weights, 3.4 GB": 3.438e9}
DEVICES = [2**n for n in range(11)]
STEPS = 400
JITTER = (0.0, 0.02, 0.1)
"""Standard deviation of the logarithm of a device's time for a step."""
IMAGE_BYTES, LATENT_BYTES = 500e3, 2 * 4 * 64 * 64 * 4
"""A photograph; mean and deviation of its latents in float32."""
STORAGE_BYTES = 5e9
"""A second, of the storage for all servers together: an assumption."""
ENCODE_SECONDS = 1.117e12 / (15.27 * estimate.CACHED_SPEEDUP * 1.80e12)
"""Of one picture through the VAE, at the rate of training."""


_UNET = flops.unet(load_model_config("sd15").unet, 64, 64)
WHOLE_SECONDS = COMPUTE_SECONDS * (
    (3 * _UNET.layers + 3.5 * _UNET.attention) / (2 * _UNET.layers + 3.5 * _UNET.attention)
)
"""The same if all weights are trained: their gradients are a third pass."""


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
    return estimate.LATENCY_SECONDS * hops + 2 * size / estimate.NETWORK_BYTES


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


def most_from_storage(size: float) -> int:
    """Devices that the storage feeds with pictures of so many bytes."""
    return int(STORAGE_BYTES / size / (4 / COMPUTE_SECONDS))


def plot(lines: dict[str, list[float]]) -> str:
    """Efficiency over the number of devices as an SVG, on its own ground for any page."""
    width, height, left, bottom = 640, 360, 56, 44
    colours = ("#0b62a4", "#b8420f", "#4c7a1e", "#7a3b8f", "#666666")

    def place(index: float, value: float) -> str:
        x = left + index * (width - left - 190) / (len(DEVICES) - 1)
        return f"{x:.1f},{16 + (1 - value) * (height - 16 - bottom):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13" role="img">',
        "<title>Share of the speed of as many single devices</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(0, share).split(",")
        parts.append(f'<path d="M{x} {y}H{width - 190}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{left - 8}" y="{float(y) + 4}" text-anchor="end">{share:.0%}</text>'
        )
    for index, devices in enumerate(DEVICES):
        x, _ = place(index, 0).split(",")
        parts.append(f'<text x="{x}" y="{height - 24}" text-anchor="middle">{devices}</text>')
    middle = (left + width - 190) / 2
    parts.append(f'<text x="{middle}" y="{height - 6}" text-anchor="middle">devices</text>')
    for (name, values), colour in zip(lines.items(), colours, strict=True):
        points = " ".join(place(index, value) for index, value in enumerate(values))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        y = float(place(0, values[-1]).split(",")[1]) + 4
        parts.append(f'<text x="{width - 182}" y="{y:.1f}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("| devices | LoRA | images/s | one ring | all weights | jitter 2 % | jitter 10 % |")
    print("|---|---|---|---|---|---|---|")
    lora, whole = GRADIENTS.values()
    names = ("LoRA", "LoRA, one ring", "all weights", "LoRA, jitter 2 %", "LoRA, jitter 10 %")
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
    (turns.ROOT / "docs" / "scaling.svg").write_text(plot(lines), encoding="utf-8")
    for what, size in (("pictures", IMAGE_BYTES), ("latents", LATENT_BYTES)):
        print(f"storage of {STORAGE_BYTES / 1e9:g} GB/s feeds {most_from_storage(size):,} devices "
              f"with {what}")  # fmt: skip
    for devices in (1, 8, 64, 1024):
        hours = 1e6 * ENCODE_SECONDS / devices / 3600
        print(f"a million pictures are encoded on {devices:,} in {hours:.3g} h")


if __name__ == "__main__":
    main()
