"""Prompts and their own settings: one a line, with kohya's inline options."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sampler.errors import SampleError

_OPTION = re.compile(r"\s+--(?P<key>[a-zA-Z][\w-]*)(?:\s+|=|$)")
_KEYS: Mapping[str, tuple[str, type]] = {
    "n": ("negative", str),
    "w": ("width", int),
    "h": ("height", int),
    "s": ("steps", int),
    "d": ("seed", int),
    "l": ("scale", float),
}


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what it says of a picture's settings, by the field of Picture."""

    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def _listed(path: Path) -> list[Prompt]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise SampleError(f"{path}: expected a JSON list of prompts; write it as one")
    return [Prompt(text) for text in found]


def parse(line: str, where: str) -> Prompt:
    """`a fox --n blurry --w 512 --h 768 --s 30 --d 7 --l 7.5`: negative prompt, width, height,
    steps, seed and guidance scale. Raises SampleError, beginning with `where`."""
    marks = list(_OPTION.finditer(line))
    ends = [*(mark.start() for mark in marks), len(line)]
    settings: dict[str, Any] = {}
    for mark, end in zip(marks, ends[1:], strict=True):
        key, text = mark["key"].lower(), line[mark.end() : end].strip()
        if key not in _KEYS:
            raise SampleError(
                f"{where}: --{mark['key']} is not known; use --n, --w, --h, --s, --d or --l"
            )
        name, kind = _KEYS[key]
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or (kind is not str and (not math.isfinite(value) or value < 0)):
            expected = "a whole number" if kind is int else "a number"
            raise SampleError(f"{where}: --{key} is {expected}, found {text!r}; correct it")
        settings[name] = value
    return Prompt(line[: ends[0]].strip(), settings)


def read(path: Path) -> list[Prompt]:
    """The prompts of a UTF-8 file, one a line; empty lines and lines that begin with # are left
    out. A .json file is a list of prompts, which are taken as they are. Raises SampleError."""
    try:
        if path.suffix == ".json":
            return _listed(path)
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise SampleError(
            f"{path}: cannot be read ({reason}); name a text file of prompts"
        ) from error
    found = [
        parse(line.strip(), f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not found:
        raise SampleError(f"{path}: expected a prompt on each line, found none; write one")
    return found
