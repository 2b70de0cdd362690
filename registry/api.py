"""Publishing LoRAs under ``name@version`` and getting them back, verified.

Layout of a registry::

    registry.json                                   format version
    blobs/sha256/ab/<digest>                        files, shared by versions with the same bytes
    models/<name>/versions/00000001.json            manifest: with it, the version exists
    models/<name>/states/00000001/00000001.json     log of a version: yanked, removed
    models/<name>/aliases/<alias>/00000001.json     log of an alias
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

from registry import chunks, logs
from registry.errors import RegistryError, os_errors
from registry.files import copy_hashing, written_beside
from registry.logs import LogEntry
from registry.manifest import FileEntry, Manifest, problems
from registry.references import check_alias, check_name, parse_reference
from registry.store import FolderStore, Progress, Store, silent

__all__ = ["FileEntry", "Manifest", "Registry", "RegistryError", "open_registry"]

_FORMAT_VERSION = 1
# A push loses an attempt only when another push wins it, so this bounds a malfunction, not a race.
_MAX_ATTEMPTS = 1000


def open_registry(
    location: str, *, endpoint_url: str | None = None, offline: bool | None = None
) -> Registry:
    """The registry in the folder, or at the `s3://bucket/prefix`, ``location``.

    The first push creates it. ``endpoint_url`` is that of an S3 server which is not AWS's; without
    it boto3's own settings count (AWS_ENDPOINT_URL_S3, ~/.aws/config). ``offline`` reads what the
    cache has and asks no server; by default if LORA_REGISTRY_OFFLINE is set.

    Raises ``RegistryError`` if ``location`` is empty or neither of them.
    """
    if not location:
        raise RegistryError("no registry is named; name its folder, such as ./loras")
    if "://" in location and not location.startswith("s3://"):
        raise RegistryError(
            f"a registry is a folder or s3://BUCKET/PREFIX, and {location} is another URL; an S3 "
            "server is named with --endpoint-url"
        )
    if "://" in location:
        from registry.cache import default_cache
        from registry.s3 import S3Store
        from registry.s3_client import parse_place

        if offline is None:
            offline = bool(os.environ.get("LORA_REGISTRY_OFFLINE"))
        endpoint_url = (
            endpoint_url
            or os.environ.get("AWS_ENDPOINT_URL_S3")
            or os.environ.get("AWS_ENDPOINT_URL")
        )
        return Registry(S3Store(parse_place(location, endpoint_url), default_cache(offline)))
    return Registry(FolderStore(Path(location).expanduser()))


class Registry:
    """Versions of LoRAs in a store. All methods raise ``RegistryError`` if the store fails."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._known = False
        """Has registry.json been seen to be right?"""

    @property
    def location(self) -> str:
        """How the user names the registry."""
        return self.store.location

    def names(self) -> list[str]:
        """The models that have a version, sorted.

        Raises ``RegistryError`` if there is no registry or its format is unknown.
        """
        self._require()
        return [name for name in self.store.names("models") if self._version_numbers(name)]

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
        """The manifest of ``name@version``, ``name@alias`` or ``name@sha256:…``, or of the newest
        version of ``name`` that is not yanked.

        Raises ``RegistryError`` if the reference is malformed, the name, version, alias or digest
        unknown, or the manifest not readable.
        """
        wanted = parse_reference(reference)
        name, numbers = wanted.name, self.versions(wanted.name)
        if wanted.sha256 is not None:
            return self._by_digest(name, numbers, wanted.sha256)
        version = wanted.version
        if wanted.alias is not None:
            version = self._aliased(name, wanted.alias)
        elif version is None:
            yanked = self.yanked(name)
            version = next((n for n in reversed(numbers) if n not in yanked), None)
            if version is None:
                raise RegistryError(
                    f"every version of {name} is yanked; name one, such as {name}@{numbers[-1]}"
                )
        if version not in numbers:
            existing = ", ".join(map(str, numbers))
            raise RegistryError(
                f"{name} has no version {version}; the registry {self.location} has {existing}"
            )
        return self._read_manifest(name, version)

    def yanked(self, name: str) -> dict[int, str]:
        """The versions of a model that should not be used, with the reasons."""
        found = {version: entry for version, entry in self._states(name).items() if entry}
        return {v: entry.reason for v, entry in found.items() if entry.action == "yank"}

    def push(
        self,
        name: str,
        file: str | os.PathLike[str],
        *,
        metrics: Mapping[str, Any] = {},
        metadata: Mapping[str, Any] = {},
        evaluation: Mapping[str, Any] = {},
        progress: Progress = silent,
    ) -> Manifest:
        """Publish ``file`` as the next version of ``name`` and return its manifest.

        The version becomes visible whole, with its manifest, or not at all. Any number of
        processes can push at once; each gets a version of its own.

        Raises ``RegistryError``, with nothing written, if the name is malformed, the file is
        missing, empty or a damaged safetensors file, a metric is not a finite number, or the
        metadata is not JSON. A metric is a number, or a mapping with value, lower and upper.
        """
        check_name(name)
        draft = _draft(name, Path(file), metrics, metadata, evaluation)
        self.create()
        entry = draft.files[0]
        key, mark = blob_key(entry), f"garbage/{entry.sha256}"
        # Written anew it is too young for a gc that has marked it and is about to remove it.
        marked = self.store.size(key) is not None and self.store.read(mark) is not None
        self.store.put_blob(key, Path(file), entry, progress, anew=marked)
        if marked:
            self.store.delete(mark)
        for _ in range(_MAX_ATTEMPTS):
            version = max((*self._version_numbers(name), *self._numbered_states(name)), default=0)
            version += 1
            manifest = draft.model_copy(update={"version": version})
            document = manifest.model_dump_json(indent=2).encode()
            if self.store.put_if_absent(manifest_key(name, version), document):
                self._check_stored(manifest)
                if self.store.size(key) != entry.size:
                    self.store.put_blob(key, Path(file), entry)
                return manifest
            # A store that lost the reply to a successful write and wrote again finds its own.
            if self._read_manifest(name, version).push_id == manifest.push_id:
                return manifest
        raise RegistryError(
            f"no free version of {name} after {_MAX_ATTEMPTS} attempts; "
            f"check that the registry {self.location} lists what it stores"
        )

    def fetch(
        self, reference: str, *, yanked: bool = False, progress: Progress = silent
    ) -> tuple[Path, Manifest]:
        """A verified local file with the LoRA, to read only, and its manifest.

        The file is named by its digest, without a suffix; ``manifest.files[0].path`` has one.

        Raises ``RegistryError`` as :meth:`resolve` does, or if the stored file is missing or
        differs from its digest, or if the version is yanked and ``yanked`` is not set.
        """
        from weights.files import sha256

        manifest = self.resolve(reference)
        self._check_state(manifest, yanked)
        entry = manifest.files[0]
        path = self._blob_path(manifest, entry, progress)
        with os_errors(f"read the registry {self.location}"):
            self._check_digest(manifest, entry, sha256(path))
        return path, manifest

    def pull(
        self,
        reference: str,
        out_dir: str | os.PathLike[str],
        overwrite: bool = False,
        *,
        yanked: bool = False,
        progress: Progress = silent,
    ) -> Path:
        """Copy the LoRA into ``out_dir``, made if need be, and return its path there.

        A file that is already there with the same bytes is left alone.

        Raises ``RegistryError`` as :meth:`fetch` does, with nothing left in ``out_dir``, or if
        another file has the name and ``overwrite`` is not set.
        """
        from weights.files import sha256

        manifest = self.resolve(reference)
        self._check_state(manifest, yanked)
        entry = manifest.files[0]
        destination = Path(out_dir) / entry.path
        source = self._blob_path(manifest, entry, progress)

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

    def check(self, manifest: Manifest) -> None:
        """Read back every file of a version. Raises ``RegistryError`` if one is missing or differs
        from its digest."""
        for entry in manifest.files:
            found = self.store.digest(blob_key(entry))
            if found is None:
                raise self._missing(manifest, entry)
            self._check_digest(manifest, entry, found)

    def check_push(self, name: str) -> None:
        """Find out, without writing, what would keep a push of ``name`` from being taken.

        Raises ``RegistryError`` if the name is malformed, or if the location is neither a
        registry of a known format nor free to become one.
        """
        check_name(name)
        if self._exists():
            self._require()

    def _exists(self) -> bool:
        # But for what a store needs to create it, everything is written after registry.json, so
        # whoever sees other names first and then no registry.json is not looking at a registry
        # being created.
        others = set(self.store.names("")) - {"probe", "claims"}
        exists = self.store.read("registry.json") is not None
        if others and not exists:
            raise RegistryError(
                f"{self.location} is not empty and has no registry.json, so it is not a "
                "registry; name an empty or a new folder"
            )
        return exists

    def create(self) -> None:
        """Make the registry if there is none. Raises ``RegistryError`` if something else is there
        or it cannot be written."""
        if not self._exists():
            document = json.dumps({"format_version": _FORMAT_VERSION}).encode()
            self.store.put_if_absent("registry.json", document)
        self._require()

    def _require(self) -> None:
        if self._known:
            return
        document = self.store.read("registry.json")
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
        self._known = True

    def _version_numbers(self, name: str) -> list[int]:
        found = self.store.names(f"models/{name}/versions")
        numbers = {int(file[:8]) for file in found if re.fullmatch(r"[0-9]{8}\.json", file)}
        states = self._states(name) if numbers else {}
        removed = {v for v, entry in states.items() if entry and entry.action == "remove"}
        return sorted(numbers - removed)

    def _numbered_states(self, name: str) -> list[int]:
        """The versions that have a state, also if they are removed: no number is given twice."""
        found = self.store.names(f"models/{name}/states")
        return [int(folder) for folder in found if re.fullmatch(r"[0-9]{8}", folder)]

    def _states(self, name: str) -> dict[int, LogEntry | None]:
        numbers = self._numbered_states(name)
        return {number: logs.last(self.store, state_folder(name, number)) for number in numbers}

    def _check_state(self, manifest: Manifest, yanked: bool) -> None:
        reason = None if yanked else self.yanked(manifest.name).get(manifest.version)
        if reason is not None:
            raise RegistryError(
                f"{manifest.reference} is yanked: {reason}; use another version, or --force"
            )

    def _aliased(self, name: str, alias: str) -> int:
        check_alias(alias)
        entry = logs.last(self.store, alias_folder(name, alias))
        if entry is None or entry.version is None:
            known = ", ".join(self.store.names(f"models/{name}/aliases")) or "none"
            raise RegistryError(
                f"{name} has no alias {alias!r}; it has {known}; see lora-registry alias list"
            )
        return entry.version

    def _by_digest(self, name: str, numbers: list[int], sha256: str) -> Manifest:
        manifests = [self._read_manifest(name, number) for number in numbers]
        found = [m for m in manifests if m.files[0].sha256.startswith(sha256)]
        if not found:
            raise RegistryError(
                f"no version of {name} has a file whose sha256 begins with {sha256}; see "
                "lora-registry show"
            )
        if len({manifest.files[0].sha256 for manifest in found}) > 1:
            references = ", ".join(manifest.reference for manifest in found)
            raise RegistryError(f"sha256 {sha256} stands for {references}; write more digits")
        return found[-1]

    def _check_stored(self, manifest: Manifest) -> None:
        """What was written can be read, and is that."""
        if self._read_manifest(manifest.name, manifest.version) != manifest:
            raise RegistryError(
                f"{manifest.reference}: the registry {self.location} gives another manifest than "
                "was written; it cannot be trusted"
            )

    def _read_manifest(self, name: str, version: int) -> Manifest:
        key = manifest_key(name, version)
        document = self.store.read(key)
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

    def _blob_path(self, manifest: Manifest, entry: FileEntry, progress: Progress = silent) -> Path:
        path = self.store.blob_file(blob_key(entry), entry, progress)
        if path is None:
            raise self._missing(manifest, entry)
        return path

    def _missing(self, manifest: Manifest, entry: FileEntry) -> RegistryError:
        return RegistryError(
            f"{blob_key(entry)}, the file of {manifest.reference}, is missing from the "
            f"registry {self.location}; push the same file again to restore it"
        )

    def _check_digest(self, manifest: Manifest, entry: FileEntry, found: str) -> None:
        if found != entry.sha256:
            raise RegistryError(
                f"the stored file of {manifest.reference} is damaged: its manifest says sha256 "
                f"{entry.sha256}, the registry {self.location} holds {found}; "
                "push the same file again to repair it"
            )


