"""Writes docs/config.md from the config schema: `python docs/make_config.py > docs/config.md`."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from trainer.config import RunConfig

INTRODUCTION = """# The run config

Every key of a run's YAML file. `--set key=value` overrides any of them on the command line, with
dots for nested keys: `--set lora.rank=8`. An unknown key is refused, with the nearest known one
named.
"""


def type_name(annotation: Any) -> str:
    """A type as a reader of YAML would call it."""
    arguments = [a for a in get_args(annotation) if a is not type(None)]
    if not arguments:
        return {str: "text", int: "whole number", float: "number", bool: "true or false"}[
            annotation
        ]
    if isinstance(arguments[0], str):
        return ", ".join(arguments)
    if str(annotation).startswith("tuple"):
        return "list"
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
    """A table line for each plain field of a section."""
    lines = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        text = " ".join((field.description or "").split())
        default = default_text(field.default)
        lines.append(f"| `{prefix}{name}` | {type_name(field.annotation)} | {default} | {text} |")
    return lines


def document() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    sections: list[tuple[str, type[BaseModel], str]] = [("The run", RunConfig, "")]
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections.append((f"`{name}`", field.annotation, f"{name}."))
    for title, model, prefix in sections:
        summary = " ".join((model.__doc__ or "").split())
        parts.append(f"## {title}\n\n{summary}\n")
        parts.append("| key | type | default | meaning |\n|---|---|---|---|")
        parts.append("\n".join(rows(model, prefix)) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(document(), end="")
