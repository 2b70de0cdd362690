"""LoRA as arrays: which modules it adapts, how many scalars it has, and its sum with the base.

A module's adapter is (down, up, alpha): ΔW = (alpha / rank) · up · down (Hu et al., 2021).
Module paths are those of diffusers and transformers weight files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from weights.files import WeightsError

_ATTENTION = r".*\.attn[12]\.to_(q|k|v|out\.0)"
_TRANSFORMER = rf"{_ATTENTION}|.*\.attentions\.\d+\.(proj_in|proj_out)|.*\.ff\.net\.(0\.proj|2)"
TARGETS = {
    "attention": re.compile(_ATTENTION),
    "transformer": re.compile(_TRANSFORMER),
    "text_encoder": re.compile(r".*\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"),
}
"""Which module paths each set of targets takes; `text_encoder` applies to that network."""


@dataclass(frozen=True)
class Adapter:
    """One module's LoRA: down (rank, in[, k, k]), up (out, rank[, 1, 1]) and alpha."""

    down: np.ndarray
    up: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> np.ndarray:
        """ΔW in float32, (out, in)."""
        up = self.up.reshape(self.up.shape[0], -1).astype(np.float32)
        down = self.down.reshape(self.rank, -1).astype(np.float32)
        return (self.alpha / self.rank) * (up @ down)


def target_modules(parameter_names: Iterable[str], targets: str) -> list[str]:
    """The module paths whose `.weight` is among the names and that `targets` takes, in order."""
    pattern = TARGETS[targets]
    modules = (name.removesuffix(".weight") for name in parameter_names if name.endswith(".weight"))
    return [module for module in modules if pattern.fullmatch(module)]


def adapter_size(shape: tuple[int, ...], rank: int) -> int:
    """Scalars in the adapter of a weight of this shape (out, in) or (out, in, 1, 1)."""
    return rank * (shape[0] + math.prod(shape[1:]))


def check_rank(module: str, shape: tuple[int, ...], rank: int) -> None:
    """Raise WeightsError if an adapter of this rank would be wider than the layer itself."""
    most = min(shape[0], math.prod(shape[1:]))
    if rank > most:
        raise WeightsError(
            f"lora.rank is {rank}, but {module} is only {shape[0]} × {math.prod(shape[1:])}; "
            f"use {most} or less"
        )


def merge(
    tensors: Mapping[str, np.ndarray], adapters: Mapping[str, Adapter], weight: float = 1.0
) -> dict[str, np.ndarray]:
    """The weights of the adapted modules with `weight` · ΔW added; only those are returned.

    Raises WeightsError if a module is not in `tensors` or its shape differs.
    """
    merged = {}
    for module, adapter in adapters.items():
        name = f"{module}.weight"
        if name not in tensors:
            raise WeightsError(
                f"the LoRA adapts {module}, which this base does not have; use the base it was "
                "trained on"
            )
        base = tensors[name]
        delta = adapter.delta()
        if delta.size != base.size or delta.shape[0] != base.shape[0]:
            raise WeightsError(
                f"the LoRA's {module} is {delta.shape}, this base's is {base.shape}; use the base "
                "it was trained on"
            )
        merged[name] = (base + weight * delta.reshape(base.shape)).astype(base.dtype)
    return merged
