"""Aliases: names such as `prod` for a version, with their history.

An alias is an append-only log (registry.logs), so what it meant at any time is known, a change can
be taken back, and of two people who set it at once neither overwrites the other unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from registry import logs
from registry.api import Model, Registry, alias_folder
from registry.errors import RegistryError
from registry.logs import LogEntry
from registry.references import check_alias

SET, PROMOTE, ROLLBACK, REMOVE = "set", "promote", "rollback", "remove"


def aliases(registry: Registry, name: str) -> dict[str, LogEntry]:
    """What each alias of a model means now. Raises RegistryError if there is no such model."""
    return registry.model(name).aliases


def history(registry: Registry, name: str, alias: str) -> list[LogEntry]:
    """All that was done to an alias, oldest first. Raises RegistryError if there is none."""
    check_alias(alias)
    registry.versions(name)
    found = logs.entries(registry.store, alias_folder(name, alias))
    if not found:
        raise _unknown(registry, name, alias)
    return found


def set_alias(
    registry: Registry, name: str, alias: str, version: int, *, reason: str = ""
) -> LogEntry:
    """Let an alias mean a version from now on.

    Raises RegistryError if the alias is malformed, or there is no such version or it is yanked.
    """
    fields = {"action": SET, "version": version, "reason": reason}
    return assign(registry, registry.model(name), alias, version, lambda _: fields)


def assign(
    registry: Registry,
    model: Model,
    alias: str,
    version: int,
    decide: Callable[[list[LogEntry]], dict[str, Any]],
) -> LogEntry:
    """The same for a model that was looked at, with an entry that is decided by what the alias
    meant before; see registry.logs.append."""
    check_alias(alias)
    name = model.name
    if version not in model.versions:
        raise RegistryError(f"{name} has no version {version}; see lora-registry show {name}")
    yanked = model.yanked.get(version)
    if yanked is not None:
        raise RegistryError(f"{name}@{version} is yanked: {yanked}; choose another version")
    return logs.append(registry.store, alias_folder(name, alias), _now(), decide)


def remove_alias(registry: Registry, name: str, alias: str, *, reason: str = "") -> LogEntry:
    """Let an alias mean nothing; its history stays. Raises RegistryError if it means nothing."""
    check_alias(alias)

    def decide(before: list[LogEntry]) -> dict[str, Any]:
        if not before or before[-1].version is None:
            raise _unknown(registry, name, alias)
        return {"action": REMOVE, "version": None, "reason": reason}

    return logs.append(registry.store, alias_folder(name, alias), _now(), decide)


def rollback(registry: Registry, name: str, alias: str, *, reason: str = "") -> LogEntry:
    """Let an alias mean what it meant before; once more, what it meant before that.

    Raises RegistryError if it never meant anything else, or that version is removed or yanked.
    """
    check_alias(alias)
    model = registry.model(name)
    versions, yanked = model.versions, model.yanked

    def decide(before: list[LogEntry]) -> dict[str, Any]:
        if not before:
            raise _unknown(registry, name, alias)
        meant = _meant(before)
        if len(meant) < 2:
            first = "nothing" if meant[-1] is None else f"{name}@{meant[-1]}"
            raise RegistryError(
                f"there is nothing to roll back: {name}@{alias} means {first}, as when it was set "
                "first; set it to another version instead"
            )
        version = meant[-2]
        if version is not None and (version not in versions or version in yanked):
            raise RegistryError(
                f"{name}@{alias} was version {version} before, which is removed or yanked; set it "
                "to another one"
            )
        return {"action": ROLLBACK, "version": version, "reason": reason}

    return logs.append(registry.store, alias_folder(name, alias), _now(), decide)


def _meant(entries: list[LogEntry]) -> list[int | None]:
    """What an alias meant one after the other, without what was taken back."""
    meant: list[int | None] = []
    for entry in entries:
        if entry.action == ROLLBACK:
            meant.pop()
        elif not meant or meant[-1] != entry.version:
            meant.append(entry.version)
    return meant


def _unknown(registry: Registry, name: str, alias: str) -> RegistryError:
    known = ", ".join(registry.store.names(f"models/{name}/aliases")) or "none"
    return RegistryError(f"{name} has no alias {alias!r}; it has {known}; set it first")


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)
