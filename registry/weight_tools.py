"""What `lora-registry` does with weight files: inspect, export, merge, resize, extract.

An operand is a path, or NAME@VERSION of the registry; what a file is, is found out.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import RegistryError
from weights import base as bases
from weights import convert, dialects, files, lora, lora_files
from weights.files import WeightsError

if TYPE_CHECKING:
    from weights.base import Base
    from weights.lora_files import LoRAFile

DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class Operand:
    """A weight file or folder and what to call it."""

    path: Path
    name: str


def resolve(text: str, location: str | None) -> Operand:
    """The file or folder at a path, or the verified file of NAME[@VERSION] in the registry.

    Raises RegistryError if there is neither.
    """
    path = Path(text)
    if os.path.exists(path):  # unlike Path's, it takes a name of any length
        return Operand(path, path.name)
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*(@[A-Za-z0-9._:-]+)?", text):
        raise RegistryError(f"there is no file {text}; check the path")
    if not location:
        raise RegistryError(
            f"there is no file {text}, and no registry is named to look it up in; check the path, "
            "or give --registry DIR or set LORA_REGISTRY"
        )
    from registry.api import open_registry

    try:
        file, manifest = open_registry(location).fetch(text)
    except RegistryError as error:
        raise RegistryError(f"there is no file {text}, and as a reference: {error}") from error
    return Operand(file, manifest.reference)


def weighted(text: str) -> tuple[str, float]:
    """`style@3:0.7` → ("style@3", 0.7); without a weight it is 1."""
    head, colon, tail = text.rpartition(":")
    if not colon or os.path.exists(text) or head.endswith("@sha256"):
        return text, 1.0
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise RegistryError(
            f"{text}: expected LORA or LORA:WEIGHT, such as style@3:0.7, found {tail!r} as the "
            "weight; correct it"
        )
    return head, weight


def is_lora(path: Path) -> bool:
    """Does the file hold a LoRA, of whatever kind? A folder never does.

    Raises WeightsError if it is no weight file.
    """
    if path.is_dir():
        return False
    keys = files.open_tensors(path).entries
    foreign = [re.compile(pattern) for pattern, _ in dialects.FOREIGN]
    return any(dialects.parse(key) for key in keys) or any(
        pattern.match(key)
        for pattern in foreign
        for key in keys
        if not dialects.BASE_MODEL.match(key)
    )


def check_new(out: Path, overwrite: bool) -> None:
    """Raise RegistryError if `out` exists and may not be replaced."""
    if os.path.exists(out) and not overwrite:
        raise RegistryError(f"{out}: it exists; choose another --out or add --overwrite")


# ---- inspect


def describe(operand: Operand, ignore_unknown: bool = True) -> dict[str, Any]:
    """What a file or folder is, as plain values."""
    if is_lora(operand.path):
        return _describe_lora(lora_files.read(operand.path, ignore_unknown, allow_nan=True))
    return _describe_base(bases.open_base(operand.path))


def _describe_base(base: Base) -> dict[str, Any]:
    prediction = base.prediction
    return {
        "kind": "base model",
        "form": base.layout,
        "model": base.family,
        "prediction_type": prediction.type if prediction else None,
        "prediction_type_said_by": prediction.source if prediction else None,
        "dtypes": list(base.dtypes),
        "tensors": {
            "read": base.tensors,
            "missing": 0,
            "left_over": len(base.left_over),
            "not_needed": len(base.not_needed),
        },
        "left_over": list(base.left_over),
        "networks": {
            name: {
                "tensors": len(network.shapes),
                "parameters": sum(math.prod(shape) for shape in network.shapes.values()),
            }
            for name, network in base.networks.items()
        },
    }


def _describe_lora(found: LoRAFile) -> dict[str, Any]:
    not_finite = sum(
        files.count_not_finite(matrix)
        for modules in found.adapters.values()
        for adapter in modules.values()
        for matrix in (adapter.down, adapter.up)
    )
    return {
        "kind": "LoRA",
        "form": found.dialect,
        "model": lora.family(found.adapters),
        "ranks": list(lora.ranks(found.adapters)),
        "alphas": list(lora.alphas(found.adapters)),
        "dtypes": list(found.dtypes),
        "tensors": {"read": found.tensors, "missing": 0, "left_over": len(found.unknown)},
        "left_over": list(found.unknown),
        "not_finite": not_finite,
        "networks": {
            name: {
                "modules": len(modules),
                "parameters": sum(a.down.size + a.up.size for a in modules.values()),
            }
            for name, modules in found.adapters.items()
        },
        "metadata": dict(found.metadata),
    }


# ---- export


def export(
    operand: Operand,
    out: Path,
    format: str,
    dtype: str | None,
    ema: bool,
    ignore_unknown: bool,
    allow_nan: bool,
) -> None:
    """Write a LoRA or a base model in another format.

    Raises RegistryError if there is no such format for what the operand is, WeightsError if it
    cannot be read or written.
    """
    if is_lora(operand.path):
        _check_format(operand, format, lora_files.FORMATS, "a LoRA")
        if ema:
            raise RegistryError(f"{operand.name} is a LoRA and holds no EMA copy; leave --ema out")
        check_lora_name(out, format)
        found = lora_files.read(operand.path, ignore_unknown, allow_nan)
        metadata = {k: v for k, v in found.metadata.items() if k.startswith(("ss_", "modelspec."))}
        if not metadata:
            metadata = _header([found], found.adapters, out.stem, "")
        lora_files.write(out, found.adapters, metadata, format, numpy_type(dtype or "float32"))
        return
    _check_format(operand, format, convert.LAYOUTS, "a base model")
    convert.check_out(out, format)
    base = bases.open_base(operand.path, ema=ema)
    check_numbers(base, allow_nan)
    convert.write_base(out, base, format, {}, numpy_type(dtype) if dtype else None)


def check_numbers(base: Base, allow_nan: bool) -> None:
    """Raise WeightsError if a tensor of the base holds NaN or infinity."""
    if not allow_nan:
        for network in base.networks.values():
            for _ in network.tensors(allow_nan=False):
                pass


def _check_format(operand: Operand, format: str, known: Sequence[str], kind: str) -> None:
    if format not in known:
        raise RegistryError(
            f"{operand.name} is {kind}, and there is no format {format!r} for one; choose "
            f"--format {' or '.join(known)}"
        )


def check_lora_name(out: Path, format: str) -> None:
    """Raise WeightsError if the file's name does not say what it will be."""
    suffix = ".ckpt" if format == "mindone" else ".safetensors"
    if out.suffix != suffix:
        raise WeightsError(f"{out}: expected a name that ends in {suffix} for {format}; change it")


