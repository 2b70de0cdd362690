"""Where a registry keeps its objects: the few operations it needs, and a folder that has them."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from registry.errors import RegistryError, os_errors
from registry.files import copy_hashing, is_temporary, written_beside

if TYPE_CHECKING:
    from registry.manifest import FileEntry
    from registry.settings import Settings

MAX_DOCUMENT_BYTES = 1 << 20
"""No document is larger."""

AT_WORK = timedelta(hours=1)
"""So long a writer may be at one object; what it has begun is not left over."""

Progress = Callable[[int], object]
"""Is called with the number of bytes that have come further."""


def silent(_: int) -> None:
    """Progress that nobody wants to see."""


@dataclass(frozen=True)
class Entry:
    """An object: its key, its size in bytes and when it was written, by the store's clock."""

    key: str
    size: int
    modified: datetime


class Store(Protocol):
    """Objects under keys such as ``models/emoji-ink/versions/00000001.json``.

    No operation changes or removes an object that readers rely on: documents are written once,
    blobs are named by their digest. Every method raises ``RegistryError`` if the store fails.
    """

    @property
    def location(self) -> str:
        """How the user names the store."""

    @property
    def address(self) -> str:
        """The same so that it means this store anywhere: an absolute path, or with the server."""

    verified: bool
    """Has a file of `blob_file` been compared with its digest?"""

    def names(self, prefix: str) -> list[str]:
        """The sorted names directly under ``prefix``; empty if there is nothing."""

    def settle(self, settings: Settings) -> Settings:
        """The settings of a registry that is to be made, with what the store has to say in it."""

    def use(self, settings: Settings) -> None:
        """Keep to the registry's settings from now on. Raises ``RegistryError`` if that cannot
        be."""

    def known(self, prefix: str) -> list[str]:
        """Names directly under ``prefix`` that are there, perhaps not all, without asking
        anybody."""

    def read(self, key: str, fresh: bool = False) -> bytes | None:
        """A document, or ``None`` if it is not there; ``fresh`` is not from a cache.

        Of an object that is larger than a document a byte too much is read. Raises
        ``RegistryError`` if nobody may be asked, and it is not known from before.
        """

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write a small object unless the key is taken, whole or not at all.

        Of several writers of one key exactly one is told ``True``.
        """

    def put_blob(
        self,
        key: str,
        source: Path,
        entry: FileEntry,
        progress: Progress = silent,
    ) -> None:
        """Store the file ``source``, whole or not at all, if need be.

        Raises ``RegistryError`` if the bytes of ``source`` are not those of ``entry``.
        """

    def blob_file(self, key: str, entry: FileEntry, progress: Progress = silent) -> Path | None:
        """A local file, to read only, with what the store has as this blob; ``None`` if it has not.

        Unless ``verified``, whether the bytes are those of ``entry`` is for the reader to see.
        """

    def entries(self, prefix: str) -> Iterator[Entry]:
        """All objects whose key begins with ``prefix``, in the order of keys."""

    def digest(self, key: str) -> str | None:
        """SHA-256 in hex of an object as the store has it, ``None`` if it is not there."""

    def size(self, key: str) -> int | None:
        """Bytes of an object, ``None`` if it is not there."""

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""

    def now(self) -> datetime:
        """The time by the store's clock."""

    def leftovers(self, before: datetime, remove: bool) -> list[Entry]:
        """What writers that were killed have left, and was written before a time by the store's
        clock and before what may be at work; it is removed if so told. Nobody sees it otherwise,
        and it takes room."""

    def probe(self) -> dict[str, Any]:
        """What the store was found to do, in words. Raises ``RegistryError`` if it cannot be
        written."""


