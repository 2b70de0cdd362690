"""From what is asked for to the list of pictures, each with its file and its place on a sheet."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from sampler.errors import SampleError
from sampler.picture import SOLVERS, SPACINGS, Picture, Used
from sampler.prompt_file import Prompt

LARGEST_SEED = 2**63 - 1
LARGEST_SIDE = 4096
_LONGEST_NAME = 40


@dataclass(frozen=True)
class Panel:
    """A picture, the file it goes to, and where it stands on the sheet."""

    picture: Picture
    file: str
    block: str
    """Of a grid: what is above it; pictures of one prompt and seed are one block."""
    row: str
    column: str


@dataclass(frozen=True)
class Axis:
    """One side of a grid: a setting and its values, with the words for them."""

    key: str
    values: tuple[Any, ...]
    labels: tuple[str, ...]


def _number(low: float, high: float, kind: type = float) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return parse


def _one_of(known: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise ValueError
        return text

    return parse


_AXES: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "weight": (_number(-10, 10), "a number from -10 to 10"),
    "steps": (_number(1, 1000, int), "a whole number from 1 to 1000"),
    "scale": (_number(0, 1000), "a number from 0"),
    "rescale": (_number(0, 1), "a number from 0 to 1"),
    "eta": (_number(0, 1), "a number from 0 to 1"),
    "seed": (_number(0, LARGEST_SEED, int), "a whole number from 0"),
    "solver": (_one_of(SOLVERS), f"one of {', '.join(SOLVERS)}"),
    "spacing": (_one_of(SPACINGS), f"one of {', '.join(SPACINGS)}"),
    "negative": (str, "text"),
    "prompt": (str, "text"),
    "lora": (str, "NAME@VERSION[:WEIGHT] or a file"),
}


def parse_axis(text: str) -> Axis:
    """`weight=0,0.5,1`: a setting and its values; one with commas in it stands in double quotes.
    Raises SampleError."""
    key, equals, rest = text.partition("=")
    key = key.strip()
    if key not in _AXES or not equals:
        raise SampleError(
            f"--grid {text}: expected SETTING=VALUE,VALUE,…, with one of {', '.join(_AXES)}, such "
            "as --grid weight=0,0.5,1"
        )
    parse, expected = _AXES[key]
    (row,) = csv.reader([rest], skipinitialspace=True) if rest.strip() else [[""]]
    labels = tuple(part.strip() for part in row)
    values = []
    for label in labels:
        try:
            if not label and key != "negative":
                raise ValueError
            values.append(parse(label))
        except ValueError:
            raise SampleError(f"--grid {text}: {key} is {expected}, found {label!r}") from None
    return Axis(key, tuple(values), labels)


def check_size(width: int, height: int, factor: int) -> None:
    """Raise SampleError unless both sides are multiples of what the networks halve them by."""
    if max(width, height) > LARGEST_SIDE:
        raise SampleError(
            f"a picture of {width} × {height}: {LARGEST_SIDE} pixels a side is the most"
        )
    if width % factor or height % factor or width <= 0 or height <= 0:
        near = [max(factor, round(side / factor) * factor) for side in (width, height)]
        raise SampleError(
            f"a picture of {width} × {height}: both sides must be multiples of {factor} for this "
            f"model; use {near[0]} × {near[1]}"
        )


def pictures(
    plain: Picture,
    prompts: Sequence[Prompt],
    per_prompt: int,
    axes: Sequence[Axis],
    compare: bool,
    used: Mapping[str, Used],
) -> list[Panel]:
    """Every picture that is asked for, in the order in which they are drawn.

    `plain` has the settings that a prompt does not give itself, and the seed of the first picture:
    each further one takes the next. `used` has the LoRAs that an axis names. With `compare` each
    is also drawn by the base alone. Raises SampleError if there are seeds that are too large, or a
    grid has nothing to vary.
    """
    keys = {axis.key for axis in axes}
    if "prompt" in keys:
        if prompts:
            raise SampleError("--grid prompt= takes the place of --prompt; leave that out")
        prompts = [Prompt("")]
    if "seed" in keys and per_prompt > 1:
        raise SampleError("--grid seed= takes the place of --images-per-prompt; leave that out")
    if "weight" in keys and not plain.loras and "lora" not in keys:
        raise SampleError("--grid weight= needs a --lora whose weight it is")
    found: list[Panel] = []
    seed = plain.seed
    for prompt in prompts:
        for number in range(per_prompt):
            one = replace(plain, prompt=prompt.text, seed=seed, **_settings(prompt))
            if "seed" in prompt.settings:
                one = replace(one, seed=prompt.settings["seed"] + number)
            seed += 1
            if one.seed > LARGEST_SEED:
                raise SampleError(f"the seed {one.seed} is above {LARGEST_SEED}; use a smaller one")
            title = one.prompt if per_prompt == 1 else f"{one.prompt} (seed {one.seed})"
            if axes and "seed" not in keys:
                title = f"{one.prompt}, seed {one.seed}" if one.prompt else f"seed {one.seed}"
            found += _cells(one, title, axes, compare, used, len(found))
    return found


def _settings(prompt: Prompt) -> dict[str, Any]:
    return {key: value for key, value in prompt.settings.items() if key != "seed"}


def _cells(
    one: Picture,
    title: str,
    axes: Sequence[Axis],
    compare: bool,
    used: Mapping[str, Used],
    first: int,
) -> list[Panel]:
    """The pictures of one prompt and seed."""
    cells: list[tuple[Picture, str, str]] = [(one, _names(one.loras), title)]
    if axes:
        columns, rows = axes[0], axes[1] if len(axes) > 1 else None
        cells = []
        for row in range(len(rows.values) if rows else 1):
            for column in range(len(columns.values)):
                chosen = [(columns, column), *([(rows, row)] if rows else [])]
                picture = one
                # Which LoRA comes before how much of it.
                for axis, number in sorted(chosen, key=lambda one: one[0].key != "lora"):
                    picture = _varied(picture, axis, number, used)
                label = f"{rows.key} {rows.labels[row]}" if rows else _names(one.loras)
                cells.append((picture, label, f"{columns.key} {columns.labels[column]}"))
    found: list[Panel] = []
    for picture, row, column in cells:
        if compare:
            base = replace(picture, loras=())
            found.append(_panel(base, first + len(found), title, "base", column, "-base"))
        found.append(_panel(picture, first + len(found), title, row, column))
    return found


def _varied(picture: Picture, axis: Axis, number: int, used: Mapping[str, Used]) -> Picture:
    value = axis.values[number]
    if axis.key == "weight":
        loras = tuple(replace(lora, weight=value) for lora in picture.loras)
        return replace(picture, loras=loras)
    if axis.key == "lora":
        return replace(picture, loras=(*picture.loras, used[value]))
    return replace(picture, **{axis.key: value})


def _names(loras: Sequence[Used]) -> str:
    return (
        " + ".join(
            used.name if used.weight == 1 else f"{used.name}:{used.weight:g}" for used in loras
        )
        or "base"
    )


def _panel(
    picture: Picture, number: int, block: str, row: str, column: str, kind: str = ""
) -> Panel:
    words = re.sub(r"[^a-z0-9]+", "-", picture.prompt.lower())[:_LONGEST_NAME].strip("-")
    file = f"{number + 1:04d}-{words or 'picture'}-{picture.seed}{kind}.png"
    return Panel(picture, file, block, row, column)


_OF_A_PASS = tuple(
    field.name
    for field in fields(Picture)
    if field.name not in ("prompt", "negative", "seed", "loras", "row")
)
"""What pictures that are drawn in one pass have in common, beside their LoRAs."""


def batches_of(pictures: Sequence[Picture], tokens: Callable[[Picture], int]) -> list[list[int]]:
    """Numbers of pictures that can be drawn in one pass, at most `batch` each: same LoRAs, same
    settings, as many `tokens` of text. In the order of their first ones, those with the same LoRAs
    next to each other."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for number, picture in enumerate(pictures):
        settings = [getattr(picture, name) for name in _OF_A_PASS]
        key = (picture.loras, *settings, tokens(picture))
        groups.setdefault(key, []).append(number)
    order = {loras: n for n, loras in enumerate(dict.fromkeys(key[0] for key in groups))}
    batches = []
    for key in sorted(groups, key=lambda key: order[key[0]]):
        size = pictures[groups[key][0]].batch
        batches += [groups[key][i : i + size] for i in range(0, len(groups[key]), size)]
    return batches