def numpy_type(name: str) -> type:
    """The numpy type of one of DTYPES."""
    import numpy as np

    return {"float16": np.float16, "float32": np.float32}[name]


# ---- merge, resize, extract


def merge(
    operands: Sequence[tuple[Operand, float]],
    out: Path,
    rank: int | None,
    ignore_unknown: bool,
    allow_nan: bool,
    dtype: str | None,
) -> str:
    """Write one LoRA that does what several, weighted, do together; returns what it is, in words.

    Raises WeightsError if they are for different models.
    """
    check_lora_name(out, "kohya")
    read = [lora_files.read(operand.path, ignore_unknown, allow_nan) for operand, _ in operands]
    weights = [weight for _, weight in operands]
    combined = lora.combine(list(zip((found.adapters for found in read), weights, strict=True)))
    words = f"rank {'/'.join(map(str, lora.ranks(combined)))}, exact"
    if rank is not None:
        combined, kept = lora.resize(combined, rank)
        words = f"rank {rank}, keeps {kept:.2%} of the sum's squared norm"
    names = ", ".join(f"{operand.name}:{weight:g}" for operand, weight in operands)
    metadata = _header(read, combined, out.stem, names)
    lora_files.write(out, combined, metadata, dtype=numpy_type(dtype or "float32"))
    return words


def merge_into_base(
    base_path: str,
    operands: Sequence[tuple[Operand, float]],
    out: Path,
    format: str | None,
    ignore_unknown: bool,
    allow_nan: bool,
    dtype: str | None,
) -> str:
    """Write a base model with LoRAs added into its weights; returns what it is, in words.

    Raises WeightsError if one does not fit the base.
    """
    base = bases.open_base(base_path)
    layout = format or convert.default_layout(base)
    if layout not in convert.LAYOUTS:
        raise RegistryError(
            f"there is no format {layout!r} for a base model; choose --format "
            f"{' or '.join(convert.LAYOUTS)}"
        )
    convert.check_out(out, layout)
    shapes = {name: network.shapes for name, network in base.networks.items()}
    parts = []
    for operand, weight in operands:
        found = lora_files.read(operand.path, ignore_unknown, allow_nan)
        fitted = lora.fit(found.adapters, shapes, operand.name, base_path, ignore_unknown)
        parts.append((fitted, weight))
    check_numbers(base, allow_nan)
    combined = lora.combine(parts)
    convert.write_base(out, base, layout, combined, numpy_type(dtype) if dtype else None)
    changed = sum(len(modules) for modules in combined.values())
    return f"{layout}, {changed} modules changed"


