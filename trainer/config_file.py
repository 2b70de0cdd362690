"""From a YAML file and overrides to a run config and back; needs no MindSpore."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from trainer.config import ConfigError, RunConfig


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
    """The fields of the section at a place; the number of a list's item names no field."""
    fields: dict[str, Any] = RunConfig.model_fields
    for part in location:
        if not part.isdecimal():
            section = section_of(fields[part].annotation)
            assert section is not None, location
            fields = section.model_fields
    return fields


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one, may hold one or holds several."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (section_of(argument) for argument in get_args(annotation))
    return next((section for section in found if section), None)
