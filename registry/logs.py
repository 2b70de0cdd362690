"""Append-only logs in a store: numbered documents, each created unless it is there.

The highest number is what holds now, the others are its history. Nothing but create-if-absent is
needed, so a log is right wherever a version is.
"""

from __future__ import annotations

import getpass
import logging
import re
import socket
import uuid
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from registry import documents, signing
from registry.errors import Damaged, RegistryError
from registry.store import Store

_ATTEMPTS = 1000
_log = logging.getLogger("lora-registry")


class LogEntry(BaseModel):
    """One entry: what was done, by whom and when."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format_version: Literal[1] = 1
    place: str
    """Its own key, so that an entry counts nowhere else."""
    action: Annotated[str, Field(pattern=r"^[a-z-]+$")]
    version: Annotated[int, Field(ge=1)] | None = None
    """What an alias means from now on, None for nothing; what else was acted on."""
    reason: Annotated[str, Field(max_length=1000)] = ""
    facts: dict[str, JsonValue] = {}
    """Of a promotion: the gate, its verdict, whether it was forced."""
    by: str
    at: AwareDatetime
    id: Annotated[str, Field(min_length=1)]
    """Random: a writer tells by it whether an entry is its own."""
    signature: str | None = None
    """By whom it is vouched for; see registry.signing."""


def who() -> str:
    """`user@host`, as far as the machine tells."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def entries(store: Store, folder: str) -> list[LogEntry]:
    """All entries of a log, oldest first. Raises RegistryError if one cannot be read."""
    return [read(store, folder, number) for number in _numbers(store, folder)]


def standing(store: Store, folder: str) -> LogEntry | None:
    """The newest entry that counts, None if none does."""
    return newest(store, folder, _numbers(store, folder))


def newest(store: Store, folder: str, numbers: Sequence[int]) -> LogEntry | None:
    """The same of the entries with these numbers, in their order."""
    read_backwards = (read(store, folder, number) for number in reversed(numbers))
    return next(filter(counts, read_backwards), None)


def counts(entry: LogEntry) -> bool:
    """Does the policy let it count? What was done to a version, and its card, are for those to
    decide who may publish it. Says why not, on the way."""
    try:
        signing.judge(entry.place, model_of(entry.place), entry.signature)
    except RegistryError as error:
        _log.warning("warning: %s; it does not count", error)
        return False
    return True


def model_of(place: str) -> str:
    """The model that a log or an entry is about."""
    return place.split("/")[1]


def append(
    store: Store, folder: str, now: datetime, decide: Callable[[list[LogEntry]], dict[str, Any]]
) -> LogEntry:
    """Add an entry after those that are there, whoever else adds one at the same time.

    `decide` is given them and says the fields of the next one; again, if somebody else was faster.
    It is signed if the user has a key. Raises RegistryError if the values are no entry, the policy
    would not let it count, or the store fails.
    """
    key = signing.own_key()
    kind, of = (*folder.split("/")[2:], "")[:2]
    signing.judge_own(model_of(folder), of if kind == "aliases" else None)
    for _ in range(_ATTEMPTS):
        numbers = _numbers(store, folder)
        before = [read(store, folder, number) for number in numbers]
        number = (numbers[-1] if numbers else 0) + 1
        place = _key(folder, number)
        try:
            entry = LogEntry(place=place, by=who(), at=now, id=uuid.uuid4().hex, **decide(before))
        except ValidationError as error:
            first = error.errors()[0]
            raise RegistryError(f"{first['loc'][0]}: {first['msg']}; correct it") from error
        taken = not store.put_if_absent(place, documents.sealed(entry, key))
        # A store that lost the reply to a write and wrote again finds its own.
        found = read(store, folder, number, fresh=True)
        if found.id == entry.id:
            return found
        if not taken:
            raise RegistryError(
                f"{place}: the registry {store.location} gives something else than was written; it "
                "cannot be trusted"
            )
    raise RegistryError(f"no place in {folder} after {_ATTEMPTS} attempts; check the registry")


def _numbers(store: Store, folder: str) -> list[int]:
    found = (re.fullmatch(r"([0-9]{8})\.json", name) for name in store.names(folder))
    return sorted(int(match[1]) for match in found if match)


def read(store: Store, folder: str, number: int, fresh: bool = False) -> LogEntry:
    """An entry. Raises RegistryError if it is not there, Damaged if it is not that of this
    place."""
    key = _key(folder, number)
    entry = documents.read(store, key, LogEntry, "an entry", fresh)
    if entry.place != key:
        raise Damaged(
            f"{key} in the registry {store.location} is the entry of {entry.place}; restore the "
            "one that was there"
        )
    return entry


def _key(folder: str, number: int) -> str:
    return f"{folder}/{number:08d}.json"