def resize(
    operand: Operand,
    out: Path,
    rank: int,
    ignore_unknown: bool,
    allow_nan: bool,
    dtype: str | None,
) -> str:
    """Write the closest LoRA of at most this rank; returns what it is, in words."""
    check_lora_name(out, "kohya")
    found = lora_files.read(operand.path, ignore_unknown, allow_nan)
    narrow, kept = lora.resize(found.adapters, rank)
    metadata = _header([found], narrow, out.stem, operand.name)
    lora_files.write(out, narrow, metadata, dtype=numpy_type(dtype or "float32"))
    before = "/".join(map(str, lora.ranks(found.adapters)))
    after = "/".join(map(str, lora.ranks(narrow)))
    return f"rank {before} → {after}, keeps {kept:.2%} of its squared norm"


def extract(
    base_path: str,
    tuned_path: str,
    out: Path,
    rank: int,
    targets: str,
    dtype: str | None,
    progress: Callable[[int, int], None],
) -> str:
    """Write the LoRA that comes closest to what fine-tuning did; returns what it is, in words.

    Raises WeightsError if the two models differ in shape, or not at all.
    """
    import numpy as np

    check_lora_name(out, "kohya")
    base, tuned = bases.open_base(base_path), bases.open_base(tuned_path)
    for network in ("unet", "text_encoder"):
        ours, theirs = (model.networks[network].structure for model in (base, tuned))
        if ours != theirs:
            raise WeightsError(
                f"{tuned_path}: its {network} is not that of {base_path} ({theirs} against "
                f"{ours}); name the base that it was tuned from"
            )
    wanted = {
        network: lora.target_modules(base.networks[network].shapes, chosen)
        for network, chosen in (("unet", targets), ("text_encoder", "text_encoder"))
    }
    total, done = sum(map(len, wanted.values())), 0
    adapters: dict[str, dict[str, lora.Adapter]] = {}
    whole = kept = elsewhere = 0.0
    for network, modules in wanted.items():
        names = {f"{module}.weight" for module in modules}
        before, after = (model.networks[network].tensors() for model in (base, tuned))
        for (name, old), (_, new) in zip(before, after, strict=True):
            delta = new - old
            norm = float((delta.astype(np.float64) ** 2).sum())
            if name not in names:
                elsewhere += norm
                continue
            done += 1
            progress(done, total)
            if norm:
                adapter, share = lora.extract(delta, rank)
                adapters.setdefault(network, {})[name.removesuffix(".weight")] = adapter
                whole, kept = whole + norm, kept + share * norm
    if not adapters:
        raise WeightsError(
            f"{tuned_path}: its adapted modules are those of {base_path}, so there is nothing to "
            "extract; check the two paths"
        )
    metadata = lora_files.header(
        adapters, out.stem, _version(base), 768 if _version(base) == "sd_v2_v" else 512, {}
    )
    lora_files.write(out, adapters, metadata, dtype=numpy_type(dtype or "float32"))
    changed = sum(map(len, adapters.values()))
    words = f"rank {rank} on {changed} modules, keeps {kept / whole:.2%} of their change"
    if elsewhere:
        share = elsewhere / (whole + elsewhere)
        words += f"; {share:.2%} of all change lies in other weights, which no LoRA here holds"
    return words


def _version(base: Base) -> str:
    second = base.family == "Stable Diffusion 2.x"
    velocity = base.prediction is not None and base.prediction.type == "v_prediction"
    return f"sd_v{2 if second else 1}" + ("_v" if velocity else "")


def _header(
    read: Sequence[LoRAFile], adapters: lora.Adapters, title: str, merged_from: str
) -> dict[str, str]:
    """The header of a LoRA made from others: what they agree on, or the first says."""
    first = read[0].metadata
    version = first.get("ss_base_model_version", "")
    if version not in ("sd_v1", "sd_v1_v", "sd_v2", "sd_v2_v"):
        version = "sd_v2" if lora.family(adapters) == "Stable Diffusion 2.x" else "sd_v1"
    size = re.match(r"(\d{2,5})x", first.get("modelspec.resolution", ""))
    extra = {
        key: first[key]
        for key in ("ss_sd_model_name", "ss_new_sd_model_hash", "ss_sd_model_hash")
        if key in first and all(found.metadata.get(key) == first[key] for found in read)
    }
    if merged_from:
        extra["modelspec.merged_from"] = merged_from
    return lora_files.header(adapters, title, version, int(size[1]) if size else 512, extra)