class FolderStore:
    """A :class:`Store` in a folder, local or shared between machines.

    Objects are read-only files. Names that begin with a dot are temporary files of a writer at
    work or killed, and not objects.
    """

    verified = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def location(self) -> str:
        return str(self.folder)

    @property
    def address(self) -> str:
        return str(self.folder.resolve())

    def names(self, prefix: str) -> list[str]:
        with os_errors(f"list the registry {self.location}"):
            try:
                found = os.listdir(self.folder / prefix)
            except FileNotFoundError:
                return []
        return sorted(name for name in found if not name.startswith("."))

    def settle(self, settings: Settings) -> Settings:
        return settings

    def use(self, settings: Settings) -> None:
        if settings.encryption or settings.lock:
            raise RegistryError(
                f"{self.location}: a folder neither encrypts nor locks; leave it to the disk, or "
                "put the registry on S3"
            )

    def known(self, prefix: str) -> list[str]:
        return []

    def read(self, key: str, fresh: bool = False) -> bytes | None:
        with os_errors(f"read the registry {self.location}"):
            try:
                with (self.folder / key).open("rb") as file:
                    return file.read(MAX_DOCUMENT_BYTES + 1)
            except FileNotFoundError:
                return None

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self.folder / key
        with (
            os_errors(f"write to the registry {self.location}"),
            written_beside(path, lambda file: file.write(data), mode=0o444) as temporary,
        ):
            # A hard link is the one portable "rename unless it exists" that is atomic.
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise RegistryError(
                        f"the file system of {self.location} has no hard links, without which "
                        "two pushes could take the same version; put the registry on another one"
                    ) from error
                raise
            return True

    def put_blob(
        self,
        key: str,
        source: Path,
        entry: FileEntry,
        progress: Progress = silent,
    ) -> None:
        from weights.files import sha256

        path = self.folder / key

        def write(file: BinaryIO) -> None:
            if copy_hashing(source, file, progress) != entry.sha256:
                raise RegistryError(f"{source} changed while it was pushed; push it again")

        with os_errors(f"write to the registry {self.location}"):
            if path.is_file() and sha256(path) == entry.sha256:
                progress(entry.size)
                return
            with written_beside(path, write, mode=0o444) as temporary:
                os.replace(temporary, path)

    def blob_file(self, key: str, entry: FileEntry, progress: Progress = silent) -> Path | None:
        path = self.folder / key
        return path if path.is_file() else None

    def entries(self, prefix: str) -> Iterator[Entry]:
        yield from self._files(prefix, lambda name: not name.startswith("."))

    def _files(self, prefix: str, wanted: Callable[[str], bool]) -> list[Entry]:
        """The files whose key begins with the prefix and whose name is wanted, in the order of
        keys."""
        with os_errors(f"list the registry {self.location}"):
            found, root = [], str(self.folder)
            for folder, _, names in os.walk(self.folder / prefix.rpartition("/")[0]):
                above = folder[len(root) + 1 :].replace(os.sep, "/")
                for name in names:
                    key = f"{above}/{name}" if above else name
                    if key.startswith(prefix) and wanted(name):
                        with contextlib.suppress(FileNotFoundError):  # removed by another
                            state = os.stat(os.path.join(folder, name))
                            modified = datetime.fromtimestamp(state.st_mtime, timezone.utc)
                            found.append(Entry(key, state.st_size, modified))
        return sorted(found, key=lambda entry: entry.key)

    def digest(self, key: str) -> str | None:
        from weights.files import sha256

        with os_errors(f"read the registry {self.location}"):
            try:
                return sha256(self.folder / key)
            except FileNotFoundError:
                return None

    def size(self, key: str) -> int | None:
        with os_errors(f"read the registry {self.location}"):
            try:
                return (self.folder / key).stat().st_size
            except FileNotFoundError:
                return None

    def delete(self, key: str) -> None:
        with os_errors(f"remove from the registry {self.location}"):
            (self.folder / key).unlink(missing_ok=True)

    def leftovers(self, before: datetime, remove: bool) -> list[Entry]:
        before = min(before, self.now() - AT_WORK)
        found = [
            entry
            for entry in (*self._files("", is_temporary), *self.entries("probe/"))
            if entry.modified < before
        ]
        for entry in found if remove else ():
            self.delete(entry.key)
        return found

    def probe(self) -> dict[str, Any]:
        key = f"probe/{uuid.uuid4().hex}"
        try:
            if not self.put_if_absent(key, b"first") or self.put_if_absent(key, b"second"):
                raise RegistryError(
                    f"the file system of {self.location} gives one name to two files; put the "
                    "registry on another one"
                )
        finally:
            self.delete(key)
        return {"versions": "a hard link for each: racing pushes get different numbers"}

    def now(self) -> datetime:
        with (
            os_errors(f"write to the registry {self.location}"),
            tempfile.NamedTemporaryFile(dir=self.folder, prefix=".", suffix=".tmp") as file,
        ):
            return datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, timezone.utc)
