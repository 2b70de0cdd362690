"""How a small object is created unless it is there, on the server at hand: found out, not believed.

Of eleven servers that were tried, five answer 200 to a condition that is not met, and one refuses
conditions. What holds is tried once for a bucket and kept in the cache; what the registry was made
with is in its settings, so that all its writers do the same.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from registry.claims import claimed
from registry.errors import RegistryError, os_errors
from registry.s3_client import DAMAGED
from registry.s3_errors import code_of, status_of
from registry.settings import Way

if TYPE_CHECKING:
    from registry.s3 import S3Store

Create = Callable[[str, bytes], bool]

_WAYS: tuple[Way, ...] = ("If-None-Match", "x-obs-forbid-overwrite", "x-oss-forbid-overwrite")
_CONFLICTS = 20
_RACERS, _RACES = 4, 3
_PROBE_DAYS = 30


@dataclass(frozen=True)
class Probe:
    """What a server does with a condition that an object is not there."""

    way: Way
    found: dict[str, str]
    """For each way that was tried, what happened."""

    @property
    def conditions_refused(self) -> bool:
        """A PUT with If-None-Match is an error, so that claims must do without it too."""
        return self.found["If-None-Match"].startswith(_REFUSED)


_REFUSED = "refused: "


def creation(store: S3Store, agreed: Way | None) -> Create:
    """The function that creates an object of this store, in the way that the registry's writers
    have agreed upon if they have; probes the server if it is not known.

    Raises RegistryError if that way does not hold here: others may write in it all the same.
    """
    found = probed(store)
    if agreed not in (None, "claims", found.way):
        raise RegistryError(
            f"{store.place.words}: this registry was made where {agreed} keeps two pushes from one "
            f"version, and here it does not ({found.found.get(agreed, 'another way holds')}); copy "
            "its versions into a new registry, or see lora-registry doctor"
        )
    return _ways(store, found)[agreed or found.way]


def probed(store: S3Store) -> Probe:
    """What the server does, as it is remembered or found out now."""
    return _remembered(store) or probe_anew(store)


def probe_anew(store: S3Store) -> Probe:
    """What the server does, found out now, and remembered for this machine."""
    return _remember(store, probe(store))


def probe(store: S3Store) -> Probe:
    """Try each way on keys of one's own under probe/, with racing writers.

    Raises RegistryError if the bucket cannot be written, or what it does tells nothing.
    """
    found: dict[str, str] = {}
    for way, create in _ways(store, None).items():
        found[way] = _tried(store, create)
        if found[way] == "holds":
            return Probe(way, found)
    return Probe("claims", found)


def _tried(store: S3Store, create: Create) -> str:
    """What a way does. An answer that was lost tells nothing against it: the write is made again,
    and refused by what it has written itself."""
    folder, keys = f"probe/{uuid.uuid4().hex}", []
    try:
        keys.append(f"{folder}/twice")
        try:
            with store.errors("write objects"):
                if not create(keys[0], b"first") and store.read(keys[0]) != b"first":
                    raise _tells_nothing(store, keys[0])
                if create(keys[0], b"second") or store.read(keys[0]) != b"first":
                    return "ignored"
        except RegistryError as error:
            code = _refusal(error)
            if code is None:
                raise
            return f"{_REFUSED}{code}"
        with ThreadPoolExecutor(_RACERS) as pool:
            for number in range(_RACES):
                keys.append(f"{folder}/race{number}")
                bodies = [str(writer).encode() for writer in range(_RACERS)]
                told = list(pool.map(create, [keys[-1]] * _RACERS, bodies))
                stored = store.read(keys[-1])
                if stored not in bodies:
                    raise _tells_nothing(store, keys[-1])
                if any(won and body != stored for won, body in zip(told, bodies, strict=True)):
                    return f"not for writers at once: {told.count(True)} of {_RACERS} were told so"
        return "holds"
    finally:
        for key in keys:
            with contextlib.suppress(RegistryError):
                store.delete(key)


def _refusal(error: RegistryError) -> str | None:
    """By which code a server says that it does not know a condition, None if it does not say so."""
    from botocore.exceptions import ClientError

    cause = error.__cause__
    if not isinstance(cause, ClientError) or code_of(cause) in DAMAGED:
        return None
    return code_of(cause) if status_of(cause) in (400, 501) else None


def _tells_nothing(store: S3Store, key: str) -> RegistryError:
    return RegistryError(
        f"{store.place.words}: the server says that {key} is there, and it is not what was written "
        "to it; try again, or use another one"
    )


def _ways(store: S3Store, found: Probe | None) -> dict[Way, Create]:
    """The ways that can be tried, and with what was found also claims."""
    ways: dict[Way, Create] = {
        "If-None-Match": lambda key, data: _conditional(store, key, data, None),
        "x-obs-forbid-overwrite": lambda key, data: _conditional(
            store, key, data, "x-obs-forbid-overwrite"
        ),
        "x-oss-forbid-overwrite": lambda key, data: _conditional(
            store, key, data, "x-oss-forbid-overwrite"
        ),
    }
    if found is not None:
        refused = found.conditions_refused
        ways["claims"] = lambda key, data: claimed(store, key, data, refused)
    return ways


def _conditional(store: S3Store, key: str, data: bytes, header: str | None) -> bool:
    """A PUT that fails if the object is there: 412, or for the headers of clouds 409."""
    from botocore.exceptions import ClientError

    with store.errors("write objects"):
        for attempt in range(_CONFLICTS):
            try:
                if header is None:
                    store.put(key, data, IfNoneMatch="*")
                else:
                    store.put_with_header(key, data, header)
                return True
            except ClientError as error:
                if status_of(error) == 412 or code_of(error) in (
                    "FileAlreadyExists",
                    "ObjectAlreadyExists",
                ):
                    return False
                if status_of(error) != 409:
                    raise
            # Another write is under way, and has perhaps not won: 409 is not yet "taken".
            time.sleep(random.uniform(0, 0.05 * 2 ** min(attempt, 6)))
    raise RegistryError(f"{store.place.words}: {key} is written by others all the time; try again")


def _remembered(store: S3Store) -> Probe | None:
    path = store.cache.documents(store.place.words) / "creation.json"
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        if time.time() - path.stat().st_mtime < _PROBE_DAYS * 86400:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return Probe(**values)
    return None


def _remember(store: S3Store, found: Probe) -> Probe:
    path = store.cache.documents(store.place.words) / "creation.json"
    with os_errors(f"write to the cache {store.cache.folder}"):
        store.cache.keep(path, json.dumps(asdict(found)).encode())
    return found
