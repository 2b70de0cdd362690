"""What a run leaves: the LoRA file with its header, or the folder of a new base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffusion.config import ModelConfig
from diffusion.lora import adapters
from trainer.config import RunConfig
from weights import files, lora_files
from weights.base import NETWORK_FILES
from weights.lora import Adapters


def version_name(model: ModelConfig) -> str:
    """kohya's `ss_base_model_version`: sd_v1, sd_v2, each with _v for v-prediction."""
    generation = "v2" if model.unet.cross_attention_dim == 1024 else "v1"
    return f"sd_{generation}" + ("_v" if model.prediction_type == "v_prediction" else "")


def lora_metadata(
    adapters: Adapters,
    config: RunConfig,
    name: str,
    model: ModelConfig,
    base_digest: str,
    data_digest: str,
) -> dict[str, str]:
    """The header of the published LoRA; `name` is the model's."""
    said = {
        "modelspec.trigger_phrase": ", ".join(config.trigger_words),
        "modelspec.license": config.licence or "",
        "lora.zero_terminal_snr": "true" if config.zero_terminal_snr else "",
    }
    return lora_files.header(
        adapters,
        config.name,
        version_name(model),
        config.data.resolution or model.resolution,
        {
            "ss_sd_model_name": name,
            "ss_new_sd_model_hash": base_digest,
            "ss_seed": str(config.seed),
            "lora.data_digest": data_digest,
            **{key: text for key, text in said.items() if text},
        },
    )


def save_lora(
    path: Path,
    tensors: Mapping[str, Mapping[str, np.ndarray]],
    config: RunConfig,
    name: str,
    model: ModelConfig,
    base_digest: str,
    data_digest: str,
) -> None:
    """Write the trained matrices, by network and parameter name, as a kohya safetensors file."""
    alpha = config.lora.scale * config.lora.rank
    found = {network: adapters(arrays, alpha) for network, arrays in tensors.items()}
    metadata = lora_metadata(found, config, name, model, base_digest, data_digest)
    lora_files.write_kohya(path, found, metadata)


def save_base(folder: Path, tensors: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write whole networks in float16 in the diffusers layout."""
    for network, arrays in tensors.items():
        halves = {name: array.astype(np.float16) for name, array in arrays.items()}
        files.dump(folder / NETWORK_FILES[network], halves, {"format": "pt"})
