"""The options that `lora-sample` and `lora-eval` have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from sampler.errors import SampleError
from sampler.picture import SOLVERS, SPACINGS
from sampler.plan import LARGEST_SEED

Command = TypeVar("Command", bound=Callable[..., Any])
Option = Callable[[Command], Command]

LORAS = (
    click.option(
        "--lora",
        "loras",
        multiple=True,
        metavar="NAME[@VERSION|@ALIAS][:WEIGHT]|FILE[:WEIGHT]",
        help="A LoRA in the registry, or a file of any dialect; given again, they are added up. "
        "Without one the --base draws.",
    ),
    click.option(
        "--registry", envvar="LORA_REGISTRY", help="Their registry: a folder or s3://BUCKET/PREFIX."
    ),
)
"""Which LoRAs, and where they are."""

SETTINGS = (
    click.option("--negative", default="", help="What to keep away from."),
    click.option(
        "--seed",
        default=0,
        show_default=True,
        type=click.IntRange(0, LARGEST_SEED),
        help="Seed of the first picture; each further one takes the next.",
    ),
    click.option(
        "--images-per-prompt",
        "per_prompt",
        default=1,
        show_default=True,
        type=click.IntRange(1, 10_000),
        help="Pictures of each prompt.",
    ),
    click.option("--steps", default=20, show_default=True, type=click.IntRange(1, 1000)),
    click.option("--solver", default="dpm++2m", show_default=True, type=click.Choice(SOLVERS)),
    click.option(
        "--spacing",
        type=click.Choice(SPACINGS),
        help="Of the timesteps. Default: the solver's; trailing after zero-terminal SNR.",
    ),
    click.option(
        "--eta",
        type=click.FloatRange(0, 1),
        help="Noise that ddim and euler-a add again. Default: 0 for ddim, 1 for euler-a.",
    ),
    click.option(
        "--scale",
        default=4.0,
        show_default=True,
        type=click.FloatRange(0, 1000),
        help="Classifier-free guidance; 1 turns it off and takes half the time.",
    ),
    click.option(
        "--rescale",
        default=0.0,
        show_default=True,
        type=click.FloatRange(0, 1),
        help="Guidance rescale, against pictures that are too bright; 0.7 is usual.",
    ),
    click.option("--size", metavar="N|WxH", help="Pixels. Default: the model's own."),
)
"""How pictures are drawn."""

BASE = (
    click.option(
        "--base",
        metavar="PATH",
        help="The base model, a folder or a file. Default: the one that the LoRA was trained on.",
    ),
    click.option(
        "--model", help="Which model the base is, if its weights do not say it: sd21-v, …"
    ),
    click.option("--other-base", is_flag=True, help="Draw although --base is not the LoRA's own."),
    click.option(
        "--ignore-unknown", is_flag=True, help="Leave out what the base has no place for."
    ),
)
"""With which base."""

DEVICES = (
    click.option(
        "--precision",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "fp32", "fp16", "bf16"]),
        help="auto: fp16 on Ascend, fp32 on CPU.",
    ),
    click.option(
        "--device-target",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "CPU", "Ascend"]),
    ),
    click.option(
        "--devices", metavar="N|IDS", help="Draw on several devices; the pictures are the same."
    ),
)
"""On what."""


def options(*groups: Sequence[Any]) -> Callable[[Command], Command]:
    """All options of some groups, in their order."""

    def add(command: Command) -> Command:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return add


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`512` or `512x768` as width and height. Raises SampleError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:[xX×](\d{1,5}))?", text)
    if not match:
        raise SampleError(f"--size {text}: expected pixels such as 512 or 512x768")
    return int(match[1]), int(match[2] or match[1])


def parse_weighted(text: str) -> tuple[str, float]:
    """`style@3:0.7` as reference and weight. Raises RegistryError."""
    from registry.weight_tools import weighted

    return weighted(text)


def input_errors() -> tuple[type[Exception], ...]:
    """What the rooms raise for bad input, each with one sentence for the user; those of rooms that
    were not loaded were not raised."""
    import sys

    names = {
        "cluster.errors": "ClusterError",
        "diffusion.config": "ModelConfigError",
        "registry.errors": "RegistryError",
        "weights.files": "WeightsError",
    }
    modules = {module: sys.modules.get(module) for module in names}
    return SampleError, *(getattr(found, names[m]) for m, found in modules.items() if found)
