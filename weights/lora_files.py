"""LoRA files: every dialect in, three out.

Out come kohya's safetensors (what this project publishes and nearly every tool opens), PEFT's
safetensors for diffusers, and MindONE's `.ckpt`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from weights import checkpoint, dialects, files, names
from weights.files import FLOATS, TensorFile, WeightsError, open_tensors
from weights.lora import Adapter, Adapters, alphas, family, listed, ranks

FORMATS = ("kohya", "diffusers", "mindone")

_IGNORED = re.compile(r"lora_rank|epoch_num|step_num|global_step")
"""What the ancestor appended to its checkpoints."""


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA that was read: its adapters, and what the file was."""

    path: Path
    dialect: str
    adapters: dict[str, dict[str, Adapter]]
    metadata: Mapping[str, str]
    tensors: int
    dtypes: tuple[str, ...]
    unknown: tuple[str, ...] = ()
    """Keys that fit nothing; empty unless they were to be ignored."""

    @property
    def modules(self) -> int:
        """How many modules it adapts."""
        return sum(len(modules) for modules in self.adapters.values())


@dataclass
class _Parts:
    """What has been found of one module."""

    down: np.ndarray | None = None
    up: np.ndarray | None = None
    alpha: float | None = None
    keys: list[str] = field(default_factory=list)


def read(path: str | Path, ignore_unknown: bool = False, allow_nan: bool = False) -> LoRAFile:
    """Read a LoRA in any dialect; a missing alpha, or 0, means scale 1, as everywhere.

    Raises WeightsError if the file is damaged, is no LoRA for Stable Diffusion 1.x or 2.x, lacks
    a matrix, holds NaN (unless `allow_nan`) or a key that fits nothing (unless `ignore_unknown`).
    """
    file = open_tensors(path)
    parts: dict[tuple[str, str], _Parts] = {}
    unknown: list[str] = []
    spoken: list[str] = []
    for key in file.entries:
        meanings = dialects.parse(key)
        if not meanings and not _IGNORED.fullmatch(key):
            unknown.append(key)
        for meaning in meanings:
            found = parts.setdefault((meaning.network, meaning.module), _Parts())
            found.keys.append(key)
            spoken.append(meaning.dialect)
            _put(found, meaning, file, key, allow_nan)
    _refuse(file, unknown, bool(parts), ignore_unknown)
    configured = _peft_alphas(file)
    adapters: dict[str, dict[str, Adapter]] = {}
    for (network, module), found in parts.items():
        adapter = _adapter(file, module, found, configured.get(f"{network}.{module}"))
        adapters.setdefault(network, {})[module] = adapter
    made_for = family(adapters)
    if made_for == "Stable Diffusion XL":
        raise WeightsError(
            f"{file.path}: this LoRA is for Stable Diffusion XL, expected one for Stable "
            "Diffusion 1.x or 2.x; use another one"
        )
    used = [file.entries[key].dtype for found in parts.values() for key in found.keys]
    return LoRAFile(
        file.path,
        max(set(spoken), key=spoken.count),
        adapters,
        file.metadata,
        len(file.entries) - len(unknown),
        tuple(sorted(set(used), key=lambda dtype: -used.count(dtype))),
        tuple(unknown),
    )


def _put(found: _Parts, meaning: dialects.Key, file: TensorFile, key: str, allow_nan: bool) -> None:
    entry = file.entries[key]
    if entry.dtype not in FLOATS and not (
        meaning.part == "alpha" and entry.dtype.startswith(("int", "uint"))
    ):
        raise WeightsError(
            f"{file.path}: {key} is of dtype {entry.dtype}, expected one of {', '.join(FLOATS)}; "
            "convert the file to float16 first"
        )
    array = file.read(key).copy()
    if not allow_nan and (bad := files.count_not_finite(array)):
        raise WeightsError(
            f"{file.path}: {key} has {bad} of {array.size} values that are NaN or infinite; the "
            "training diverged or the file is damaged, use another one (or --allow-nan)"
        )
    if meaning.part == "alpha":
        if array.size != 1:
            raise WeightsError(
                f"{file.path}: {key} has {array.size} values, expected a single number; copy "
                "the file again"
            )
        twice, found.alpha = found.alpha is not None, float(array.reshape(()))
    elif meaning.part == "down":
        twice, found.down = found.down is not None, array
    else:
        if meaning.piece is not None:
            index, number = meaning.piece
            if array.ndim < 2 or array.shape[0] % number:
                raise WeightsError(
                    f"{file.path}: {key} is {array.shape}, expected q, k and v one below "
                    "another; copy the file again"
                )
            array = np.split(array, number)[index]
        twice, found.up = found.up is not None, array
    if twice:
        raise WeightsError(
            f"{file.path}: {meaning.network}.{meaning.module} has its {meaning.part} twice "
            f"({listed(found.keys, 3)}); keep one"
        )


