"""`lora-launch data-check`: look at all data of a config, without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusion.config import ModelConfig, load_model_config
from diffusion.tokenizer import Tokenizer, clip_vocabulary
from launcher.errors import LaunchError
from trainer import dataset
from trainer.check import Report, report
from trainer.config import RunConfig
from trainer.config_file import load_config
from trainer.plan import open_run_base, pixel_unit, run_model

_UNIT = 64
"""Pixels that sides are multiples of in every published Stable Diffusion."""


def check_data(path: Path, overrides: Sequence[str] = ()) -> Report:
    """The report on the data of a config; its base need not be at hand.

    Raises what `load_config`, `open_run_base` and `run_model` do, and LaunchError if nothing says
    at which resolution to train.
    """
    config = load_config(path, overrides)
    model = _model(config)
    resolution = config.data.resolution or (model.resolution if model else None)
    if resolution is None:
        raise LaunchError(
            f"{config.base.weights}: expected the base, to see at which resolution it is trained, "
            "found nothing there; give it with --set data.resolution=512, or name base.model"
        )
    unit = pixel_unit(model) if model else _UNIT
    scan = dataset.scan(config.data, resolution, unit, config.global_batch)
    tokenizer = Tokenizer(clip_vocabulary())

    def tokens(captions: Sequence[str]) -> list[int]:
        return [tokenizer.token_count(caption) for caption in captions]

    return report(scan, tokens, config.global_batch)


def _model(config: RunConfig) -> ModelConfig | None:
    """The model, from the base's weights or by its name; None if there is neither."""
    if Path(config.base.weights).exists():
        return run_model(config, open_run_base(config))[1]
    return load_model_config(config.base.model) if config.base.model else None
