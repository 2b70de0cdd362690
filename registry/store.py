"""Where a registry keeps its objects: the few operations it needs, and a folder that has them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO, Protocol

from registry.errors import RegistryError, os_errors
from registry.files import copy_hashing, written_beside


class Store(Protocol):
    """Objects under keys such as ``models/emoji-ink/versions/00000001.json``.

    No operation changes or removes an object that readers rely on: documents are written once,
    blobs are named by their digest. Every method raises ``RegistryError`` if the store fails.
    """

    @property
    def location(self) -> str:
        """How the user names the store."""

    def names(self, prefix: str) -> list[str]:
        """The sorted names directly under ``prefix``; empty if there is nothing."""

    def read(self, key: str) -> bytes | None:
        """A small object whole, or ``None`` if it is not there."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write a small object unless the key is taken, whole or not at all.

        Of several writers of one key exactly one is told ``True``.
        """

    def put_blob(self, key: str, source: Path, sha256: str) -> None:
        """Store the file ``source``, whole or not at all, unless an intact copy is there.

        Raises ``RegistryError`` if the bytes of ``source`` do not have the digest ``sha256``.
        """

    def local_path(self, key: str) -> Path | None:
        """A local file with the bytes of a blob, to read only, or ``None`` if it is not there."""


class FolderStore:
    """A :class:`Store` in a folder, local or shared between machines.

    Objects are read-only files. Names that begin with a dot are temporary files of a writer at
    work or killed, and not objects.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def location(self) -> str:
        return str(self.folder)

    def names(self, prefix: str) -> list[str]:
        with os_errors(f"list the registry {self.location}"):
            try:
                found = os.listdir(self.folder / prefix)
            except FileNotFoundError:
                return []
        return sorted(name for name in found if not name.startswith("."))

    def read(self, key: str) -> bytes | None:
        with os_errors(f"read the registry {self.location}"):
            try:
                return (self.folder / key).read_bytes()
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

    def put_blob(self, key: str, source: Path, sha256: str) -> None:
        from weights.files import sha256 as digest_of

        path = self.folder / key

        def write(file: BinaryIO) -> None:
            if copy_hashing(source, file) != sha256:
                raise RegistryError(f"{source} changed while it was pushed; push it again")

        with os_errors(f"write to the registry {self.location}"):
            if path.is_file() and digest_of(path) == sha256:
                return
            with written_beside(path, write, mode=0o444) as temporary:
                os.replace(temporary, path)

    def local_path(self, key: str) -> Path | None:
        path = self.folder / key
        return path if path.is_file() else None
