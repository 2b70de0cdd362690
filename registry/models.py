"""What a listing of a registry tells: which models there are, their versions, states, aliases."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from registry import logs
from registry.logs import LogEntry
from registry.references import NAME_PATTERN
from registry.store import Store

Item = TypeVar("Item")
Result = TypeVar("Result")

_KEY = re.compile(
    r"models/(?P<name>[^/]+)/(?:versions/(?P<version>[0-9]{8})"
    r"|(?P<log>states/[0-9]{8}|aliases/[^/]+)/(?P<number>[0-9]{8}))\.json"
)
_READERS = 16


@dataclass(frozen=True)
class Model:
    """A name and what is published under it."""

    name: str
    versions: tuple[int, ...]
    """Oldest first, without those that were removed."""
    yanked: dict[int, str]
    """Versions that should not be used, with the reasons."""
    aliases: dict[str, LogEntry]
    """What each alias means now."""
    highest: int
    """The highest number that was ever given."""

    @property
    def newest(self) -> int | None:
        """The newest version that is not yanked."""
        return next((n for n in reversed(self.versions) if n not in self.yanked), None)

    def meaning(self, version: int) -> list[str]:
        """The aliases of a version."""
        return [alias for alias, entry in self.aliases.items() if entry.version == version]


def models(store: Store, name: str | None = None) -> list[Model]:
    """Those that have a version, by name; one listing, and a read for each log.

    Raises RegistryError if the store fails or a log cannot be read.
    """
    versions: dict[str, list[int]] = defaultdict(list)
    newest: dict[str, dict[str, int]] = defaultdict(dict)
    for entry in store.entries(f"models/{name}/" if name else "models/"):
        match = _KEY.fullmatch(entry.key)
        if match is None or not re.fullmatch(NAME_PATTERN, match["name"]):
            continue
        if match["version"]:
            versions[match["name"]].append(int(match["version"]))
        else:
            log, number = match["log"], int(match["number"])
            newest[match["name"]][log] = max(number, newest[match["name"]].get(log, 0))
    wanted = [
        (model, log, number) for model in versions for log, number in sorted(newest[model].items())
    ]
    entries: dict[str, dict[str, LogEntry]] = defaultdict(dict)
    for (model, log, _), found in zip(wanted, _read(store, wanted), strict=True):
        entries[model][log] = found
    return [_model(model, versions[model], entries[model]) for model in sorted(versions)]


def _read(store: Store, wanted: Sequence[tuple[str, str, int]]) -> list[LogEntry]:
    def one(place: tuple[str, str, int]) -> LogEntry:
        model, log, number = place
        return logs.read(store, f"models/{model}/{log}", number)

    return in_parallel(one, wanted)


def in_parallel(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`work` on each item, several at a time, in their order."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(work, items))


def _model(name: str, numbers: list[int], entries: dict[str, LogEntry]) -> Model:
    states = {
        int(log.removeprefix("states/")): entry
        for log, entry in entries.items()
        if log.startswith("states/")
    }
    removed = {number for number, entry in states.items() if entry.action == "remove"}
    return Model(
        name,
        tuple(number for number in sorted(numbers) if number not in removed),
        {number: entry.reason for number, entry in states.items() if entry.action == "yank"},
        {
            log.removeprefix("aliases/"): entry
            for log, entry in entries.items()
            if log.startswith("aliases/") and entry.version is not None
        },
        max(numbers),
    )
