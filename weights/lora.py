"""LoRA as arrays: which modules it adapts, how large it is, and its arithmetic.

A module's adapter is (down, up, alpha): ΔW = (alpha / rank) · up · down (Hu et al., 2021).
Module paths are those of diffusers and transformers weight files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from weights.files import WeightsError

_ATTENTION = r".*\.attn[12]\.to_(q|k|v|out\.0)"
_TRANSFORMER = rf"{_ATTENTION}|.*\.attentions\.\d+\.(proj_in|proj_out)|.*\.ff\.net\.(0\.proj|2)"
_RESIDUAL = r".*\.resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)"
_CONVOLUTION = rf"{_TRANSFORMER}|{_RESIDUAL}|.*\.(down|up)samplers\.0\.conv"
TARGETS = {
    "attention": re.compile(_ATTENTION),
    "transformer": re.compile(_TRANSFORMER),
    "convolution": re.compile(_CONVOLUTION),
    "text_encoder": re.compile(r".*\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"),
}
"""Which module paths each set of targets takes; `text_encoder` applies to that network.

Each of "attention", "transformer" and "convolution" holds the one before; the last is what kohya
calls LoCon.
"""


@dataclass(frozen=True)
class Adapter:
    """One module's LoRA: down (rank, in[, k, k]), up (out, rank[, 1, 1]) and alpha."""

    down: np.ndarray
    up: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def delta(self) -> np.ndarray:
        """ΔW in float32, (out, in · k · k)."""
        up, down = _matrices(self)
        return self.scale * (up.astype(np.float32) @ down.astype(np.float32))


Adapters = Mapping[str, Mapping[str, Adapter]]
"""Adapters by network ("unet", "text_encoder") and module path: a whole LoRA."""


def _matrices(adapter: Adapter) -> tuple[np.ndarray, np.ndarray]:
    """(up, down) as matrices, (out, rank) and (rank, in · k · k)."""
    return (
        adapter.up.reshape(adapter.up.shape[0], -1),
        adapter.down.reshape(adapter.rank, -1),
    )


def _like(adapter: Adapter, up: np.ndarray, down: np.ndarray, alpha: float) -> Adapter:
    """An adapter of other matrices for the same module, in the same shapes but for the rank."""
    rank = down.shape[0]
    return Adapter(
        down.reshape(rank, *adapter.down.shape[1:]).astype(np.float32),
        up.reshape(up.shape[0], rank, *adapter.up.shape[2:]).astype(np.float32),
        alpha,
    )


def target_modules(parameter_names: Iterable[str], targets: str) -> list[str]:
    """The module paths whose `.weight` is among the names and that `targets` takes, in order."""
    pattern = TARGETS[targets]
    modules = (name.removesuffix(".weight") for name in parameter_names if name.endswith(".weight"))
    return [module for module in modules if pattern.fullmatch(module)]


def adapter_size(shape: tuple[int, ...], rank: int) -> int:
    """Scalars in the adapter of a weight of this shape (out, in) or (out, in, k, k)."""
    return rank * (shape[0] + math.prod(shape[1:]))


def check_rank(module: str, shape: tuple[int, ...], rank: int) -> None:
    """Raise WeightsError if an adapter of this rank would be wider than the layer itself."""
    most = min(shape[0], math.prod(shape[1:]))
    if rank > most:
        raise WeightsError(
            f"lora.rank is {rank}, but {module} is only {shape[0]} × {math.prod(shape[1:])}; "
            f"use {most} or less"
        )


def ranks(adapters: Adapters) -> tuple[int, ...]:
    """The ranks that occur, in ascending order."""
    return tuple(sorted({a.rank for modules in adapters.values() for a in modules.values()}))


def alphas(adapters: Adapters) -> tuple[float, ...]:
    """The alphas that occur, in ascending order."""
    return tuple(sorted({a.alpha for modules in adapters.values() for a in modules.values()}))


def family(adapters: Adapters) -> str | None:
    """The Stable Diffusion a LoRA is for, by the width of the text it reads; None if unsure."""
    widths = {
        adapter.down.shape[1]
        for module, adapter in adapters.get("unet", {}).items()
        if re.fullmatch(r".*\.attn2\.to_[kv]", module)
    }
    widths |= {
        adapter.down.shape[1]
        for module, adapter in adapters.get("text_encoder", {}).items()
        if re.fullmatch(r".*\.q_proj", module)
    }
    generations = {768: "1.x", 1024: "2.x", 2048: "XL"}
    if len(widths) != 1 or (width := widths.pop()) not in generations:
        return None
    return f"Stable Diffusion {generations[width]}"


def fit(
    adapters: Adapters,
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    source: str,
    base: str = "this base",
    ignore_unknown: bool = False,
) -> dict[str, dict[str, Adapter]]:
    """The adapters in the shapes of a base: a 1×1 convolution and a linear layer are one.

    `shapes` are those of each network's tensors; `source` and `base` name the two for errors.
    Raises WeightsError if a module is not in the base (unless `ignore_unknown`) or does not fit.
    """
    fitted: dict[str, dict[str, Adapter]] = {}
    unknown = []
    for network, modules in adapters.items():
        for module, adapter in modules.items():
            shape = shapes.get(network, {}).get(f"{module}.weight")
            if shape is None:
                unknown.append(f"{network}.{module}")
                continue
            up, down = _matrices(adapter)
            if (up.shape[0], down.shape[1]) != (shape[0], math.prod(shape[1:])):
                made_for = family(adapters)
                raise WeightsError(
                    f"{source}: "
                    + (f"this LoRA is for {made_for}, " if made_for else "")
                    + f"its {module} is {up.shape[0]} × {down.shape[1]}, {base} has "
                    f"{shape[0]} × {math.prod(shape[1:])}; use it with the base it was made for"
                )
            kernel = shape[1:]
            fitted.setdefault(network, {})[module] = Adapter(
                adapter.down.reshape(adapter.rank, *kernel),
                adapter.up.reshape(shape[0], adapter.rank, *(1 for _ in kernel[1:])),
                adapter.alpha,
            )
    if unknown and not ignore_unknown:
        raise WeightsError(
            f"{source}: {len(unknown)} modules are not in {base}: {listed(unknown)}; use it "
            "with the base it was made for, or leave them out with --ignore-unknown"
        )
    if not fitted:
        raise WeightsError(f"{source}: none of its modules is in {base}; use another base")
    return fitted