def _adapter(
    file: TensorFile, module: str, found: _Parts, configured: tuple[float, bool] | None
) -> Adapter:
    if found.down is None or found.up is None:
        lacking = "down" if found.down is None else "up"
        raise WeightsError(
            f"{file.path}: {module} has no {lacking} matrix (its keys: {listed(found.keys, 3)}); "
            "the file is not complete, copy it again"
        )
    down, up = found.down, found.up
    thin = up.ndim == 2 or (up.ndim == 4 and up.shape[2:] == (1, 1))
    fitting = down.ndim in (2, 4) and thin and up.shape[1] == down.shape[0]
    if not fitting or not down.size or not up.size:
        raise WeightsError(
            f"{file.path}: the matrices of {module} are {down.shape} and {up.shape}, expected "
            "(rank, in) and (out, rank); the file is damaged or no LoRA"
        )
    rank = down.shape[0]
    alpha = found.alpha
    if alpha is None and configured is not None:
        alpha, stabilised = configured
        if stabilised:  # Kalajdzievski, 2023: alpha / √rank in place of alpha / rank
            alpha *= math.sqrt(rank)
    if down.ndim == 4 and up.ndim == 2:
        up = up.reshape(*up.shape, 1, 1)
    elif down.ndim == 2 and up.ndim == 4:
        up = up.reshape(up.shape[:2])
    return Adapter(down, up, alpha or float(rank))


def _refuse(file: TensorFile, unknown: list[str], any_known: bool, ignore_unknown: bool) -> None:
    for pattern, kind in dialects.FOREIGN:
        if any(re.match(pattern, key) for key in file.entries):
            raise WeightsError(
                f"{file.path}: this file is {kind}; expected a LoRA for Stable Diffusion 1.x or "
                "2.x, use another one"
            )
    if not any_known and any(dialects.BASE_MODEL.match(key) for key in unknown):
        raise WeightsError(
            f"{file.path}: this is a base model, expected a LoRA; swap the two arguments if they "
            "are in the wrong order"
        )
    if not any_known:
        shown = f" (its keys: {listed(unknown, 3)})" if unknown else ", it is empty"
        raise WeightsError(f"{file.path}: found no LoRA in this file{shown}; check the path")
    if unknown and not ignore_unknown:
        raise WeightsError(
            f"{file.path}: {len(unknown)} keys fit no module of Stable Diffusion: "
            f"{listed(unknown)}; check where the file is from, or leave them out with "
            "--ignore-unknown"
        )


def _peft_alphas(file: TensorFile) -> dict[str, tuple[float, bool]]:
    """(alpha, rank-stabilised?) by network and module, where PEFT says them.

    In the header, as `lora_adapter_metadata` of diffusers, or in the `adapter_config.json` that
    PEFT itself writes beside a file.
    """
    beside = file.path.parent / "adapter_config.json"
    text, source, prefixed = file.metadata.get("lora_adapter_metadata"), "its header", True
    if text is None and any(key.startswith(dialects.PEFT_PREFIX) for key in file.entries):
        source, prefixed = str(beside), False
    try:
        if not prefixed:
            text = beside.read_text(encoding="utf-8") if beside.is_file() else None
        if text is None:
            return {}
        config = json.loads(text)
        found = {}
        for key in file.entries:
            for meaning in dialects.parse(key):
                prefix = f"{meaning.network}." if prefixed else ""
                alpha = config.get(f"{prefix}lora_alpha")
                name = f"{meaning.network}.{meaning.module}"
                for pattern, value in (config.get(f"{prefix}alpha_pattern") or {}).items():
                    if name.endswith(f".{pattern}"):
                        alpha = value
                if alpha is not None:
                    if not math.isfinite(float(alpha)):
                        raise ValueError(f"the alpha of {name} is {alpha}")
                    found[name] = float(alpha), bool(config.get(f"{prefix}use_rslora"))
    except (ValueError, TypeError, AttributeError, OSError, OverflowError, RecursionError) as error:
        raise WeightsError(
            f"{file.path}: the LoRA configuration in {source} is not what PEFT writes ({error}); "
            "save the LoRA again"
        ) from error
    return found


