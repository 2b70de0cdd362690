"""The run config: a strict schema, read from YAML with overrides; needs no MindSpore."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class ConfigError(ValueError):
    """A config that cannot be used; the message is one sentence with the remedy."""


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )


class BaseModelConfig(_Strict):
    """The model that is fine-tuned."""

    model: str | None = None
    """A name in configs/models (sd15, sd15-v, sd20, sd21, sd21-v, emoji) or the path of a YAML
    file; default: recognised from the weights."""

    weights: str
    """A diffusers folder, an original Stable Diffusion .safetensors file, or a MindSpore .ckpt with
    MindONE's names."""

    allow_nan: bool = False
    """Take weights that hold NaN or infinity."""

    initialise: tuple[Literal["unet", "text_encoder"], ...] = ()
    """Networks that begin with random weights instead; only with `train: all`."""


class DataConfig(_Strict):
    """Images and captions."""

    train: tuple[str, ...]
    """Folders of images, each with .txt captions beside them or a table: metadata.jsonl or
    metadata.csv with file_name and text, or a .csv of MindONE's with dir and text."""

    prefix: str = ""
    """Put before every caption, such as a trigger word: "in sks style, "."""

    validation: str | None = None
    """A folder of held-out images; without it no validation loss is measured."""

    resolution: int | None = Field(None, gt=0)
    """Pixels along each side; default: the model's own."""

    caption_dropout: float = Field(0.0, ge=0, le=1)
    """Share of samples that see an empty caption, so that guidance works; 0.05 to 0.1 is usual."""

    @model_validator(mode="before")
    @classmethod
    def _one_folder(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("train"), str):
            values = {**values, "train": (values["train"],)}
        return values


class LoRAConfig(_Strict):
    """What the adapter is. The update is (alpha / rank) · up · down."""

    rank: int = Field(4, ge=1)
    """Width of the two thin matrices; 4 to 32 is usual. Size and traffic grow with it."""

    alpha: float | None = Field(None, gt=0)
    """Strength; default: the rank, so that the update is not scaled."""

    rank_stabilised: bool = False
    """Scale by alpha / √rank instead of alpha / rank (rsLoRA), for ranks above 32 or so."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the rank's components left out of each sample, against over-fitting."""

    targets: Literal["attention", "transformer"] = "attention"
    """attention: q, k, v and out of the UNet's attention. transformer: kohya's default set, every
    linear and 1×1 convolution of the UNet's transformers (twice the size)."""

    text_encoder: bool = False
    """Adapt the text encoder's attention and MLP as well; its embeddings are then not cached."""

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / √rank."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class OptimizerConfig(_Strict):
    """AdamW."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak rate, for the global batch as it is: it is not scaled with the number of devices."""

    schedule: Literal["constant", "linear", "cosine", "polynomial"] = "cosine"
    """constant, or from the peak to zero at the end: a line, half a cosine, or a parabola."""

    warmup_steps: int = Field(0, ge=0)
    """Steps of linear rise to the peak."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's two moments."""

    eps: float = Field(1e-8, gt=0)
    """AdamW's smallest divisor."""

    weight_decay: float = Field(1e-2, ge=0)
    """Share of each weight taken off per step, times the learning rate."""

    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients longer than this are shortened to it."""

    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Average of the weights over steps, saved in their place; 0 saves the weights themselves."""


class RunConfig(_Strict):
    """One training run."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    """Name of the run and of the LoRA in the registry: lower-case letters, digits, . _ and -."""

    train: Literal["lora", "all"] = "lora"
    """lora: the adapter alone, the base frozen. all: every weight of UNet and text encoder."""

    base: BaseModelConfig
    """What is fine-tuned."""

    data: DataConfig
    """What it learns from."""

    lora: LoRAConfig = LoRAConfig()
    """What the adapter is."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """How it learns."""

    epochs: float | None = Field(None, gt=0)
    """Length: how often each image is seen. Give this or `images`."""

    images: int | None = Field(None, gt=0)
    """Length: how many samples are seen in all."""

    global_batch: int = Field(gt=0)
    """Images in one optimizer step, over all devices. More devices mean less time, not another
    result."""

    micro_batch: int = Field(8, gt=0)
    """Most images on one device at once; memory grows with it. Accumulation follows."""

    min_snr_gamma: float | None = Field(5.0, gt=0)
    """Weight of the loss by signal-to-noise ratio (min-SNR); null weighs all timesteps alike."""

    noise_offset: float = Field(0.0, ge=0, le=1)
    """Noise of this strength that is the same over a whole channel, so that very dark and very
    bright pictures can be learned; 0.05 to 0.1 is usual, 0 is none."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Everything random follows from it."""

    output: str = "runs"
    """Folder in which the run's own folder is made."""

    registry: str | None = None
    """Where the LoRA is published when training is done; null does not publish."""

    save_every: int = Field(500, gt=0)
    """Steps between checkpoints, from which `lora-launch --resume` goes on."""

    keep_checkpoints: int = Field(2, ge=1)
    """How many of the last checkpoints stay."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if (self.epochs is None) == (self.images is None):
            raise ValueError(
                "give either `epochs` or `images`, and not both; --set epochs=null takes one away"
            )
        if self.base.initialise and (self.train != "all" or self.base.model is None):
            raise ValueError("`base.initialise` needs `train: all` and `base.model`")
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `key=value` overrides (dotted keys) and check the result.

    Raises ConfigError: the file or key, what was expected and found, and the nearest known key
    for an unknown one.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such config file; check the path")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: expected YAML, found a syntax error: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    try:
        return RunConfig.model_validate(_scientific(values))
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors()]
        raise ConfigError(f"{path}: " + "; ".join(problems)) from error


def dump_config(config: RunConfig) -> str:
    """The config as YAML that `load_config` reads back to an equal value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: expected key=value, for example --set lora.rank=8")
    *parents, leaf = key.split(".")
    for depth, parent in enumerate(parents):
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            inner = ".".join(parents[: depth + 1])
            raise ConfigError(f"--set {override!r}: `{inner}` is a value, not a section")
    try:
        values[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML; quote it") from error


_SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _scientific(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a string; everybody means the number."""
    if isinstance(value, dict):
        return {key: _scientific(item) for key, item in value.items()}
    if isinstance(value, str) and _SCIENTIFIC.fullmatch(value):
        return float(value)
    return value


def _explain(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = list(_schema_at(location[:-1]))
        near = difflib.get_close_matches(location[-1], known, 1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}"
        return f"unknown key `{key}`; {hint}"
    if problem["type"] == "missing":
        return f"`{key}` is missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"`{key}`: {message}, found {problem['input']!r}" if key else message


def _schema_at(location: Sequence[str]) -> dict[str, Any]:
    fields: dict[str, Any] = RunConfig.model_fields
    for part in location:
        fields = fields[part].annotation.model_fields
    return fields
