"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_CHUNK = 1 << 20


@contextmanager
def written_beside(
    path: Path,
    write: Callable[[BinaryIO], object],
    mode: int = 0o666,
    synced: bool = True,
) -> Iterator[Path]:
    """Yield a complete temporary file in the folder of ``path``, made if need be.

    The block gives the file its name by ``os.link`` or ``os.replace``; whatever happens, the
    temporary name is gone afterwards. ``mode`` is subject to the umask. Unless it is ``synced``,
    it may be lost with the power, like any copy.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            if synced:
                os.fsync(descriptor)
        yield temporary
        if synced:
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Is it the name of a file that did not get its own, because its writer was killed or still
    writes?"""
    return name.startswith(".") and name.endswith(".tmp")


def copy_hashing(
    source: Path, target: BinaryIO, progress: Callable[[int], object] = lambda _: None
) -> str:
    """Copy ``source`` into ``target`` and return the SHA-256 of what was copied, in hex.

    ``progress`` is called with the number of bytes of each block.
    """
    digest = hashlib.sha256()
    with source.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            target.write(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def copy_whole(source: Path, target: BinaryIO) -> None:
    """Copy ``source`` into ``target``. Raises OSError if not all of it arrives."""
    with source.open("rb") as file:
        shutil.copyfileobj(file, target, _CHUNK)
        if file.tell() != target.tell():
            raise OSError(errno.EIO, "the copy is shorter than the file", str(source))


def _sync_folder(folder: Path) -> None:
    """Make a new name in ``folder`` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