# ---- out


def write(
    path: str | Path,
    adapters: Adapters,
    metadata: Mapping[str, str],
    format: str = "kohya",
    dtype: type = np.float32,
) -> None:
    """Write a LoRA atomically in one of FORMATS; MindONE's has no place for `metadata`.

    Raises WeightsError if the format cannot hold it, or the disk is full.
    """
    if format == "kohya":
        write_kohya(path, adapters, metadata, dtype)
    elif format == "diffusers":
        write_diffusers(path, adapters, metadata, dtype)
    else:
        write_mindone(path, adapters, dtype)


def write_kohya(
    path: str | Path, adapters: Adapters, metadata: Mapping[str, str], dtype: type = np.float32
) -> None:
    """Three tensors a module: down, up and alpha; everything else in the header.

    The header gets `metadata` and `sshs_model_hash`, the digest of the tensors under the `ss_*`
    keys alone, as other tools compute it.
    """
    tensors: dict[str, np.ndarray] = {}
    for network, modules in adapters.items():
        for module, adapter in modules.items():
            name = dialects.kohya(network, module)
            tensors[f"{name}.lora_down.weight"] = files.cast(adapter.down, dtype, name)
            tensors[f"{name}.lora_up.weight"] = files.cast(adapter.up, dtype, name)
            tensors[f"{name}.alpha"] = files.cast(np.array(adapter.alpha, np.float32), dtype, name)
    ordered = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    digest = model_hash(ordered, kept)
    files.dump(path, ordered, {**metadata, "sshs_model_hash": digest})


