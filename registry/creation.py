"""How a small object is created unless it is there, on the server at hand: found out, not believed.

Of eleven servers that were tried, five answer 200 to a condition that is not met, and one refuses
conditions. What holds is tried once for a bucket and kept in the cache.
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
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from registry.errors import RegistryError, os_errors
from registry.s3_errors import code_of, status_of

if TYPE_CHECKING:
    from registry.s3 import S3Store

Way = Literal["If-None-Match", "x-obs-forbid-overwrite", "x-oss-forbid-overwrite", "claims"]
Create = Callable[[str, bytes], bool]

_WAYS: tuple[Way, ...] = ("If-None-Match", "x-obs-forbid-overwrite", "x-oss-forbid-overwrite")
_CONFLICTS = 20
_RACERS, _RACES = 4, 3
_PROBE_DAYS = 30
_CLAIM_SECONDS = 25.0
"""A claim older than this is that of a process that died."""
_HOLD_SECONDS = 5.0
"""Who has held a claim for longer than this does not write. A write takes 10 s at most."""
_WAIT_SECONDS = 180.0


@dataclass(frozen=True)
class Probe:
    """What a server does with a condition that an object is not there."""

    way: Way
    found: dict[str, str]
    """For each way that was tried, what happened."""
    conditions_refused: bool
    """A PUT with If-None-Match is an error, so that claims must do without it too."""


def creation(store: S3Store) -> Create:
    """The function that creates an object of this store; probes the server if that is not known."""
    found = _remembered(store) or _remember(store, probe(store))
    return _ways(store, found)[found.way]


def probe(store: S3Store) -> Probe:
    """Try each way on keys of one's own under probe/, with racing writers.

    Raises RegistryError if the bucket cannot be written.
    """
    found: dict[str, str] = {}
    refused = False
    for way in _WAYS:
        found[way] = verdict = _tried(store, _ways(store, None)[way])
        if verdict == "holds":
            return Probe(way, found, refused)
        if way == "If-None-Match":
            refused = verdict != "ignored"
    return Probe("claims", found, refused)


def probe_anew(store: S3Store) -> Probe:
    """The same, remembered for this machine."""
    return _remember(store, probe(store))


def _tried(store: S3Store, create: Create) -> str:
    from botocore.exceptions import ClientError

    folder, keys = f"probe/{uuid.uuid4().hex}", []
    try:
        keys.append(f"{folder}/twice")
        try:
            with store.errors("write objects"):
                if not create(keys[0], b"first"):
                    return "a new object is refused"
                if create(keys[0], b"second"):
                    return "ignored"
        except RegistryError as error:
            cause = error.__cause__
            if isinstance(cause, ClientError) and status_of(cause) in (400, 501):
                return f"refused: {code_of(cause)}"
            raise
        with ThreadPoolExecutor(_RACERS) as pool:
            for number in range(_RACES):
                keys.append(f"{folder}/race{number}")
                bodies = [str(writer).encode() for writer in range(_RACERS)]
                won = list(pool.map(create, [keys[-1]] * _RACERS, bodies))
                if won.count(True) != 1 or store.read(keys[-1]) != bodies[won.index(True)]:
                    return f"not for writers at once: {won.count(True)} of {_RACERS} were told so"
        return "holds"
    finally:
        for key in keys:
            with contextlib.suppress(RegistryError):
                store.delete(key)


def _ways(store: S3Store, probe: Probe | None) -> dict[Way, Create]:
    return {
        "If-None-Match": lambda key, data: _conditional(store, key, data, None),
        "x-obs-forbid-overwrite": lambda key, data: _conditional(
            store, key, data, "x-obs-forbid-overwrite"
        ),
        "x-oss-forbid-overwrite": lambda key, data: _conditional(
            store, key, data, "x-oss-forbid-overwrite"
        ),
        "claims": lambda key, data: _claimed(
            store, key, data, probe is None or probe.conditions_refused
        ),
    }


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


def _claimed(store: S3Store, key: str, data: bytes, refused: bool) -> bool:
    """Claim the key, write if nobody else claims it.

    If two writers saw but their own claims, each would have listed before the other had written
    its claim, which cannot be where a listing shows what has been written. Of several claims all
    but the oldest are withdrawn, so that one of them gets its turn; a claim is that of a dead
    process once it is older than anyone writes under. Raises RegistryError if the server does not
    list what was written, or others hold the key all the time.
    """
    folder, deadline = f"claims/{key}/", time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline:
        if store.size(key) is not None:
            return False
        waiting = _living(store, folder)
        if not waiting:
            own = f"{folder}{time.time_ns():020d}-{uuid.uuid4().hex}"
            last = time.monotonic() + _HOLD_SECONDS
            with store.errors("write objects"):
                store.put(own, b"")
            waiting = _until_alone(store, folder, own, last)
            if not waiting:
                written = _write_alone(store, key, data, refused, last)
                with contextlib.suppress(RegistryError):  # it is of no account any more
                    store.delete(own)
                if written is not None:
                    return written
            else:
                store.delete(own)
        time.sleep(random.uniform(0.05, 0.1) * len(waiting))
    raise RegistryError(
        f"{store.place.words}: others claim {key} all the time; try again, or remove "
        f"{store.place.location}/{folder} if nobody pushes"
    )


def _living(store: S3Store, folder: str) -> list[str]:
    """The claims under a key, oldest first, after those of dead processes are removed."""
    claims = list(store.entries(folder))
    if not claims:
        return []
    now, living = store.now(), []
    for claim in claims:
        if now - claim.modified > timedelta(seconds=_CLAIM_SECONDS):
            store.delete(claim.key)
        else:
            living.append(claim.key)
    return living


def _until_alone(store: S3Store, folder: str, own: str, last: float) -> list[str]:
    """The claims because of which one's own is to be withdrawn; none if it stands alone before
    the time `last`."""
    while True:
        claims = [claim.key for claim in store.entries(folder)]
        if own not in claims:
            raise RegistryError(
                f"{store.place.words}: the server does not list what was just written, and has "
                "no conditional writes, so two pushes could take one version; use another one"
            )
        if time.monotonic() > last or claims[0] != own:
            return claims
        if claims == [own]:
            return []
        time.sleep(random.uniform(0.02, 0.05))


def _write_alone(store: S3Store, key: str, data: bytes, refused: bool, last: float) -> bool | None:
    """Write the object if it is still not there; None if nothing was written before `last`.

    A write whose answer is lost is made again with the same bytes, which does no harm. Raises
    RegistryError where it remains unknown; the claim is then left to grow old.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    if store.size(key) is not None:
        return False
    with store.errors("write objects"):
        unknown: Exception | None = None
        while time.monotonic() < last:
            try:
                store.put_once(key, data, **({} if refused else {"IfNoneMatch": "*"}))
                return True
            except ClientError as error:
                if status_of(error) in (409, 412) and unknown is None:
                    return False
                if status_of(error) < 500:
                    raise
            except BotoCoreError as error:
                unknown = error
            time.sleep(random.uniform(0.02, 0.1))
        if unknown is not None:
            raise unknown
    return None


def _remembered(store: S3Store) -> Probe | None:
    path = store.cache.documents(store.place.words) / "probe.json"
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        if time.time() - path.stat().st_mtime < _PROBE_DAYS * 86400:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return Probe(**values)
    return None


def _remember(store: S3Store, found: Probe) -> Probe:
    path = store.cache.documents(store.place.words) / "probe.json"
    with os_errors(f"write to the cache {store.cache.folder}"):
        store.cache.keep(path, json.dumps(asdict(found)).encode())
    return found
