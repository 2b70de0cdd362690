"""Names and references: ``emoji-ink`` is the newest version, ``emoji-ink@3`` is version 3."""

from __future__ import annotations

import re

from registry.errors import RegistryError

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"


def check_name(name: str) -> None:
    """Raise :class:`RegistryError` unless ``name`` can name a model."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise RegistryError(
            f"{name!r} is not a model name: use 1 to 64 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or a digit"
        )


def parse_reference(reference: str) -> tuple[str, int | None]:
    """Split ``name@version`` into its name and version number, ``None`` for the newest.

    Raises :class:`RegistryError` if the name or the version is malformed.
    """
    name, at, version = reference.partition("@")
    check_name(name)
    if not at:
        return name, None
    if not re.fullmatch(r"[1-9][0-9]{0,7}", version):
        raise RegistryError(
            f"{version!r} in {reference!r} is not a version: "
            f"write a whole number from 1, such as {name}@1"
        )
    return name, int(version)
