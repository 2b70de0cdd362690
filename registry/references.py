"""Names and references: ``emoji-ink`` is the newest version, ``emoji-ink@3`` is version 3,
``emoji-ink@prod`` what the alias says, ``emoji-ink@sha256:9f86…`` the version with that file."""

from __future__ import annotations

import re
from dataclasses import dataclass

from registry.errors import RegistryError

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
ALIAS_PATTERN = r"^[a-z][a-z0-9_-]{0,31}$"
_RESERVED = ("latest", "sha256", "base")


@dataclass(frozen=True)
class Reference:
    """What stands for a version; at most one of the last three is set, none for the newest."""

    name: str
    version: int | None = None
    alias: str | None = None
    sha256: str | None = None
    """Of the LoRA's file: 8 to 64 hex digits from the left."""


def check_name(name: str) -> None:
    """Raise :class:`RegistryError` unless ``name`` can name a model."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise RegistryError(
            f"{name!r} is not a model name: use 1 to 64 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or a digit"
        )


def check_alias(alias: str) -> None:
    """Raise :class:`RegistryError` unless ``alias`` can name an alias."""
    if re.fullmatch(r"v?[0-9]+", alias):
        raise RegistryError(f"{alias!r} looks like a version; an alias is a word, such as prod")
    if alias in _RESERVED:
        raise RegistryError(f"{alias!r} has a meaning of its own; choose another alias")
    if not re.fullmatch(ALIAS_PATTERN, alias):
        raise RegistryError(
            f"{alias!r} is not an alias: use 1 to 32 of a-z, 0-9, '_' and '-', beginning with a "
            "letter"
        )


def parse_reference(reference: str) -> Reference:
    """Take a reference apart.

    Raises :class:`RegistryError` if the name or what follows it is malformed.
    """
    name, at, rest = reference.partition("@")
    check_name(name)
    if not at or rest == "latest":
        return Reference(name)
    if rest.startswith("sha256:"):
        digest = rest.removeprefix("sha256:")
        if not re.fullmatch(r"[0-9a-f]{8,64}", digest):
            raise RegistryError(
                f"{rest!r} in {reference!r} is not a digest: write 8 to 64 hex digits, such as "
                f"{name}@sha256:9f86d081"
            )
        return Reference(name, sha256=digest)
    if re.fullmatch(r"[1-9][0-9]{0,7}", rest):
        return Reference(name, version=int(rest))
    if re.fullmatch(ALIAS_PATTERN, rest) and not re.fullmatch(r"v[0-9]+", rest):
        return Reference(name, alias=rest)
    raise RegistryError(
        f"{rest!r} in {reference!r} is not a version: write a whole number from 1, such as "
        f"{name}@1, or an alias, such as {name}@prod"
    )
