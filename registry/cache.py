"""Blobs and manifests kept on this machine, shared by all its processes.

A blob is named by its digest; one that is being fetched has `.part` after it, and who fetches it
holds a lock, which the kernel lets go of when that process ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
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
            lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o666)
        try:
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

    def upload_record(self, name: str) -> Path:
        """Where an upload that has begun is noted."""
        folder = self.folder / "uploads"
        with os_errors(f"write to the cache {self.folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        return folder / hashlib.sha256(name.encode()).hexdigest()[:32]

    def _shrink(self, newest: Path) -> None:
        """Remove the blobs that were used least lately until the rest fits the limit."""
        found = []
        for path in (self.folder / "blobs").glob("*/*"):
            if path.suffix == "" and path != newest:
                state = path.stat()
                found.append((state.st_mtime, state.st_size, path))
        room = self.limit - newest.stat().st_size
        for _, size, path in sorted(found, reverse=True):
            room -= size
            if room < 0:
                path.unlink(missing_ok=True)
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
        raise RegistryError(
            f"{_LIMIT}: expected a number of GB, found {text!r}; correct it"
        ) from None
    return Cache(Path(folder), int(limit * 1e9), offline)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_BLOCK):
            digest.update(data)
    return digest.hexdigest()