def model_hash(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """sha256 of the tensor bytes of a safetensors file with this header, in hex."""
    payload = save(dict(tensors), metadata=dict(metadata))
    start = 8 + int.from_bytes(payload[:8], "little")
    return hashlib.sha256(payload[start:]).hexdigest()


def write_diffusers(
    path: str | Path, adapters: Adapters, metadata: Mapping[str, str], dtype: type = np.float32
) -> None:
    """PEFT's names, and in the header the configuration that PEFT builds its layers from."""
    tensors: dict[str, np.ndarray] = {}
    config: dict[str, object] = {}
    for network, modules in adapters.items():
        most = max(modules.values(), key=lambda adapter: adapter.rank)
        config |= {
            f"{network}.r": most.rank,
            f"{network}.lora_alpha": most.alpha,
            f"{network}.target_modules": sorted(map(_peft_name, modules)),
            f"{network}.rank_pattern": {
                _peft_name(module): adapter.rank
                for module, adapter in modules.items()
                if adapter.rank != most.rank
            },
            f"{network}.alpha_pattern": {
                _peft_name(module): adapter.alpha
                for module, adapter in modules.items()
                if adapter.alpha != most.alpha
            },
        }
        for module, adapter in modules.items():
            name = f"{network}.{module}"
            tensors[f"{name}.lora_A.weight"] = files.cast(adapter.down, dtype, name)
            tensors[f"{name}.lora_B.weight"] = files.cast(adapter.up, dtype, name)
    header = {
        **{key: value for key, value in metadata.items() if key != "sshs_model_hash"},
        "format": "pt",
        "lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True),
    }
    files.dump(path, tensors, header)


def _peft_name(module: str) -> str:
    """The end of a module's path that PEFT looks for; transformers 5 has no `text_model.`."""
    return module.removeprefix("text_model.")


_MINDONE_ATTENTION = re.compile(r".*\.attn[12]\.to_(q|k|v|out\.0)")
_FUSED = re.compile(r"(text_model\.encoder\.layers\.\d+\.self_attn)\.(q|k|v)_proj")


def write_mindone(path: str | Path, adapters: Adapters, dtype: type = np.float32) -> None:
    """The ancestor's checkpoint: original names, one rank for all, alpha folded into up.

    Narrower adapters are filled up with zeros. The text encoder's q, k and v become one `in_proj`:
    of the same rank if they share their down matrix, else of the three ranks together.
    """
    folded: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # up, down
    fused: dict[str, dict[str, Adapter]] = {}
    for network, modules in adapters.items():
        for module, adapter in modules.items():
            if match := _FUSED.fullmatch(module):
                fused.setdefault(match[1], {})[match[2]] = adapter
            elif _MINDONE_ATTENTION.fullmatch(module) or module.endswith(".out_proj"):
                up = adapter.up * np.float32(adapter.scale)
                folded[_mindone_name(path, network, module)] = (
                    up.reshape(len(up), -1), adapter.down.reshape(adapter.rank, -1)
                )  # fmt: skip
            else:
                raise WeightsError(
                    f"{path}: MindONE adapts the attention only, this LoRA adapts {module} as "
                    "well; write it as kohya or diffusers"
                )
    for attention, parts in fused.items():
        name = _mindone_name(path, "text_encoder", f"{attention}.q_proj")
        folded[name] = _fuse(f"{path}: {attention}", parts)
    rank = max(down.shape[0] for _, down in folded.values())
    tensors: dict[str, np.ndarray] = {}
    for name, (up, down) in folded.items():
        missing = rank - down.shape[0]
        tensors[f"{name}.lora_down.weight"] = files.cast(
            np.pad(down, ((0, missing), (0, 0))), dtype, name
        )
        tensors[f"{name}.lora_up.weight"] = files.cast(
            np.pad(up, ((0, 0), (0, missing))), dtype, name
        )
    tensors["lora_rank"] = np.array(rank, np.int64)
    checkpoint.write(path, tensors)


def _fuse(where: str, parts: Mapping[str, Adapter]) -> tuple[np.ndarray, np.ndarray]:
    """(up, down) of q, k and v one below another."""
    if missing := [part for part in "qkv" if part not in parts]:
        raise WeightsError(
            f"{where} has no {', '.join(f'{part}_proj' for part in missing)}, and MindONE keeps "
            "q, k and v as one; write it as kohya or diffusers"
        )
    adapters = [parts[part] for part in "qkv"]
    ups = [adapter.up * np.float32(adapter.scale) for adapter in adapters]
    first = adapters[0].down
    if all(np.array_equal(adapter.down, first) for adapter in adapters):
        return np.concatenate(ups), first
    down = np.concatenate([adapter.down for adapter in adapters])
    up = np.zeros((sum(len(part) for part in ups), len(down)), np.float32)
    row = column = 0
    for part in ups:
        up[row : row + part.shape[0], column : column + part.shape[1]] = part
        row, column = row + part.shape[0], column + part.shape[1]
    return up, down


def _mindone_name(path: str | Path, network: str, module: str) -> str:
    """Path of a module, or of the fused one that holds it, in MindONE's networks."""
    if network == "unet":
        original = names.translate(module, names.unet_modules())
        if original is None:
            raise WeightsError(
                f"{path}: MindONE's UNet has no {module}; write it as kohya or diffusers"
            )
        return f"model.diffusion_model.{original}"
    inside = names.to_openclip(f"{module}.weight")
    name = names.to_mindone(f"cond_stage_model.transformer.{inside}")
    return name.removesuffix(".weight")


# ---- the header


def header(
    adapters: Adapters,
    title: str,
    version: str,
    resolution: int,
    extra: Mapping[str, str] = {},
) -> dict[str, str]:
    """Header of a LoRA: kohya's minimum set and ModelSpec 1.0.1.

    `version` is kohya's `ss_base_model_version`: sd_v1, sd_v1_v, sd_v2 or sd_v2_v.
    """
    second, velocity = version.startswith("sd_v2"), version.endswith("_v")
    if not second:
        architecture = "stable-diffusion-v1/lora"
    elif not velocity:
        architecture = "stable-diffusion-v2-512/lora"
    else:
        architecture = "stable-diffusion-v2-768-v/lora"
    dims, scales = ranks(adapters), alphas(adapters)
    return {
        "ss_v2": str(second),
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(dims[0]) if len(dims) == 1 else "Dynamic",
        "ss_network_alpha": str(scales[0]) if len(scales) == 1 else "Dynamic",
        "ss_network_args": "{}",
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        **extra,
    }
