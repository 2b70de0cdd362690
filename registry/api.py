"""Publishing LoRAs under ``name@version`` and getting them back, verified.

Layout of a registry::

    registry.json                           format version
    blobs/sha256/ab/<digest>                files, shared by all versions with the same bytes
    models/<name>/versions/00000001.json    manifest: the version exists once this can be read
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from registry.errors import RegistryError, os_errors
from registry.files import copy_hashing, written_beside
from registry.manifest import FileEntry, Manifest, problems
from registry.references import check_name, parse_reference
from registry.store import FolderStore, Store

__all__ = ["FileEntry", "Manifest", "Registry", "RegistryError", "open_registry"]

_FORMAT_VERSION = 1
# A push loses an attempt only when another push wins it, so this bounds a malfunction, not a race.
_MAX_ATTEMPTS = 1000


def open_registry(location: str) -> Registry:
    """The registry in the folder ``location``; the first push creates it.

    Raises ``RegistryError`` if ``location`` is empty or a URL.
    """
    if not location:
        raise RegistryError("no registry is named; name its folder, such as ./loras")
    if "://" in location:
        raise RegistryError(f"a registry is a folder, and {location} is a URL; name a folder")
    return Registry(FolderStore(Path(location).expanduser()))


class Registry:
    """Versions of LoRAs in a store. All methods raise ``RegistryError`` if the store fails."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def location(self) -> str:
        """How the user names the registry."""
        return self._store.location

    def names(self) -> list[str]:
        """The models that have a version, sorted.

        Raises ``RegistryError`` if there is no registry or its format is unknown.
        """
        self._require()
        return [name for name in self._store.names("models") if self._version_numbers(name)]

    def versions(self, name: str) -> list[int]:
        """The versions of ``name``, oldest first.

        Raises ``RegistryError`` if the name is malformed or unknown; nearest names are suggested.
        """
        check_name(name)
        self._require()
        numbers = self._version_numbers(name)
        if not numbers:
            import difflib

            known = self.names()
            near = difflib.get_close_matches(name, known, n=3)
            if near:
                remedy = f"did you mean {' or '.join(near)}?"
            elif known:
                remedy = "see 'lora-registry list'"
            else:
                remedy = "nothing has been pushed to it yet"
            raise RegistryError(f"the registry {self.location} has no {name!r}; {remedy}")
        return numbers

    def resolve(self, reference: str) -> Manifest:
        """The manifest of ``name@version``, or of the newest version of ``name``.

        Raises ``RegistryError`` if the reference is malformed, the name or version unknown, or
        the manifest not readable.
        """
        name, version = parse_reference(reference)
        numbers = self.versions(name)
        if version is None:
            version = numbers[-1]
        elif version not in numbers:
            existing = ", ".join(map(str, numbers))
            raise RegistryError(
                f"{name} has no version {version}; the registry {self.location} has {existing}"
            )
        return self._read_manifest(name, version)

    def push(
        self,
        name: str,
        file: str | os.PathLike[str],
        *,
        metrics: Mapping[str, float] = {},
        metadata: Mapping[str, Any] = {},
    ) -> Manifest:
        """Publish ``file`` as the next version of ``name`` and return its manifest.

        The version becomes visible whole, with its manifest, or not at all. Any number of
        processes can push at once; each gets a version of its own.

        Raises ``RegistryError``, with nothing written, if the name is malformed, the file is
        missing, empty or a damaged safetensors file, a metric is not a finite number, or the
        metadata is not JSON.
        """
        check_name(name)
        draft = _draft(name, Path(file), metrics, metadata)
        self._create()
        entry = draft.files[0]
        self._store.put_blob(_blob_key(entry), Path(file), entry.sha256)
        for _ in range(_MAX_ATTEMPTS):
            version = max(self._version_numbers(name), default=0) + 1
            manifest = draft.model_copy(update={"version": version})
            document = manifest.model_dump_json(indent=2).encode()
            if self._store.put_if_absent(_manifest_key(name, version), document):
                return manifest
            # A store that lost the reply to a successful write and wrote again finds its own.
            if self._read_manifest(name, version).push_id == manifest.push_id:
                return manifest
        raise RegistryError(
            f"no free version of {name} after {_MAX_ATTEMPTS} attempts; "
            f"check that the registry {self.location} lists what it stores"
        )

    def fetch(self, reference: str) -> tuple[Path, Manifest]:
        """A verified local file with the LoRA, to read only, and its manifest.

        The file is named by its digest, without a suffix; ``manifest.files[0].path`` has one.

        Raises ``RegistryError`` as :meth:`resolve` does, or if the stored file is missing or
        differs from its digest.
        """
        from weights.files import sha256

        manifest = self.resolve(reference)
        entry = manifest.files[0]
        path = self._blob_path(manifest, entry)
        with os_errors(f"read the registry {self.location}"):
            self._check_digest(manifest, entry, sha256(path))
        return path, manifest

    def pull(
        self, reference: str, out_dir: str | os.PathLike[str], overwrite: bool = False
    ) -> Path:
        """Copy the LoRA into ``out_dir``, made if need be, and return its path there.

        A file that is already there with the same bytes is left alone.

        Raises ``RegistryError`` as :meth:`fetch` does, with nothing left in ``out_dir``, or if
        another file has the name and ``overwrite`` is not set.
        """
        from weights.files import sha256

        manifest = self.resolve(reference)
        entry = manifest.files[0]
        destination = Path(out_dir) / entry.path
        source = self._blob_path(manifest, entry)

        def write(target: BinaryIO) -> None:
            self._check_digest(manifest, entry, copy_hashing(source, target))

        with os_errors(f"pull {manifest.reference}"):
            if destination.exists():
                if sha256(destination) == entry.sha256:
                    return destination
                if not overwrite:
                    raise RegistryError(
                        f"{destination} exists and is not {manifest.reference}; "
                        "pull into another folder, or with --overwrite to replace it"
                    )
            with written_beside(destination, write) as temporary:
                os.replace(temporary, destination)
        return destination

    def check_push(self, name: str) -> None:
        """Find out, without writing, what would keep a push of ``name`` from being taken.

        Raises ``RegistryError`` if the name is malformed, or if the location is neither a
        registry of a known format nor free to become one.
        """
        check_name(name)
        if self._exists():
            self._require()

    def _exists(self) -> bool:
        # Everything else is written after registry.json, so whoever sees other names first and
        # then no registry.json is not looking at a registry being created.
        others = self._store.names("")
        exists = self._store.read("registry.json") is not None
        if others and not exists:
            raise RegistryError(
                f"{self.location} is not empty and has no registry.json, so it is not a "
                "registry; name an empty or a new folder"
            )
        return exists

    def _create(self) -> None:
        if not self._exists():
            document = json.dumps({"format_version": _FORMAT_VERSION}).encode()
            self._store.put_if_absent("registry.json", document)
        self._require()

    def _require(self) -> None:
        document = self._store.read("registry.json")
        if document is None:
            raise RegistryError(
                f"there is no registry at {self.location}; "
                "name another folder, or push a first LoRA to create it"
            )
        try:
            found = json.loads(document)["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise RegistryError(
                f"registry.json in {self.location} should be "
                f'{{"format_version": {_FORMAT_VERSION}}} and is not; restore it'
            ) from error
        if found != _FORMAT_VERSION:
            raise RegistryError(
                f"the registry {self.location} has format version {found}, this program knows "
                f"{_FORMAT_VERSION}; use the lora-registry that wrote it, or a newer one"
            )

    def _version_numbers(self, name: str) -> list[int]:
        found = self._store.names(f"models/{name}/versions")
        return sorted(int(file[:8]) for file in found if re.fullmatch(r"[0-9]{8}\.json", file))

    def _read_manifest(self, name: str, version: int) -> Manifest:
        key = _manifest_key(name, version)
        document = self._store.read(key)
        if document is None:
            raise RegistryError(f"{key} vanished from the registry {self.location}; try again")
        try:
            manifest = Manifest.model_validate_json(document)
        except ValidationError as error:
            raise RegistryError(
                f"{key} in the registry {self.location} is not a manifest that this program "
                f"can read ({problems(error)}); restore it, or use a newer lora-registry"
            ) from error
        if (manifest.name, manifest.version) != (name, version):
            raise RegistryError(
                f"{key} in the registry {self.location} is the manifest of "
                f"{manifest.reference}; restore the one that was there"
            )
        return manifest

    def _blob_path(self, manifest: Manifest, entry: FileEntry) -> Path:
        path = self._store.local_path(_blob_key(entry))
        if path is None:
            raise RegistryError(
                f"{_blob_key(entry)}, the file of {manifest.reference}, is missing from the "
                f"registry {self.location}; push the same file again to restore it"
            )
        return path

    def _check_digest(self, manifest: Manifest, entry: FileEntry, found: str) -> None:
        if found != entry.sha256:
            raise RegistryError(
                f"the stored file of {manifest.reference} is damaged: its manifest says sha256 "
                f"{entry.sha256}, the registry {self.location} holds {found}; "
                "push the same file again to repair it"
            )


