"""A base that draws within a second, with made-up weights: 16 × 16 pixels of coloured noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion.config import load_model_config
from weights import files, lora_files
from weights.base import NETWORK_FILES
from weights.lora import Adapter, target_modules
from weights.structure import text_encoder_shapes, unet_shapes, vae_shapes

MODEL = """
prediction_type: v_prediction
resolution: 16
unet:
  block_out_channels: [32, 32]
  cross_attention: [false, true]
  layers_per_block: 1
  attention_heads: [2, 2]
  cross_attention_dim: 16
  use_linear_projection: true
vae:
  block_out_channels: [8, 16]
  layers_per_block: 1
  norm_num_groups: 8
  mid_block_attention: false
  scaling_factor: 1.0
text_encoder:
  hidden_size: 16
  intermediate_size: 32
  num_hidden_layers: 1
  num_attention_heads: 2
  hidden_act: quick_gelu
  pad_token_id: 49407
"""


@dataclass(frozen=True)
class Tiny:
    """Where the base, its model and a LoRA for it are."""

    base: Path
    model: Path
    lora: Path

    @property
    def arguments(self) -> list[str]:
        return ["--base", str(self.base), "--model", str(self.model)]


def make(folder: Path) -> Tiny:
    """Write all of it."""
    model = folder / "tiny.yaml"
    model.write_text(MODEL)
    config = load_model_config(str(model))
    draw = np.random.default_rng(0)
    shapes = {
        "unet": unet_shapes(config.unet),
        "vae": vae_shapes(config.vae),
        "text_encoder": text_encoder_shapes(config.text_encoder),
    }
    for network, found in shapes.items():
        tensors = {}
        for name, shape in found.items():
            spread = 1 / np.sqrt(max(1, np.prod(shape[1:])))
            level = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
            tensors[name] = (level + spread * draw.standard_normal(shape) * (level == 0)).astype(
                np.float32
            )
        files.dump(folder / "base" / NETWORK_FILES[network], tensors, {})
    adapters: dict[str, dict[str, Adapter]] = {}
    for network, targets in (("unet", "transformer"), ("text_encoder", "text_encoder")):
        adapters[network] = {
            module: Adapter(
                draw.normal(0, 0.5, (2, shapes[network][f"{module}.weight"][1])).astype(np.float32),
                draw.normal(0, 0.5, (shapes[network][f"{module}.weight"][0], 2)).astype(np.float32),
                2.0,
            )
            for module in target_modules(shapes[network], targets)
        }
    lora_files.write_kohya(folder / "lora.safetensors", adapters, {})
    return Tiny(folder / "base", model, folder / "lora.safetensors")
