"""Claims: how an object is created by one writer only, on a server that knows no conditions.

Who wants to create a key lists its claims, adds one of its own, and writes when its own stands
alone. A claim is of no account any more if its holder is known to be gone: a claim whose holder
shares this machine and cache is looked up there, any other has to grow old.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from registry.cache import Cache
from registry.errors import RegistryError, os_errors
from registry.s3_client import DAMAGED, ONCE_SECONDS
from registry.s3_errors import code_of, status_of

if TYPE_CHECKING:
    from registry.s3 import S3Store

_HOLD_SECONDS = 5.0
"""Who has held a claim for longer than this does not write."""
_IN_HAND_SECONDS = 45.0
"""So long what stands between a client and the server may keep a write for which nobody waits."""
CLAIM_SECONDS = _HOLD_SECONDS + ONCE_SECONDS + _IN_HAND_SECONDS
"""Until then a write under a claim can come to pass; an older one is that of a process that died.
By the server's clock, which tells whole seconds."""
_WAIT_SECONDS = 180.0
_UNKNOWN = (500, 502, 504)
"""What a server, or a gateway before it, says of a write that can still come to pass."""
_WRITING = b"writing"


@dataclass
class Sign:
    """That the holder of a claim lives, and whether a write may be on its way."""

    name: str
    file: int
    errors: str
    unsettled: bool = False

    def writes(self) -> None:
        """From now on a write may be on its way, whatever becomes of this process."""
        self.unsettled = True
        with os_errors(self.errors):
            os.write(self.file, _WRITING)
            os.fsync(self.file)


class Signs:
    """What the processes of a machine that share a cache say of their claims: a file for each
    claim, locked while its holder lives, that tells whether a write under it may be on its way.

    The files of another machine tell nothing, for a network's file system may keep locks to each
    machine, and who is locked out here would seem to be dead there.
    """

    def __init__(self, cache: Cache):
        self._folder = cache.folder / "claims"
        self._errors = f"write to the cache {cache.folder}"
        with os_errors(self._errors):
            self._folder.mkdir(parents=True, exist_ok=True)
            mine = self._folder / "id"
            if not mine.exists():
                new = self._folder / f".{uuid.uuid4().hex}"
                new.write_text(uuid.uuid4().hex[:16], encoding="ascii")
                with contextlib.suppress(FileExistsError):
                    os.link(new, mine)
                new.unlink()
            self.cache_id = _of_this_machine(mine.read_text(encoding="ascii"))

    @contextlib.contextmanager
    def held(self) -> Iterator[Sign]:
        """A sign for a new claim. It goes with the block, unless a write is unsettled."""
        name = f"{time.time_ns():020d}-{self.cache_id}-{uuid.uuid4().hex}"
        with os_errors(self._errors):
            file = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        sign = Sign(name, file, self._errors)
        try:
            with os_errors(self._errors):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield sign
        finally:
            if not sign.unsettled:
                (self._folder / name).unlink(missing_ok=True)
            os.close(file)

    def over(self, name: str) -> bool:
        """Is the holder of the claim known to have done nothing under it that can still come to
        pass, and to do nothing any more?"""
        if f"-{self.cache_id}-" not in name:
            return False
        path = self._folder / name
        try:
            file = os.open(path, os.O_RDWR)
        except FileNotFoundError:  # withdrawn, and what arrives of it comes late
            return True
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            over = not os.read(file, len(_WRITING))
            if over:
                path.unlink(missing_ok=True)
            return over
        except OSError:
            return False
        finally:
            os.close(file)


def _of_this_machine(cache_id: str) -> str:
    """The id of a cache as this machine, since it was switched on, has it."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        machine = socket.gethostname()
    return hashlib.sha256(f"{cache_id}{machine}".encode()).hexdigest()[:16]


def claimed(store: S3Store, key: str, data: bytes, refused: bool) -> bool:
    """Claim the key, write if nobody else claims it; `refused`: the server takes no conditions.

    If two writers saw but their own claims, each would have listed before the other had written
    its claim, which cannot be where a listing shows what has been written. Of several claims all
    but the oldest are withdrawn, so that one of them gets its turn. Raises RegistryError if the
    server does not list what was written, or others hold the key all the time.
    """
    signs = Signs(store.cache)
    folder, deadline = f"claims/{key}/", time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline:
        if store.size(key) is not None:
            return False
        waiting = _living(store, folder, signs)
        if not waiting:
            with signs.held() as sign:
                own = f"{folder}{sign.name}"
                last = time.monotonic() + _HOLD_SECONDS
                written = None
                try:
                    with store.errors("write objects"):
                        store.put(own, b"")
                    waiting = _until_alone(store, folder, own, last)
                    if not waiting:
                        written = _write_alone(store, key, data, refused, last, sign)
                except _Unsettled:
                    raise
                except RegistryError:
                    sign.unsettled = False
                    _withdraw(store, own)
                    raise
                sign.unsettled = False
                _withdraw(store, own)
            if written is not None:
                return written
        time.sleep(random.uniform(0.05, 0.1) * len(waiting))
    raise RegistryError(
        f"{store.place.words}: others claim {key} all the time; try again, or remove "
        f"{store.place.location}/{folder} if nobody pushes"
    )


def _withdraw(store: S3Store, claim: str) -> None:
    """Remove one's own claim, which is of no account any more."""
    with contextlib.suppress(RegistryError):
        store.delete(claim)


def _living(store: S3Store, folder: str, signs: Signs) -> list[str]:
    """The claims under a key, oldest first, after those that are of no account are removed."""
    living = []
    for claim in store.entries(folder):
        if signs.over(claim.key.removeprefix(folder)):
            store.delete(claim.key)
        else:
            living.append(claim)
    if not living:
        return []
    now, found = store.now(), []
    for claim in living:
        if now - claim.modified > timedelta(seconds=CLAIM_SECONDS):
            store.delete(claim.key)
        else:
            found.append(claim.key)
    return found


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


class _Unsettled(RegistryError):
    """A write of which nobody knows whether it has come to pass, or still will."""


def _write_alone(
    store: S3Store, key: str, data: bytes, refused: bool, last: float, sign: Sign
) -> bool | None:
    """Write the object if it is still not there; None if nothing was written before `last`.

    A write whose answer is lost is made again with the same bytes, which does no harm. Raises
    _Unsettled where it remains unknown: the claim has to grow old then, for the write can come to
    pass until it has. Raises RegistryError if the server refuses.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    if store.size(key) is not None:
        return False
    sign.writes()
    unknown: Exception | None = None
    while time.monotonic() < last:
        try:
            with store.errors("write objects"):
                store.put_once(key, data, **({} if refused else {"IfNoneMatch": "*"}))
            return True
        except RegistryError as error:
            cause = error.__cause__
            if isinstance(cause, BotoCoreError):
                unknown = error
            elif not isinstance(cause, ClientError):
                raise
            elif status_of(cause) == 412:  # by whom it was written, the reader sees
                return False
            elif status_of(cause) in _UNKNOWN:
                unknown = error
            elif status_of(cause) in (409, 503) or code_of(cause) in DAMAGED:
                pass  # it was not followed
            elif unknown is None:
                raise
            else:
                break
        time.sleep(random.uniform(0.02, 0.1))
    if unknown is not None:
        raise _Unsettled(f"{unknown}; {key} may be written all the same, or still be") from unknown
    return None