def _draft(
    name: str, file: Path, metrics: Mapping[str, float], metadata: Mapping[str, Any]
) -> Manifest:
    """The manifest of a push before it has its version, from a file found fit to publish."""
    from weights.files import WeightsError, sha256
    from weights.files import metadata as read_header

    if not file.is_file():
        raise RegistryError(f"there is no file {file} to push; give the path of a LoRA file")
    with os_errors(f"read {file}"):
        size = file.stat().st_size
        if size == 0:
            raise RegistryError(f"{file} is empty; push a file that was written to its end")
        if file.suffix == ".safetensors":
            try:
                read_header(file)
            except WeightsError as error:
                raise RegistryError(str(error)) from error
        digest = sha256(file)
    try:
        return Manifest(
            name=name,
            version=1,
            created=datetime.now(timezone.utc).replace(microsecond=0),
            push_id=uuid.uuid4().hex,
            files=(FileEntry(path=name + file.suffix, sha256=digest, size=size),),
            metrics=dict(metrics),
            metadata=dict(metadata),
        )
    except ValidationError as error:
        raise RegistryError(
            f"cannot publish {file} as {name}: {problems(error)}; correct it and push again"
        ) from error


def _blob_key(entry: FileEntry) -> str:
    return f"blobs/sha256/{entry.sha256[:2]}/{entry.sha256}"


def _manifest_key(name: str, version: int) -> str:
    return f"models/{name}/versions/{version:08d}.json"
