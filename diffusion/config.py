"""What a Stable Diffusion model is made of, read from YAML; needs no MindSpore.

The fields carry the names and meanings of the published diffusers and transformers configs.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class UNetConfig(_Strict):
    """UNet2DConditionModel."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...]
    cross_attention: tuple[bool, ...]
    """For each level, from the finest: does it attend to the text?"""
    layers_per_block: int = 2
    attention_heads: tuple[int, ...]
    """Heads of each level; the middle block takes the last."""
    cross_attention_dim: int
    use_linear_projection: bool = False
    norm_num_groups: int = 32


class VAEConfig(_Strict):
    """AutoencoderKL."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int = 2
    latent_channels: int = 4
    mid_block_attention: bool = True
    norm_num_groups: int = 32
    scaling_factor: float

    @property
    def factor(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


class TextEncoderConfig(_Strict):
    """CLIPTextModel; its output is the last layer's, after the final LayerNorm."""

    vocab_size: int = 49408
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 77
    hidden_act: Literal["quick_gelu", "gelu"]
    pad_token_id: int
    """49407 (end of text) for SD 1.x, 0 for SD 2.x."""


class ModelConfig(_Strict):
    """One model: its three networks, its parametrisation and its native size in pixels."""

    prediction_type: Literal["epsilon", "v_prediction"]
    resolution: int
    unet: UNetConfig
    vae: VAEConfig
    text_encoder: TextEncoderConfig


class ModelConfigError(ValueError):
    """A model description that is missing or does not fit the schema."""


def load_model_config(name: str) -> ModelConfig:
    """Read `configs/models/<name>.yaml`, or the YAML file at path `name`.

    Raises ModelConfigError, in one sentence that names the file and the field.
    """
    folder = files("configs") / "models"
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path(str(folder / f"{name}.yaml"))
    if not path.is_file():
        known = sorted(
            entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml")
        )
        raise ModelConfigError(
            f"model {name!r} is not known; choose one of {', '.join(known)} or give the path "
            "of a YAML file"
        )
    try:
        return ModelConfig.model_validate(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ModelConfigError(f"{path}: not valid YAML: {error}".replace("\n", " ")) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ModelConfigError(f"{path}: {field}: {first['msg']}") from error
