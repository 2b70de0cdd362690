"""What becomes of a version after it was published: yanked, unyanked, removed; and who did it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from registry import logs
from registry.aliases import aliases, history
from registry.api import Registry, state_folder
from registry.errors import RegistryError
from registry.logs import LogEntry


@dataclass(frozen=True)
class Event:
    """Something that was done."""

    at: datetime
    by: str
    text: str
    reason: str


def yank(registry: Registry, reference: str, reason: str) -> LogEntry:
    """Say that a version should not be used; it can still be pulled if that is forced.

    Raises RegistryError without a reason, or if it is yanked already.
    """
    if not reason.strip():
        raise RegistryError("a version is yanked for a reason; give one")
    manifest = registry.resolve(reference)

    def decide(before: list[LogEntry]) -> dict[str, Any]:
        if before and before[-1].action == "yank":
            raise RegistryError(f"{manifest.reference} is yanked already: {before[-1].reason}")
        return {"action": "yank", "version": manifest.version, "reason": reason}

    return _note(registry, manifest.name, manifest.version, decide)


def unyank(registry: Registry, reference: str, reason: str = "") -> LogEntry:
    """Take that back. Raises RegistryError if the version is not yanked."""
    manifest = registry.resolve(reference)

    def decide(before: list[LogEntry]) -> dict[str, Any]:
        if not before or before[-1].action != "yank":
            raise RegistryError(f"{manifest.reference} is not yanked; nothing was done")
        return {"action": "unyank", "version": manifest.version, "reason": reason}

    return _note(registry, manifest.name, manifest.version, decide)


def remove(registry: Registry, reference: str, reason: str = "", force: bool = False) -> LogEntry:
    """Remove a version. Its number is not given again; its file goes with the next gc.

    Raises RegistryError if the reference names no version or digest, or if an alias means it and
    it is not forced.
    """
    if "@" not in reference:
        raise RegistryError(f"{reference}: name the version to remove, such as {reference}@1")
    manifest = registry.resolve(reference)
    meaning = [
        alias
        for alias, entry in aliases(registry, manifest.name).items()
        if entry.version == manifest.version
    ]
    if meaning and not force:
        raise RegistryError(
            f"{manifest.reference} is what {', '.join(meaning)} means; set the alias to another "
            "version first, or --force"
        )
    fields = {"action": "remove", "version": manifest.version, "reason": reason}
    return _note(registry, manifest.name, manifest.version, lambda _: fields)


def log(registry: Registry, name: str) -> list[Event]:
    """All that was done to a model, oldest first. Raises RegistryError if there is none."""
    store, found = registry.store, []
    for manifest in registry.manifests([(name, n) for n in registry.versions(name)]):
        version = manifest.version
        found.append(Event(manifest.created, manifest.pushed_by, f"push {name}@{version}", ""))
    for folder in store.names(f"models/{name}/states"):
        for entry in logs.entries(store, f"models/{name}/states/{folder}"):
            found.append(_event(entry, f"{entry.action} {name}@{entry.version}"))
    for alias in store.names(f"models/{name}/aliases"):
        for entry in history(registry, name, alias):
            means = "nothing" if entry.version is None else f"{name}@{entry.version}"
            forced = ", forced" if entry.facts.get("forced") else ""
            found.append(_event(entry, f"{entry.action} {name}@{alias}: {means}{forced}"))
    for entry in logs.entries(store, f"models/{name}/events"):
        found.append(
            _event(entry, f"{entry.action} {name}@{entry.version} as {entry.facts.get('alias')}")
        )
    return sorted(found, key=lambda event: event.at)


def _event(entry: LogEntry, text: str) -> Event:
    return Event(entry.at, entry.by, text, entry.reason)


def _note(registry: Registry, name: str, version: int, decide: Any) -> LogEntry:
    return logs.append(registry.store, state_folder(name, version), registry.store.now(), decide)
