"""A training step of a LoRA, beside diffusers and PEFT: same network, batch, precision, threads.

    python -m bench.training_step [--size small quarter full] [--compiled]

Both sides get noisy latents, timesteps and hidden states, run forward and backward, clip the
gradient and let AdamW follow it. The step's values are waited for, as logging does. The first step,
with whatever compiles, is told apart. What the processor can do at most, a large matrix product and
a copy, is measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import turns
from diffusion import flops
from diffusion.config import ModelConfig, load_model_config

RANK = 4
SIZES = {"small": (4, 16), "quarter": (2, 32), "full": (1, 32)}
"""Images and width of the latents."""
STEPS = {"small": 12, "quarter": 5, "full": 1}
"""Of a round."""
GOALS = {"small": 0.8, "quarter": 0.8}
ANCESTOR_SECONDS, ANCESTOR_FIRST_SECONDS = 0.4, 157.0
"""Of MindONE's trainer at widths as tiny as the small base's, with MindSpore 2.7 on another CPU:
the shorter of its steps, which took up to 0.56 s, and the first one, with compiling."""


def model_of(size: str) -> ModelConfig:
    """The small base, or SD 1.5 as it is or with a quarter of its channels, in 16 groups."""
    if size == "small":
        return load_model_config("emoji")
    model = load_model_config("sd15")
    if size == "quarter":
        channels = tuple(width // 4 for width in model.unet.block_out_channels)
        narrow = {"block_out_channels": channels, "norm_num_groups": 16}
        unet = model.unet.model_copy(update=narrow)
        model = model.model_copy(update={"unet": unet})
    return model


def inputs(size: str) -> dict[str, np.ndarray]:
    """A batch of made up values."""
    batch, width = SIZES[size]
    draw = np.random.default_rng(0)
    context = model_of(size).unet.cross_attention_dim
    return {
        "noisy": draw.standard_normal((batch, 4, width, width), np.float32),
        "timesteps": draw.integers(0, 1000, batch).astype(np.int32),
        "text": draw.standard_normal((batch, 77, context), np.float32),
        "target": draw.standard_normal((batch, 4, width, width), np.float32),
    }


def ours(size: str) -> tuple[Any, Callable[[str], Any]]:
    """The step of trainer, as a rank runs it."""
    begun = time.monotonic()
    import mindspore as ms

    from diffusion.lora import inject, lora_parameters
    from diffusion.models import build, compile_graphs, transform_convolutions
    from trainer.batches import Batch
    from trainer.config import OptimizerConfig
    from trainer.optimizer import make_optimizer
    from trainer.step import DiffusionLoss, TrainStep, outcome

    compile_graphs()
    ms.set_device("CPU")
    unet = transform_convolutions(build(model_of(size), "unet"))
    inject(unet, "attention", RANK, float(RANK), 0, None)
    trained = {"unet": lora_parameters(unet)}
    loss = DiffusionLoss(unet, None)
    step = TrainStep(loss, make_optimizer(trained, OptimizerConfig()), [], 1, 1)
    values = inputs(size)
    batch = Batch(**values, weights=np.ones_like(values["target"]))
    loaded = time.monotonic() - begun
    outcome(step([batch], 1e-4))
    first = time.monotonic() - begun - loaded

    def seconds(count: str) -> Any:
        found = []
        for _ in range(int(count)):
            start = time.monotonic()
            outcome(step([batch], 1e-4))
            found.append(time.monotonic() - start)
        return {"seconds": statistics.median(found), "memory": turns.peak_memory()}

    return {"first_seconds": first, "loaded_seconds": loaded}, seconds


def theirs(size: str, compiled: bool) -> tuple[Any, Callable[[str], Any]]:
    """diffusers' network, PEFT's adapters, PyTorch's AdamW."""
    begun = time.monotonic()
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # the first step of ours has none either
    import torch
    from peft import LoraConfig

    from tests.parity import make_golden

    torch.set_num_threads(2)
    torch.manual_seed(0)
    unet = make_golden.unet(model_of(size).unet)
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-2)
    given = {key: torch.from_numpy(value) for key, value in inputs(size).items()}
    network = torch.compile(unet) if compiled else unet

    def step() -> float:
        predicted = network(given["noisy"], given["timesteps"].long(), given["text"]).sample
        loss = torch.nn.functional.mse_loss(predicted, given["target"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    loaded = time.monotonic() - begun
    step()
    first = time.monotonic() - begun - loaded
    step()

    def seconds(count: str) -> Any:
        if count == "limits":
            return limits()
        found = []
        for _ in range(int(count)):
            start = time.monotonic()
            step()
            found.append(time.monotonic() - start)
        return {"seconds": statistics.median(found), "memory": turns.peak_memory()}

    return {"first_seconds": first, "loaded_seconds": loaded}, seconds


def limits() -> Any:
    """Operations and bytes a second: of a product of 2048², and of a copy of 256 MB."""
    import torch

    factor, long = torch.rand(2048, 2048), torch.rand(1 << 26)
    target = torch.empty_like(long)
    times: dict[str, list[float]] = {"operations": [], "bytes": []}
    ways = {"operations": lambda: factor @ factor, "bytes": lambda: target.copy_(long)}
    for _ in range(6):
        for name, way in ways.items():
            start = time.monotonic()
            way()
            times[name].append(time.monotonic() - start)
    return {
        "operations": 2 * 2048**3 / statistics.median(times["operations"]),
        "bytes": 2 * 4 * (1 << 26) / statistics.median(times["bytes"]),
    }


def operations(size: str) -> float:
    """Of a step; backward passes cost a forward one, those of attention four products for two."""
    batch, width = SIZES[size]
    cost = flops.unet(model_of(size).unet, width, width)
    return batch * (2 * cost.layers + 3 * cost.attention)


def compare(size: str, compiled: bool, rounds: int) -> list[turns.Figure]:
    """Time of a step, of the first one, and memory."""
    sides = {
        "ours": turns.Side("training_step", "--side", "ours", "--size", size),
        "diffusers": turns.Side("training_step", "--side", "diffusers", "--size", size),
    }
    if compiled:
        sides["compiled"] = turns.Side("training_step", "--side", "compiled", "--size", size)
    found = turns.in_turns(sides, rounds, str(STEPS[size]))
    most = sides["diffusers"].ask("limits")
    for side in sides.values():
        side.end()
    times = {name: [one["seconds"] for one in answers] for name, answers in found.items()}
    peak = {name: answers[-1]["memory"] / 1e9 for name, answers in found.items()}
    batch, width = SIZES[size]
    what = f"{size}, {batch} × {8 * width}²" if size != "small" else f"small, {batch} × 64²"
    figures = [
        turns.figure(
            f"training step, {what}",
            times["ours"],
            times["diffusers"],
            "s",
            "diffusers + PEFT",
            GOALS.get(size),
        )
    ]
    figures.append(
        turns.Figure(
            f"training step, {what}, at the processor's rate",
            statistics.median(times["ours"]),
            operations(size) / most["operations"],
            "s",
            f"its operations at {most['operations'] / 1e9:.0f} GFLOP/s, those of a 2048² product "
            f"(a copy: {most['bytes'] / 1e9:.0f} GB/s)",
        )
    )
    if size == "small":
        peer = "MindONE's trainer at such widths, on another machine"
        step, first = statistics.median(times["ours"]), sides["ours"].ready["first_seconds"]
        figures += [
            turns.Figure(
                "training step, small, and MindONE's", step, ANCESTOR_SECONDS, "s", peer, 0.33
            ),
            turns.Figure(
                "first step, small, and MindONE's", first, ANCESTOR_FIRST_SECONDS, "s", peer, 0.15
            ),
        ]
    if compiled:
        name = f"training step, {what}, compiled"
        peer = "the same under torch.compile"
        goal = 1.0 if size in GOALS else None
        figures.append(turns.figure(name, times["ours"], times["compiled"], "s", peer, goal))
        first = {name: side.ready["first_seconds"] for name, side in sides.items()}
        figures.append(
            turns.Figure(f"first step, {what}", first["ours"], first["compiled"], "s", peer)
        )
    figures.append(
        turns.Figure(
            f"memory, {what}",
            peak["ours"],
            peak["diffusers"],
            "GB",
            "diffusers + PEFT",
            1.0 if size == "full" else None,
        )
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=["ours", "diffusers", "compiled"])
    parser.add_argument("--size", nargs="+", choices=[*SIZES], default=["small", "quarter"])
    parser.add_argument("--compiled", action="store_true", help="torch.compile as well")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.side:
        size = given.size[0]
        turns.serve(
            lambda: ours(size) if given.side == "ours" else theirs(size, given.side == "compiled")
        )
        sys.exit()
    for size in given.size:
        figures = compare(size, given.compiled, given.rounds)
        turns.show(figures)
        turns.keep(figures)


if __name__ == "__main__":
    main()
