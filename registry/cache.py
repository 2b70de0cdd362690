"""Blobs and manifests kept on this machine, shared by all its processes.

A blob is named by its digest; one that is being fetched has `.part` after it. Who fetches one holds
the lock of its folder, which the kernel lets go of when that process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from registry.errors import RegistryError, os_errors

_FOLDER = "LORA_REGISTRY_CACHE"
_LIMIT = "LORA_REGISTRY_CACHE_GB"
_DEFAULT_GB = 20.0
_BLOCK = 1 << 20


class Cache:
    """The cache in a folder, `$LORA_REGISTRY_CACHE` or `~/.cache/lora-registry`."""

    def __init__(self, folder: Path, limit: int, offline: bool = False):
        self.folder = folder
        self.limit = limit
        """Bytes of blobs; those that were used least lately go first."""
        self.offline = offline
        self._room: int | None = None
        """Bytes that may come before it is looked at again whether all still fits."""

    def blob(self, sha256: str) -> Path:
        """Where a blob is, or would be."""
        return self.folder / "blobs" / sha256[:2] / sha256

    @contextmanager
    def filling(self, sha256: str) -> Iterator[tuple[Path, bool]]:
        """Yield the file to fill with a blob, and whether it is there already and needs nothing.

        What fills it verifies it; it gets its name when the block ends without an error. Waits for
        another process that fetches the same. Raises RegistryError if the cache cannot be written.
        """
        path = self.blob(sha256)
        with os_errors(f"write to the cache {self.folder}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(path.parent)
        try:
            with os_errors(f"lock the cache {self.folder}"):
                fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists() and _digest(path) == sha256:
                os.utime(path)
                yield path, True
                return
            path.unlink(missing_ok=True)
            part = path.with_suffix(".part")
            yield part, False
            if part.exists():
                with os_errors(f"write to the cache {self.folder}"):
                    size = part.stat().st_size
                    os.replace(part, path)
                    if self._room is None or self._room < size:
                        self._shrink(path)
                    else:
                        self._room -= size
        finally:
            os.close(lock)

    def documents(self, place: str, id: str = "") -> Path:
        """Where documents of a place are kept, and there those of the registry with this id."""
        return self.folder / "documents" / hashlib.sha256(place.encode()).hexdigest()[:16] / id

    def keep(self, path: Path, data: bytes) -> None:
        """Write a document, whole or not at all; one lost with the power is fetched again.

        Raises OSError.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def upload(self, name: str) -> str | None:
        """The id of an upload of this name that has begun and not ended."""
        with (
            os_errors(f"read the cache {self.folder}"),
            contextlib.suppress(FileNotFoundError, ValueError),
        ):
            return self._upload(name).read_text(encoding="ascii") or None
        return None

    def note_upload(self, name: str, id: str | None) -> None:
        """Keep the id of an upload that has begun, None when it has ended. Raises RegistryError."""
        path = self._upload(name)
        with os_errors(f"write to the cache {self.folder}"):
            if id is None:
                path.unlink(missing_ok=True)
            else:
                self.keep(path, id.encode("ascii"))

    def _upload(self, name: str) -> Path:
        return self.folder / "uploads" / hashlib.sha256(name.encode()).hexdigest()[:32]

    def tidy(self, before: datetime) -> None:
        """Remove what was begun before a time and not ended. Raises RegistryError."""
        with os_errors(f"tidy the cache {self.folder}"):
            parts = (self.folder / "blobs").glob("*/*.part")
            notes = (self.folder / "uploads").glob("*")
            signs = (self.folder / "claims").glob("*-*")
            for path in (*parts, *notes, *signs, *(self.folder / "documents").rglob(".*.tmp")):
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < before.timestamp():
                        _remove(path)

    def _shrink(self, newest: Path) -> None:
        """Remove the blobs that were used least lately, whole or in part, until the rest fits the
        limit."""
        found = []
        for path in (self.folder / "blobs").glob("*/*"):
            if path != newest and not path.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):  # another process makes room too
                    state = path.stat()
                    found.append((state.st_mtime, state.st_size, path))
        room = self.limit - newest.stat().st_size
        for _, size, path in sorted(found, reverse=True):
            room -= size
            if room < 0:
                _remove(path)
        # Others fill it too: a hundredth of it may be too much for a moment.
        self._room = min(max(room, 0), self.limit // 100)


def default_cache(offline: bool = False) -> Cache:
    """The user's cache. Raises RegistryError if its limit is no number."""
    folder = os.environ.get(_FOLDER) or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "lora-registry"
    )
    text = os.environ.get(_LIMIT) or str(_DEFAULT_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 <= limit < math.inf:
        raise RegistryError(f"{_LIMIT}: expected a number of GB, found {text!r}; correct it")
    return Cache(Path(folder), int(limit * 1e9), offline)


def _lock(folder: Path) -> int:
    """The open lock of a folder of blobs: one for all that are in it, so that it is never in
    anybody's way and need not be removed."""
    return os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)


def _remove(path: Path) -> None:
    """Remove a file, unless it is part of a blob that somebody fetches right now."""
    if path.suffix != ".part":
        path.unlink(missing_ok=True)
        return
    lock = _lock(path.parent)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_BLOCK):
            digest.update(data)
    return digest.hexdigest()
