"""One model at its published size, with random weights: `python rehearsal.py MODEL FOLDER`.

Writes it in each form, reads each back, runs its networks at the model's own resolution and takes
one training step of a LoRA. Prints what was measured as JSON.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("GLOG_v", "3")

RESOLUTION = 512
RANK = 4


class Watch:
    """Seconds and the peak of this process's memory, by what was going on."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self.peaks: dict[str, float] = {}
        self.stopped = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while not self.stopped.wait(0.02):
            memory = resident()
            for name in ("RssAnon", "total"):
                self.peaks[name] = max(self.peaks.get(name, 0.0), memory[name])

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        self.peaks = resident()
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        self.found[what] = {
            "seconds": round(seconds, 1),
            "peak_gb": round(self.peaks["total"], 2),
            "peak_without_mapped_files_gb": round(self.peaks["RssAnon"], 2),
        }
        print(what, self.found[what], file=sys.stderr, flush=True)


def resident() -> dict[str, float]:
    """Memory of this process in GB: all of it, and what no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {k: int(v.split()[0]) / 1e6 for k, v in (line.split(":", 1) for line in lines)
             if k.startswith("Rss")}  # fmt: skip
    return {"RssAnon": found["RssAnon"], "total": sum(found.values())}


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Small enough that no activation overflows."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32)
        values *= 1 / np.sqrt(max(1, np.prod(shape[1:]))) if len(shape) > 1 else 0.02
        weights[name] = values + 1 if name.endswith(("norm.weight", "norm1.weight")) else values
    return weights


def write(model: str, folder: Path, watch: Watch) -> dict[str, Path]:
    """The model in each form."""
    from diffusion.config import load_model_config
    from weights import convert, files
    from weights.base import NETWORK_FILES, open_base
    from weights.structure import text_encoder_shapes, unet_shapes, vae_shapes

    config = load_model_config(model)
    paths = {
        "diffusers": folder / model,
        "original": folder / f"{model}.safetensors",
        "mindone": folder / f"{model}.ckpt",
    }
    shapes = {
        "unet": unet_shapes(config.unet),
        "vae": vae_shapes(config.vae),
        "text_encoder": text_encoder_shapes(config.text_encoder),
    }
    for number, (network, found) in enumerate(shapes.items()):
        files.dump(paths["diffusers"] / NETWORK_FILES[network], random_weights(found, number))
    scheduler = paths["diffusers"] / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir()
    scheduler.write_text(json.dumps({"prediction_type": config.prediction_type}))
    base = open_base(paths["diffusers"])
    for layout in ("original", "mindone"):
        with watch(f"write {layout}"):
            convert.write_base(paths[layout], base, layout, {})
    return paths


def fingerprints(path: Path) -> dict[str, str]:
    """A digest of each tensor in float32, by network and name."""
    from weights.base import open_base

    return {
        f"{network}.{name}": hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()
        for network, found in open_base(path).networks.items()
        for name, array in found.tensors()
    }


def load(model: str, paths: dict[str, Path], watch: Watch) -> dict[str, Any]:
    """Load every form into the networks; returns what was read of each, and the last networks."""
    from diffusion.config import recognise
    from diffusion.models import load as load_network
    from weights.base import open_base

    counts: dict[str, Any] = {}
    networks = {}
    for layout, path in paths.items():
        networks.clear()
        gc.collect()
        with watch(f"load {layout}"):
            base = open_base(path)
            _, config = recognise(base, model if layout == "mindone" else None)
            for name in base.networks:
                networks[name] = load_network(config, base, name)
        counts[layout] = {
            "read": base.tensors,
            "left_over": len(base.left_over),
            "not_needed": len(base.not_needed),
            "gb": round(sum(file.stat().st_size for file in base.files) / 1e9, 2),
        }
    return {"counts": counts, "networks": networks, "config": config}


def run(networks: dict[str, Any], config: Any, watch: Watch) -> dict[str, list[float]]:
    """Each network once, and one training step; returns a few numbers of each output."""
    import mindspore as ms
    from mindspore import Tensor

    from diffusion.lora import inject, lora_parameters
    from diffusion.models import transform_convolutions
    from trainer.batches import Batch
    from trainer.config import OptimizerConfig
    from trainer.data import Encode
    from trainer.optimizer import AdamW
    from trainer.step import DiffusionLoss, TrainStep

    rng = np.random.default_rng(0)
    size = RESOLUTION // config.vae.factor
    outputs: dict[str, list[float]] = {}

    def told(name: str, array: np.ndarray) -> np.ndarray:
        outputs[name] = [float(array.mean()), float(array.std()), *map(float, array.shape)]
        return array

    for name, network in networks.items():
        network.set_train(False)
        if name != "text_encoder":
            transform_convolutions(network)
    ids = np.full((1, 77), config.text_encoder.pad_token_id, np.int32)
    ids[0, :3] = 49406, 320, 49407
    with watch("text encoder"):
        text = told("text encoder", networks["text_encoder"](Tensor(ids)).asnumpy())
    latents = rng.standard_normal((1, 4, size, size), np.float32)
    with watch("VAE decoder"):
        told("VAE decoder", networks["vae"](Tensor(latents)).asnumpy())
    pixels = rng.uniform(-1, 1, (1, 3, RESOLUTION, RESOLUTION)).astype(np.float32)
    with watch("VAE encoder"):
        told("VAE encoder", Encode(networks["vae"])(Tensor(pixels)).asnumpy())
    del networks["vae"], networks["text_encoder"]
    gc.collect()
    unet = networks["unet"]
    timesteps = np.array([500], np.int32)
    with watch("UNet"):
        told("UNet", unet(*map(Tensor, (latents, timesteps, text))).asnumpy())

    inject(unet, "attention", RANK, RANK)
    parameters = lora_parameters(unet)
    step = TrainStep(DiffusionLoss(unet, None), AdamW(parameters, OptimizerConfig()), [], 1, 1)
    target = rng.standard_normal(latents.shape, np.float32)
    batch = Batch(latents, timesteps, text, target, np.ones_like(target))
    before = {p.name: p.asnumpy().copy() for p in parameters}
    with watch("training step, the first"):
        first = step([batch], 1e-3).asnumpy()
    with watch("training step, the second"):
        second = step([batch], 1e-3).asnumpy()
    outputs["training step"] = [*map(float, first), *map(float, second)]
    moved = sum(not np.array_equal(before[p.name], p.asnumpy()) for p in parameters)
    outputs["moved"] = [float(moved), float(len(parameters))]
    assert ms.get_context("mode") == ms.GRAPH_MODE
    return outputs


def main() -> None:
    from diffusion.models import compile_graphs

    model, folder = sys.argv[1], Path(sys.argv[2])
    compile_graphs()
    watch = Watch()
    try:
        paths = write(model, folder, watch)
        reference = fingerprints(paths["diffusers"])
        differing = {
            layout: [name for name, digest in fingerprints(path).items()
                     if reference.get(name) != digest]
            for layout, path in paths.items()
        }  # fmt: skip
        loaded = load(model, paths, watch)
    finally:
        shutil.rmtree(folder)
    outputs = run(loaded["networks"], loaded["config"], watch)
    watch.stopped.set()
    print(
        json.dumps(
            {
                "tensors": len(reference),
                "counts": loaded["counts"],
                "differing": differing,
                "measured": watch.found,
                "outputs": outputs,
            }
        )
    )


if __name__ == "__main__":
    main()