def listed(items: Sequence[str], most: int = 8) -> str:
    """The first few of many names, and how many more there are."""
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")


def merge(
    tensors: Mapping[str, np.ndarray], adapters: Mapping[str, Adapter], weight: float = 1.0
) -> dict[str, np.ndarray]:
    """The weights of the adapted modules with `weight` · ΔW added; only those are returned.

    Raises WeightsError if a module is not in `tensors` or its shape differs.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    fit({"": adapters}, {"": shapes}, "the LoRA")
    return {
        f"{module}.weight": add(tensors[f"{module}.weight"], adapter, weight)
        for module, adapter in adapters.items()
    }


def add(tensor: np.ndarray, adapter: Adapter, weight: float = 1.0) -> np.ndarray:
    """A module's weight with `weight` · ΔW added, summed in float32, in the weight's dtype."""
    total = tensor.astype(np.float32) + weight * adapter.delta().reshape(tensor.shape)
    return total.astype(tensor.dtype)


def combine(parts: Sequence[tuple[Adapters, float]]) -> dict[str, dict[str, Adapter]]:
    """One LoRA whose ΔW is the weighted sum of several: their ranks side by side, so exact.

    Raises WeightsError if two adapt the same module with different shapes.
    """
    found: dict[str, dict[str, list[tuple[Adapter, float]]]] = {}
    for adapters, weight in parts:
        for network, modules in adapters.items():
            for module, adapter in modules.items():
                found.setdefault(network, {}).setdefault(module, []).append((adapter, weight))
    combined: dict[str, dict[str, Adapter]] = {}
    for network, together in found.items():
        for module, several in together.items():
            matrices = [_matrices(adapter) for adapter, _ in several]
            sizes = {(up.shape[0], down.shape[1]) for up, down in matrices}
            if len(sizes) > 1:
                shown = " and ".join(f"{out} × {into}" for out, into in sorted(sizes))
                raise WeightsError(
                    f"the LoRAs are for different models: {network}.{module} is {shown}; merge "
                    "only those made for one base"
                )
            ups = [
                up.astype(np.float32) * np.float32(weight * adapter.scale)
                for (up, _), (adapter, weight) in zip(matrices, several, strict=True)
            ]
            down = np.concatenate([down.astype(np.float32) for _, down in matrices])
            combined.setdefault(network, {})[module] = _like(
                several[0][0], np.concatenate(ups, axis=1), down, float(len(down))
            )
    return combined


def resize(adapters: Adapters, rank: int) -> tuple[dict[str, dict[str, Adapter]], float]:
    """The closest LoRA of at most this rank, and the share of ‖ΔW‖² that it keeps.

    By truncated SVD (Eckart & Young, 1936), computed on the thin factors; an adapter that is
    not wider than `rank` stays as it is.
    """
    resized: dict[str, dict[str, Adapter]] = {}
    kept = total = 0.0
    for network, modules in adapters.items():
        resized[network] = {}
        for module, adapter in modules.items():
            up, down = (matrix.astype(np.float64) for matrix in _matrices(adapter))
            q_up, r_up = np.linalg.qr(up)
            q_down, r_down = np.linalg.qr(down.T)
            u, s, vt = np.linalg.svd(adapter.scale * r_up @ r_down.T, full_matrices=False)
            narrow = min(rank, len(s))
            total += float((s**2).sum())
            if adapter.rank <= rank:
                kept += float((s**2).sum())
                resized[network][module] = adapter
                continue
            kept += float((s[:narrow] ** 2).sum())
            root = np.sqrt(s[:narrow])
            resized[network][module] = _like(
                adapter,
                q_up @ u[:, :narrow] * root,
                (root[:, None] * vt[:narrow]) @ q_down.T,
                float(narrow),
            )
    return resized, kept / total if total else 1.0


def extract(delta: np.ndarray, rank: int) -> tuple[Adapter, float]:
    """The adapter of at most this rank that is closest to `delta`, and the share of ‖ΔW‖² it keeps.

    `delta` is (out, in) or (out, in, k, k), not zero. The singular vectors come from the smaller
    Gram matrix in float64.
    """
    matrix = delta.reshape(delta.shape[0], -1).astype(np.float64)
    tall = matrix.shape[0] > matrix.shape[1]
    side = matrix.T if tall else matrix  # (short, long)
    values, vectors = np.linalg.eigh(side @ side.T)
    narrow = min(rank, len(values))
    vectors = vectors[:, ::-1][:, :narrow]
    long = vectors.T @ side  # (rank, long)
    norms = np.sqrt(np.maximum(np.linalg.norm(long, axis=1), 1e-30))
    first, second = vectors * norms, long / norms[:, None]
    up, down = (second.T, first.T) if tall else (first, second)
    kernel = delta.shape[2:]
    adapter = Adapter(
        down.reshape(narrow, delta.shape[1], *kernel).astype(np.float32),
        up.reshape(delta.shape[0], narrow, *(1 for _ in kernel)).astype(np.float32),
        float(narrow),
    )
    kept = float((long**2).sum() / (matrix**2).sum())
    return adapter, kept
