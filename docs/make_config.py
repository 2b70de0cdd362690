"""Writes docs/config.md from the config schema: `python docs/make_config.py > docs/config.md`."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from trainer.config import RunConfig
from trainer.config_file import section_of

INTRODUCTION = """# The run config

Every key of a run's YAML file. `--set key=value` overrides any of them on the command line, with
dots for nested keys: `--set lora.rank=8`. An unknown key is refused, with the nearest known one
named.
"""


def type_name(annotation: Any) -> str:
    """A type as a reader of YAML would call it."""
    arguments = [a for a in get_args(annotation) if a is not type(None)]
    if str(annotation).startswith("tuple"):
        return "list"
    if not arguments:
        return {str: "text", int: "whole number", float: "number", bool: "true or false"}[
            annotation
        ]
    if isinstance(arguments[0], str):
        return ", ".join(arguments)
    return type_name(arguments[0])


def default_text(value: Any) -> str:
    """A default as YAML, or what its absence means."""
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def rows(model: type[BaseModel], prefix: str) -> list[str]:
    """A table line for each field of a section that is no section itself, or several."""
    lines = []
    for name, field in model.model_fields.items():
        if section_of(field.annotation) and not str(field.annotation).startswith("tuple"):
            continue
        text = " ".join((field.description or "").split())
        default = default_text(field.default)
        lines.append(f"| `{prefix}{name}` | {type_name(field.annotation)} | {default} | {text} |")
    return lines


def sections(model: type[BaseModel], prefix: str = "") -> list[tuple[str, type[BaseModel]]]:
    """Every section below `model` with its dotted key, in order."""
    found = []
    for name, field in model.model_fields.items():
        if section := section_of(field.annotation):
            found += [(f"{prefix}{name}", section), *sections(section, f"{prefix}{name}.")]
    return found


def document() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for key, model in [("", RunConfig), *sections(RunConfig)]:
        summary = " ".join((model.__doc__ or "").split())
        parts.append(f"## {f'`{key}`' if key else 'The run'}\n\n{summary}\n")
        parts.append("| key | type | default | meaning |\n|---|---|---|---|")
        parts.append("\n".join(rows(model, f"{key}." if key else "")) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(document(), end="")
