"""What a Stable Diffusion model is made of, read from YAML; needs no MindSpore.

The fields carry the names and meanings of the published diffusers and transformers configs.
"""

from __future__ import annotations

from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from weights.base import Base


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
    upcast_attention: bool = False
    """Attention probabilities in float32, even where the network computes in half precision."""
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


def model_names() -> list[str]:
    """The models of `configs/models`, sorted."""
    folder = files("configs") / "models"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_model_config(name: str) -> ModelConfig:
    """Read `configs/models/<name>.yaml`, or the YAML file at path `name`.

    Raises ModelConfigError, in one sentence that names the file and the field.
    """
    folder = files("configs") / "models"
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path(str(folder / f"{name}.yaml"))
    if not path.is_file():
        raise ModelConfigError(
            f"model {name!r} is not known; choose one of {', '.join(model_names())} or give the "
            "path of a YAML file"
        )
    try:
        return ModelConfig.model_validate(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ModelConfigError(f"{path}: not valid YAML: {error}".replace("\n", " ")) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ModelConfigError(f"{path}: {field}: {first['msg']}") from error


def difference(config: ModelConfig, base: Base) -> str | None:
    """The first thing in which a base's weights differ from a model; None if they are its."""
    for network, found in base.networks.items():
        expected = getattr(config, network)
        for field in fields(found.structure):
            ours, theirs = getattr(expected, field.name), getattr(found.structure, field.name)
            if ours != theirs:
                return f"its {network} has {field.name} {theirs}, the model has {ours}"
    return None


def recognise(base: Base, model: str | None = None) -> tuple[str, ModelConfig]:
    """The name and config of the model whose weights `base` holds.

    With `model` it is that one, if the weights fit. Else it is the one of `configs/models` with
    the same networks; which parametrisation it has is said by the base's own files, and is
    epsilon for Stable Diffusion 1.x. Raises ModelConfigError, with how to say it, if that does
    not settle it.
    """
    if model is not None:
        config = load_model_config(model)
        if problem := difference(config, base):
            raise ModelConfigError(
                f"{base.path}: these are not the weights of base.model {model}: {problem}; leave "
                "base.model out to have it recognised"
            )
        return model, config
    known = {name: load_model_config(name) for name in model_names()}
    fitting = {name: config for name, config in known.items() if not difference(config, base)}
    if not fitting:
        raise ModelConfigError(
            f"{base.path}: its networks are of no model in configs/models ({base.family}: "
            f"{base.networks['unet'].structure}); describe it in a YAML file like those and name "
            "that as base.model"
        )
    kinds = {config.prediction_type for config in fitting.values()}
    if len(kinds) > 1:
        kind = base.prediction.type if base.prediction else None
        if kind is None and base.family == "Stable Diffusion 1.x":
            kind = "epsilon"
        if kind is None:
            choices = (f"{name} ({config.prediction_type})" for name, config in fitting.items())
            raise ModelConfigError(
                f"{base.path}: this is {base.family}, but nothing in it says whether it predicts "
                f"epsilon or v; say it with base.model: {', '.join(choices)}"
            )
        fitting = {name: c for name, c in fitting.items() if c.prediction_type == kind}
    return list(fitting.items())[-1]
