"""The kohya LoRA file: three tensors a module, everything else in the header.

Names and header keys follow kohya-ss/sd-scripts, `networks/lora.py` and `train_network.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from weights import files
from weights.files import WeightsError
from weights.lora import Adapter

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}


def kohya_name(network: str, module: str) -> str:
    """`unet`, `down_blocks.0.attn1.to_q` → `lora_unet_down_blocks_0_attn1_to_q`."""
    return f"{PREFIXES[network]}_{module.replace('.', '_')}"


def write(
    path: str | Path,
    adapters: Mapping[str, Mapping[str, Adapter]],
    metadata: Mapping[str, str],
) -> None:
    """Write adapters, by network and module, in float32, atomically.

    The header gets `metadata` and `sshs_model_hash`, the digest of the tensors under the `ss_*`
    keys alone, as other tools compute it.
    """
    tensors: dict[str, np.ndarray] = {}
    for network, modules in adapters.items():
        for module, adapter in modules.items():
            name = kohya_name(network, module)
            tensors[f"{name}.lora_down.weight"] = adapter.down
            tensors[f"{name}.lora_up.weight"] = adapter.up
            tensors[f"{name}.alpha"] = np.array(adapter.alpha, np.float32)
    ordered = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    digest = model_hash(ordered, kept)
    files.dump(path, ordered, {**metadata, "sshs_model_hash": digest})


def model_hash(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """sha256 of the tensor bytes of a safetensors file with this header, in hex."""
    payload = save(dict(tensors), metadata=dict(metadata))
    start = 8 + int.from_bytes(payload[:8], "little")
    return hashlib.sha256(payload[start:]).hexdigest()


def read(path: str | Path, modules: Mapping[str, Iterable[str]]) -> dict[str, dict[str, Adapter]]:
    """Read adapters by network and module; `modules` are the module paths of each network.

    A missing alpha means scale 1. Raises WeightsError if the file is damaged or holds a key that
    fits no module.
    """
    tensors = files.load(path)
    names = {
        kohya_name(network, module): (network, module)
        for network, paths in modules.items()
        for module in paths
    }
    parts: dict[str, dict[str, np.ndarray]] = {}
    unknown = []
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        if name not in names or part not in ("lora_down.weight", "lora_up.weight", "alpha"):
            unknown.append(key)
        parts.setdefault(name, {})[part] = tensor
    if unknown:
        shown = ", ".join(sorted(unknown)[:5])
        raise WeightsError(
            f"{path}: {len(unknown)} keys fit no module of this base ({shown}…); use the base it "
            "was trained on"
        )
    adapters: dict[str, dict[str, Adapter]] = {}
    for name, found in parts.items():
        if "lora_down.weight" not in found or "lora_up.weight" not in found:
            raise WeightsError(f"{path}: {name} lacks its down or up matrix; copy the file again")
        down, up = found["lora_down.weight"], found["lora_up.weight"]
        alpha = float(found["alpha"]) if "alpha" in found else 0.0
        network, module = names[name]
        adapters.setdefault(network, {})[module] = Adapter(down, up, alpha or down.shape[0])
    return adapters
