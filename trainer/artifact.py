"""What a run leaves: the LoRA file with its header, or the folder of a new base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffusion.config import ModelConfig
from diffusion.lora import adapters
from trainer.config import RunConfig
from weights import base, files, kohya


def version_name(model: ModelConfig) -> str:
    """kohya's `ss_base_model_version`: sd_v1, sd_v2, each with _v for v-prediction."""
    generation = "v2" if model.unet.cross_attention_dim == 1024 else "v1"
    return f"sd_{generation}" + ("_v" if model.prediction_type == "v_prediction" else "")


def lora_metadata(config: RunConfig, model: ModelConfig, base_digest: str) -> dict[str, str]:
    """The header of the published LoRA: kohya's minimum set and ModelSpec 1.0.1."""
    second = model.unet.cross_attention_dim == 1024
    alpha = config.lora.scale * config.lora.rank
    resolution = config.data.resolution or model.resolution
    if not second:
        architecture = "stable-diffusion-v1/lora"
    elif model.prediction_type == "epsilon":
        architecture = "stable-diffusion-v2-512/lora"
    else:
        architecture = "stable-diffusion-v2-768-v/lora"
    return {
        "ss_v2": str(second),
        "ss_base_model_version": version_name(model),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.lora.rank),
        "ss_network_alpha": str(alpha),
        "ss_network_args": "{}",
        "ss_output_name": config.name,
        "ss_sd_model_name": config.base.model,
        "ss_new_sd_model_hash": base_digest,
        "ss_seed": str(config.seed),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": config.name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "epsilon" if model.prediction_type == "epsilon" else "v",
    }


def save_lora(
    path: Path,
    tensors: Mapping[str, Mapping[str, np.ndarray]],
    config: RunConfig,
    model: ModelConfig,
    base_digest: str,
) -> None:
    """Write the trained matrices, by network and parameter name, as a kohya safetensors file."""
    alpha = config.lora.scale * config.lora.rank
    found = {network: adapters(arrays, alpha) for network, arrays in tensors.items()}
    kohya.write(path, found, lora_metadata(config, model, base_digest))


def save_base(folder: Path, tensors: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write whole networks in float16 in the diffusers layout."""
    for network, arrays in tensors.items():
        halves = {name: array.astype(np.float16) for name, array in arrays.items()}
        files.dump(folder / base.NETWORK_FILES[network][0], halves, {"format": "pt"})
