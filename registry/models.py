"""What a listing of a registry tells: which models there are, their versions, states, aliases."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TypeVar

from registry import logs
from registry.errors import Damaged
from registry.logs import LogEntry
from registry.references import NAME_PATTERN
from registry.store import Store

Item = TypeVar("Item")
Result = TypeVar("Result")

_KEY = re.compile(
    r"models/(?P<name>[^/]+)/(?:versions/(?P<version>[0-9]{8})"
    r"|(?P<log>(?:states|cards)/[0-9]{8}|aliases/[^/]+|events)/(?P<number>[0-9]{8}))\.json"
)
_READERS = 16
_NEVER = datetime(1970, 1, 1, tzinfo=timezone.utc)
_log = logging.getLogger("lora-registry")


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


@dataclass
class Listing:
    """What the keys of a model say."""

    versions: list[int] = field(default_factory=list)
    """All that were ever given, in order."""
    logs: dict[str, list[int]] = field(default_factory=dict)
    """For each log, such as `aliases/prod`, the numbers of its entries in order."""


def listings(store: Store, name: str | None = None) -> dict[str, Listing]:
    """Of all models that ever had a version, or of one, by name; one listing and no read."""
    found: dict[str, Listing] = defaultdict(Listing)
    for entry in store.entries(f"models/{name}/" if name else "models/"):
        match = _KEY.fullmatch(entry.key)
        if match is None or not re.fullmatch(NAME_PATTERN, match["name"]):
            continue
        listing = found[match["name"]]
        if match["version"]:
            listing.versions.append(int(match["version"]))
        else:
            listing.logs.setdefault(match["log"], []).append(int(match["number"]))
    for listing in found.values():
        for numbers in (listing.versions, *listing.logs.values()):
            numbers.sort()
    return {model: found[model] for model in sorted(found) if found[model].versions}


def models(store: Store, name: str | None = None) -> list[Model]:
    """Those that ever had a version, by name; one listing, and a read for each log.

    What was done to versions counts if the policy lets it. A log whose newest entry is damaged is
    said to be. Raises RegistryError if the store fails.
    """
    found = listings(store, name)
    wanted = [
        (model, log, numbers)
        for model, listing in found.items()
        for log, numbers in listing.logs.items()
        if log.startswith(("states/", "aliases/"))
    ]

    def one(place: tuple[str, str, list[int]]) -> LogEntry | None:
        model, log, numbers = place
        folder = f"models/{model}/{log}"
        try:
            if log.startswith("states/"):
                return logs.newest(store, folder, numbers)
            return logs.read(store, folder, numbers[-1])
        except Damaged as error:
            # The others are listed all the same. A version of which nobody can tell whether it was
            # yanked is not used by chance; an alias that means nobody knows what means nothing.
            _log.warning("warning: %s", error)
            if not log.startswith("states/"):
                return None
            return LogEntry(
                place=folder, action="yank", reason=str(error)[:1000], by="", at=_NEVER, id="none"
            )

    entries: dict[str, dict[str, LogEntry]] = defaultdict(dict)
    for (model, log, _), entry in zip(wanted, in_parallel(one, wanted), strict=True):
        if entry is not None:
            entries[model][log] = entry
    return [_model(model, listing.versions, entries[model]) for model, listing in found.items()]


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