def _draft(
    name: str,
    file: Path,
    metrics: Mapping[str, Any],
    metadata: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> Manifest:
    """The manifest of a push before it has its version, from a file found fit to publish."""
    from weights.files import WeightsError
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
        digest, parts = chunks.digests(file)
    values, intervals = _scores(metrics)
    try:
        return Manifest(
            name=name,
            version=1,
            created=datetime.now(timezone.utc).replace(microsecond=0),
            push_id=uuid.uuid4().hex,
            files=(
                FileEntry(
                    path=name + file.suffix,
                    sha256=digest,
                    size=size,
                    chunks=parts if len(parts) > 1 else (),
                ),
            ),
            metrics=dict(values),
            intervals=intervals,
            evaluation=dict(evaluation),
            metadata=dict(metadata),
            pushed_by=logs.who(),
        )
    except ValidationError as error:
        raise RegistryError(
            f"cannot publish {file} as {name}: {problems(error)}; correct it and push again"
        ) from error


def _scores(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and intervals of metrics given as numbers or as value, lower and upper."""
    values, intervals = {}, {}
    for key, given in metrics.items():
        values[key] = given
        if isinstance(given, Mapping) and set(given) == {"value", "lower", "upper"}:
            values[key] = given["value"]
            intervals[key] = (given["lower"], given["upper"])
    return values, intervals


def state_folder(name: str, version: int) -> str:
    """Where the log of a version is."""
    return f"models/{name}/states/{version:08d}"


def alias_folder(name: str, alias: str) -> str:
    """Where the log of an alias is."""
    return f"models/{name}/aliases/{alias}"


def blob_key(entry: FileEntry) -> str:
    """Where a file is."""
    return f"blobs/sha256/{entry.sha256[:2]}/{entry.sha256}"


def manifest_key(name: str, version: int) -> str:
    """Where a version is."""
    return f"models/{name}/versions/{version:08d}.json"
