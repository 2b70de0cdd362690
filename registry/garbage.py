"""How gc takes files away without taking one from under a push: both sides of the protocol.

A file that no version needs is marked. Once the mark is older than the grace period gc announces
that it removes the file, looks at the marks once more, removes it if its old mark is still there,
and takes the announcement away. A push takes the marks of its files away before it stores them, and
then, marks or not (somebody else may have taken one away), waits until the removal of none of them
is announced. So either gc misses the mark, or the push sees gc and stores its file after it. A file
without a mark is safe for the grace period, which is longer than a push needs from its look at the
marks to its manifest.

tests/registry/test_registry_gc_protocol.py follows this through every order of requests.
"""

from __future__ import annotations

import logging
import random
import re
import time
import uuid
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta

from registry.errors import RegistryError
from registry.store import Entry, Store

GRACE = timedelta(days=1)
SHORTEST_GRACE = timedelta(hours=1)
"""A push whose last look at the marks is half of this ago looks again."""

_HOLD_SECONDS = 60.0
"""So long gc removes files under one announcement."""
_MOST = 1000
"""Files of one announcement."""
_DEAD = timedelta(minutes=15)
"""An announcement older than this is that of a gc that was killed: until then a request that it
made before `_HOLD_SECONDS` were over may still be tried again."""

_log = logging.getLogger("lora-registry")


def marks(store: Store) -> dict[str, Entry]:
    """The marks, by the digest of the file that they are on."""
    return {entry.key.removeprefix("garbage/"): entry for entry in store.entries("garbage/")}


def mark(store: Store, sha256: str) -> None:
    """Note that no version needs a file."""
    store.put_if_absent(f"garbage/{sha256}", b"no version needs this file\n")


def unmark(store: Store, sha256: str) -> None:
    """Take that back."""
    store.delete(f"garbage/{sha256}")


def spare(store: Store, sha256s: Collection[str]) -> None:
    """From now on no gc removes these files before the grace period is over; those that it has
    marked it may have removed."""
    wanted, said = set(sha256s), False
    for sha256 in wanted.intersection(store.names("garbage")):
        unmark(store, sha256)
    while not wanted.isdisjoint(_announced(store)):
        if not said:
            _log.warning("waiting for a gc that may be removing what is pushed")
        said = True
        time.sleep(random.uniform(0.1, 0.3))


def remove(store: Store, sha256s: Sequence[str], limit: datetime) -> set[str]:
    """Announce it and remove the files whose marks are from before `limit` then; returns them.

    Raises RegistryError if the store fails; the announcement is then left to grow old, since what
    was asked for may still happen.
    """
    removed, waiting = set(), list(sha256s)
    while waiting:
        own, last = f"collecting/{uuid.uuid4().hex}", time.monotonic() + _HOLD_SECONDS
        batch, done = waiting[:_MOST], 0
        store.put_if_absent(own, "\n".join(batch).encode())
        found = marks(store)
        while done < len(batch) and time.monotonic() < last:
            sha256 = batch[done]
            if sha256 in found and found[sha256].modified <= limit:
                store.delete(blob_key(sha256))
                unmark(store, sha256)
                removed.add(sha256)
            done += 1
        store.delete(own)
        waiting = waiting[done:]
        if not done:
            raise RegistryError(
                f"the registry {store.location} takes more than {_HOLD_SECONDS:.0f} s for a few "
                "requests, too long to remove files safely; try again later"
            )
    for entry in _announcements(store, living=False):
        store.delete(entry.key)
    return removed


def blob_key(sha256: str) -> str:
    """Where a file is."""
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def digest_in(key: str) -> str:
    """The digest in the key of a file, nothing if it is another key."""
    match = re.fullmatch(r"blobs/sha256/[0-9a-f]{2}/([0-9a-f]{64})", key)
    return match[1] if match else ""


def _announced(store: Store) -> set[str]:
    """The files of which a gc that may be alive has announced that it removes them."""
    found = (store.read(entry.key, fresh=True) for entry in _announcements(store, living=True))
    return {sha256 for data in found if data for sha256 in data.decode().split()}


def _announcements(store: Store, living: bool) -> list[Entry]:
    found = list(store.entries("collecting/"))
    now = store.now() if found else None
    return [entry for entry in found if now and (now - entry.modified <= _DEAD) is living]
