"""What becomes of a version after it was published: yanked, unyanked, removed; and who did it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from registry import logs
from registry.api import Model, Registry, state_folder
from registry.errors import RegistryError
from registry.logs import LogEntry
from registry.models import in_parallel, listings
from registry.references import check_name


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
    model, version = registry.placed(reference)

    def decide(before: list[LogEntry]) -> dict[str, Any]:
        last = _standing(before)
        if last and last.action == "yank":
            raise RegistryError(f"{model.name}@{version} is yanked already: {last.reason}")
        return {"action": "yank", "version": version, "reason": reason}

    return _note(registry, model, version, decide)


def unyank(registry: Registry, reference: str, reason: str = "") -> LogEntry:
    """Take that back. Raises RegistryError if the version is not yanked."""
    model, version = registry.placed(reference)

    def decide(before: list[LogEntry]) -> dict[str, Any]:
        last = _standing(before)
        if last is None or last.action != "yank":
            raise RegistryError(f"{model.name}@{version} is not yanked; nothing was done")
        return {"action": "unyank", "version": version, "reason": reason}

    return _note(registry, model, version, decide)


def remove(registry: Registry, reference: str, reason: str = "", force: bool = False) -> LogEntry:
    """Remove a version, also one whose manifest cannot be read. Its number is not given again; its
    file goes with the next gc.

    Raises RegistryError if the reference names no version or digest, or if an alias means it and
    it is not forced.
    """
    if "@" not in reference:
        raise RegistryError(f"{reference}: name the version to remove, such as {reference}@1")
    model, version = registry.placed(reference)
    meaning = model.meaning(version)
    if meaning and not force:
        raise RegistryError(
            f"{model.name}@{version} is what {', '.join(meaning)} means; set the alias to another "
            "version first, or --force"
        )
    fields = {"action": "remove", "version": version, "reason": reason}
    return _note(registry, model, version, lambda _: fields)


def log(registry: Registry, name: str) -> list[Event]:
    """All that was done to a model, oldest first, also to versions that are removed. Raises
    RegistryError if there is none."""
    check_name(name)
    found = listings(registry.store, name).get(name)
    if found is None:
        registry.model(name)  # which says what there is instead
        return []
    events = [
        Event(manifest.created, manifest.pushed_by, f"push {manifest.reference}", "")
        for manifest in registry.readable([(name, version) for version in found.versions])
    ]
    places = [(log, number) for log, numbers in found.logs.items() for number in numbers]

    def one(place: tuple[str, int]) -> Event:
        log, number = place
        entry = logs.read(registry.store, f"models/{name}/{log}", number)
        return Event(entry.at, entry.by, _said(entry, name, log), entry.reason)

    return sorted([*events, *in_parallel(one, places)], key=lambda event: event.at)


def _said(entry: LogEntry, name: str, log: str) -> str:
    """What an entry of a log says was done."""
    kind, _, alias = log.partition("/")
    version = "nothing" if entry.version is None else f"{name}@{entry.version}"
    text = f"{entry.action} {version}"
    if kind == "aliases":
        text = f"{entry.action} {name}@{alias}: {version}"
    elif kind == "events":
        text += f" as {entry.facts.get('alias')}"
    if gate := entry.facts.get("gate"):
        text += f", gate {gate}"
    return text + (", forced" if entry.facts.get("forced") else "")


def _standing(before: list[LogEntry]) -> LogEntry | None:
    return next(filter(logs.counts, reversed(before)), None)


def _note(registry: Registry, model: Model, version: int, decide: Any) -> LogEntry:
    folder = state_folder(model.name, version)
    return logs.append(registry.store, folder, registry.store.now(), decide)
