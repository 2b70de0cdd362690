"""Publishing LoRAs under ``name@version`` and getting them back, verified.

Layout of a registry::

    registry.json                                   settings of the whole registry
    blobs/sha256/ab/<digest>                        files, shared by versions with the same bytes
    models/<name>/versions/00000001.json            manifest: with it, the version exists
    models/<name>/states/00000001/00000001.json     log of a version: yanked, removed
    models/<name>/aliases/<alias>/00000001.json     log of an alias
    models/<name>/cards/00000001/00000001.json      log of a version's card
    models/<name>/events/00000001.json              log of refused promotions
"""

from __future__ import annotations

import logging
import os
import random
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from registry import documents, garbage, logs, signing
from registry.errors import RegistryError, os_errors
from registry.files import copy_hashing, copy_whole, written_beside
from registry.manifest import FileEntry, Manifest
from registry.models import Model, in_parallel, models
from registry.references import Reference, check_alias, check_name, parse_reference
from registry.s3_client import without_credentials
from registry.settings import Settings
from registry.store import FolderStore, Progress, Store, silent
from registry.words import human_size

__all__ = ["FileEntry", "Manifest", "Model", "Registry", "RegistryError", "open_registry"]

# A push loses an attempt only when another push wins it, so this bounds a malfunction, not a race.
_MAX_ATTEMPTS = 1000
_LOST_BEFORE_LISTING = 3
_LONGEST_WAIT = 2.0

_clock = time.time
"""Unlike time.monotonic, it goes on while the machine sleeps."""
_log = logging.getLogger("lora-registry")


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
            f"a registry is a folder or s3://BUCKET/PREFIX, and {without_credentials(location)} "
            "is another URL; an S3 server is named with --endpoint-url"
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
        self._settings: Settings | None = None
        self._highest: dict[str, int] = {}
        """Of models: a version that is there."""

    @property
    def location(self) -> str:
        """How the user names the registry."""
        return self.store.location

    def models(self) -> list[Model]:
        """All that have a version, by name: versions, states and aliases.

        Raises ``RegistryError`` if there is no registry or its format is unknown.
        """
        self._require()
        return [model for model in models(self.store) if model.versions]

    def model(self, name: str) -> Model:
        """One of them. Raises ``RegistryError`` if the name is malformed or unknown; nearest names
        are suggested."""
        check_name(name)
        self._require()
        for found in models(self.store, name):
            if found.versions:
                return found
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

    def names(self) -> list[str]:
        """The models that have a version, sorted. Raises as :meth:`models` does."""
        return [model.name for model in self.models()]

    def versions(self, name: str) -> list[int]:
        """The versions of ``name``, oldest first. Raises as :meth:`model` does."""
        return list(self.model(name).versions)

    def yanked(self, name: str) -> dict[int, str]:
        """The versions of a model that should not be used, with the reasons."""
        return self.model(name).yanked

    def manifests(self, versions: Sequence[tuple[str, int]], fresh: bool = False) -> list[Manifest]:
        """Those of versions that are there, by name and number, read several at a time, in their
        order; with ``fresh`` not from a cache."""
        return in_parallel(lambda place: self._read_manifest(place[0], place[1], fresh), versions)

    def readable(self, versions: Sequence[tuple[str, int]]) -> list[Manifest]:
        """The same without those that cannot be read, with a warning for each."""

        def one(place: tuple[str, int]) -> Manifest | None:
            try:
                return self._read_manifest(*place)
            except RegistryError as error:
                _log.warning("warning: %s", error)
                return None

        return [manifest for manifest in in_parallel(one, versions) if manifest is not None]

    def resolve(self, reference: str) -> Manifest:
        """The manifest of ``name@version``, ``name@alias`` or ``name@sha256:…``, or of the newest
        version of ``name`` that is neither yanked nor forbidden by the policy.

        Raises ``RegistryError`` if the reference is malformed, the name, version, alias or digest
        unknown, the manifest not readable, or not signed by whom the policy asks for.
        """
        return self.located(reference)[1]

    def located(self, reference: str) -> tuple[Model, Manifest]:
        """The same with its model."""
        wanted = parse_reference(reference)
        model = self.model(wanted.name)
        if wanted.sha256 is not None:
            return model, _newest_allowed(self._by_digest(model, wanted.sha256))
        version = self._numbered(model, wanted)
        if version is not None:
            return model, _newest_allowed([self._read_manifest(model.name, version)])
        usable = [number for number in reversed(model.versions) if number not in model.yanked]
        if not usable:
            raise RegistryError(
                f"every version of {model.name} is yanked; name one, such as "
                f"{model.name}@{model.versions[-1]}"
            )
        return model, _newest_allowed(self._read_manifest(model.name, n) for n in usable)

    def placed(self, reference: str) -> tuple[Model, int]:
        """The model and number of a reference; where it says a number or an alias its manifest is
        not read, so that something can be done about one that cannot be."""
        wanted = parse_reference(reference)
        if wanted.version is not None or wanted.alias is not None:
            model = self.model(wanted.name)
            number = self._numbered(model, wanted)
            if number is not None:
                return model, number
        model, manifest = self.located(reference)
        return model, manifest.version

    def _numbered(self, model: Model, wanted: Reference) -> int | None:
        """The number that a reference says, itself or as an alias."""
        version = wanted.version
        if wanted.alias is not None:
            version = self._aliased(model, wanted.alias)
        if version is not None and version not in model.versions:
            existing = ", ".join(map(str, model.versions[-20:]))
            raise RegistryError(
                f"{model.name} has no version {version}; the registry {self.location} has "
                f"{existing}"
            )
        return version

    def push(
        self,
        name: str,
        file: str | os.PathLike[str],
        *,
        metrics: Mapping[str, Any] = {},
        metadata: Mapping[str, Any] = {},
        evaluation: Mapping[str, Any] = {},
        samples: Sequence[str | os.PathLike[str]] = (),
        report: str | os.PathLike[str] | None = None,
        card: str | None = None,
        push_id: str | None = None,
        progress: Progress = silent,
    ) -> Manifest:
        """Publish ``file`` as the next version of ``name`` and return its manifest.

        The version becomes visible whole, with its manifest, or not at all. Any number of
        processes can push at once; each gets a version of its own. Trigger words and licence in the
        metadata are written into the header of the file too. ``samples`` are PNGs, ``report`` is a
        page about the training in HTML, ``card`` one in Markdown, written from the facts by
        default. ``push_id`` is random, unless a push that may have been made before is made again.

        Raises ``RegistryError``, with nothing written, if the name is malformed, a file is
        missing, empty, damaged or no LoRA, a metric is not a finite number, the metadata is not
        JSON, or the policy would not let it count. A metric is a number, or a mapping with value,
        lower and upper.
        """
        from registry.draft import draft

        check_name(name)
        signing.judge_own(name)
        pictures = tuple(Path(path) for path in samples)
        page = None if report is None else Path(report)
        facts = (metrics, metadata, evaluation, pictures, page, card, push_id)
        key = signing.own_key()
        with tempfile.TemporaryDirectory() as folder:
            made = draft(name, Path(file), *facts, Path(folder))
            documents.sealed(made.manifest, key)  # not too large
            self.create()
            files = {
                entry: _on_disk(source, Path(folder, entry.path))
                for entry, source in zip(made.manifest.files, made.sources, strict=True)
            }
            self._put_files(files, progress)
            return self._commit(made.manifest, key)

    def _put_files(self, files: Mapping[FileEntry, Path], progress: Progress) -> None:
        """Store the files, so that no gc removes them before there is a manifest."""
        long, begun = garbage.SHORTEST_GRACE.total_seconds() / 2, None
        while begun is None or _clock() - begun > long:
            begun = _clock()
            garbage.spare(self.store, {entry.sha256 for entry in files})
            in_parallel(
                lambda entry: self.store.put_blob(blob_key(entry), files[entry], entry, progress),
                list(files),
            )

    def _commit(self, manifest: Manifest, key: signing.Key | None) -> Manifest:
        """Write the manifest under the next number that is free."""
        name = manifest.name
        version = self._highest.get(name) or max(self._numbers(name, known=True), default=0)
        if not version:
            version = max(self._numbers(name), default=0)
        for lost in range(1, _MAX_ATTEMPTS):
            version += 1
            numbered = manifest.model_copy(update={"version": version})
            taken = not self.store.put_if_absent(
                manifest_key(name, version), documents.sealed(numbered, key)
            )
            found = self._read_manifest(name, version, fresh=True)
            self._highest[name] = version
            # A store that lost the reply to a successful write and wrote again finds its own.
            if found.push_id == manifest.push_id:
                if found.model_copy(update={"signature": None}) != numbered:
                    raise self._untrusted(numbered)
                return found
            if not taken:
                raise self._untrusted(numbered)
            time.sleep(random.uniform(0, min(_LONGEST_WAIT, 0.005 * 2**lost)))
            if lost % _LOST_BEFORE_LISTING == 0:
                version = max(version, *self._numbers(name))
        raise RegistryError(
            f"no free version of {name} after {_MAX_ATTEMPTS} attempts; "
            f"check that the registry {self.location} lists what it stores"
        )

    def _untrusted(self, manifest: Manifest) -> RegistryError:
        return RegistryError(
            f"{manifest.reference}: the registry {self.location} gives another manifest than "
            "was written; it cannot be trusted"
        )

    def identity(self) -> str | None:
        """The random id of the registry, None if there is none yet."""
        return self._require().id if self._exists() else None

    def numbers(self, name: str) -> list[int]:
        """The versions of ``name`` that are not removed, none if there is no such model."""
        return [n for model in models(self.store, name) for n in model.versions]

    def _numbers(self, name: str, known: bool = False) -> list[int]:
        """The numbers that have been given, or a few of them that are `known` without asking."""
        folder = f"models/{name}/versions"
        found = self.store.known(folder) if known else self.store.names(folder)
        return [int(file[:8]) for file in found if file[:8].isdigit() and file[8:] == ".json"]

    def fetch(
        self, reference: str, *, yanked: bool = False, progress: Progress = silent
    ) -> tuple[Path, Manifest]:
        """A verified local file with the LoRA, to read only, and its manifest.

        The file is named by its digest, without a suffix; ``manifest.files[0].path`` has one.

        Raises ``RegistryError`` as :meth:`resolve` does, or if the stored file is missing or
        differs from its digest, or if the version is yanked and ``yanked`` is not set.
        """
        from weights.files import sha256

        model, manifest = self.located(reference)
        _check_state(model, manifest, yanked)
        entry = manifest.files[0]
        path = self.file(manifest, entry, progress)
        if not self.store.verified:
            with os_errors(f"read the registry {self.location}"):
                self._check_digest(manifest, entry, sha256(path))
        return path, manifest

    def pull(
        self,
        reference: str,
        out_dir: str | os.PathLike[str],
        overwrite: bool = False,
        *,
        everything: bool = False,
        yanked: bool = False,
        progress: Progress = silent,
    ) -> Path:
        """Copy the LoRA into ``out_dir``, made if need be, and return its path there.

        With ``everything`` its card, pictures and report come too. A file that is already there
        with the same bytes is left alone.

        Raises ``RegistryError`` as :meth:`fetch` does, with nothing left in ``out_dir``, or if
        another file has the name and ``overwrite`` is not set.
        """
        model, manifest = self.located(reference)
        return self.pull_version(
            model,
            manifest,
            out_dir,
            overwrite,
            everything=everything,
            yanked=yanked,
            progress=progress,
        )

    def pull_version(
        self,
        model: Model,
        manifest: Manifest,
        out_dir: str | os.PathLike[str],
        overwrite: bool = False,
        *,
        everything: bool = False,
        yanked: bool = False,
        progress: Progress = silent,
    ) -> Path:
        """The same for what :meth:`located` has found."""
        from weights.files import sha256

        _check_state(model, manifest, yanked)
        wanted, folder = manifest.files if everything else manifest.files[:1], Path(out_dir)
        sources = in_parallel(lambda entry: self.file(manifest, entry, progress), wanted)
        size = human_size(sum(entry.size for entry in wanted))

        def copy(entry: FileEntry, source: Path, target: BinaryIO) -> None:
            if self.store.verified:
                copy_whole(source, target)
            else:
                self._check_digest(manifest, entry, copy_hashing(source, target))

        # None gets its name before all are there.
        with os_errors(f"pull {manifest.reference}, {size}, into {folder}"), ExitStack() as all_:
            ready = []
            for entry, source in zip(wanted, sources, strict=True):
                destination = folder / entry.path
                if destination.exists():
                    if sha256(destination) == entry.sha256:
                        continue
                    if not overwrite:
                        raise RegistryError(
                            f"{destination} exists and is not that of {manifest.reference}; "
                            "pull into another folder, or with --overwrite to replace it"
                        )
                # What is in the cache can be copied again.
                synced = not self.store.verified
                whole = written_beside(destination, partial(copy, entry, source), synced=synced)
                ready.append((all_.enter_context(whole), destination))
            for temporary, destination in ready:
                os.replace(temporary, destination)
        return folder / manifest.files[0].path

    def file(self, manifest: Manifest, entry: FileEntry, progress: Progress = silent) -> Path:
        """A local file with one of a version's files, to read only. Raises ``RegistryError`` if it
        is missing."""
        path = self.store.blob_file(blob_key(entry), entry, progress)
        if path is None:
            raise self._missing(manifest, entry)
        return path

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
        signing.judge_own(name)
        if self._exists():
            self._require()

    def _exists(self) -> bool:
        if self._settings is not None or self.store.read("registry.json") is not None:
            return True
        # But for what a store needs to create it, everything is written after registry.json, so
        # whoever sees other names first and then no registry.json is not looking at a registry
        # being created.
        others = set(self.store.names("")) - {"probe", "claims"}
        if others and self.store.read("registry.json") is None:
            raise RegistryError(
                f"{self.location} is not empty and has no registry.json, so it is not a "
                "registry; name an empty or a new folder"
            )
        return bool(others)

    def create(self, settings: Settings | None = None) -> bool:
        """Make the registry if there is none, and say whether it was made.

        Raises ``RegistryError`` if something else is there, it cannot be written, or it has other
        settings.
        """
        if self._exists():
            self._require()
            return False
        document = self.store.settle(settings or Settings())
        self.store.use(document)
        try:
            made = self.store.put_if_absent("registry.json", documents.sealed(document))
        except RegistryError:
            # What was written is not protected as it says.
            found = self.store.read("registry.json")
            if found is not None and found == documents.sealed(document):
                self.store.delete("registry.json")
            raise
        self._require()
        return made

    @property
    def settings(self) -> Settings:
        """Raises ``RegistryError`` if there is no registry or its format is unknown."""
        return self._require()

    def _require(self) -> Settings:
        if self._settings is not None:
            return self._settings
        if self.store.read("registry.json") is None:
            raise RegistryError(
                f"there is no registry at {self.location}; "
                "name another folder, or push a first LoRA to create it"
            )
        self._settings = documents.read(
            self.store, "registry.json", Settings, "a registry's settings", fresh=True
        )
        self.store.use(self._settings)
        return self._settings

    def _aliased(self, model: Model, alias: str) -> int:
        check_alias(alias)
        entry = model.aliases.get(alias)
        if entry is None or entry.version is None:
            logs.entries(self.store, f"models/{model.name}/aliases/{alias}")  # raises if damaged
            known = ", ".join(model.aliases) or "none"
            raise RegistryError(
                f"{model.name} has no alias {alias!r}; it has {known}; see lora-registry alias list"
            )
        signing.judge(f"{model.name}@{alias}", model.name, entry.signature, alias)
        return entry.version

    def _by_digest(self, model: Model, sha256: str) -> list[Manifest]:
        """The versions with the file, newest first."""
        manifests = self.readable([(model.name, number) for number in reversed(model.versions)])
        found = [m for m in manifests if m.files[0].sha256.startswith(sha256)]
        if not found:
            raise RegistryError(
                f"no version of {model.name} has a file whose sha256 begins with {sha256}; see "
                "lora-registry show"
            )
        if len({manifest.files[0].sha256 for manifest in found}) > 1:
            references = ", ".join(manifest.reference for manifest in found)
            raise RegistryError(f"sha256 {sha256} stands for {references}; write more digits")
        return found

    def _read_manifest(self, name: str, version: int, fresh: bool = False) -> Manifest:
        key = manifest_key(name, version)
        remedy = f"restore it, remove the version (lora-registry rm {name}@{version})"
        manifest = documents.read(self.store, key, Manifest, "a manifest", fresh, remedy)
        if (manifest.name, manifest.version) != (name, version):
            raise RegistryError(
                f"{key} in the registry {self.location} is the manifest of "
                f"{manifest.reference}; restore the one that was there"
            )
        return manifest

    def _missing(self, manifest: Manifest, entry: FileEntry) -> RegistryError:
        return RegistryError(
            f"{blob_key(entry)}, a file of {manifest.reference}, is missing from the "
            f"registry {self.location}; push the same file again to restore it"
        )

    def _check_digest(self, manifest: Manifest, entry: FileEntry, found: str) -> None:
        if found != entry.sha256:
            raise RegistryError(
                f"the stored file of {manifest.reference} is damaged: its manifest says sha256 "
                f"{entry.sha256}, the registry {self.location} holds {found}; "
                "push the same file again to repair it"
            )


def _check_state(model: Model, manifest: Manifest, yanked: bool) -> None:
    reason = None if yanked else model.yanked.get(manifest.version)
    if reason is not None:
        raise RegistryError(
            f"{manifest.reference} is yanked: {reason}; use another version, or --force"
        )


def _newest_allowed(manifests: Iterable[Manifest]) -> Manifest:
    """The first that the policy allows. Raises ``RegistryError`` with what it says of the first if
    there is none."""
    refused: RegistryError | None = None
    for manifest in manifests:
        try:
            signing.judge(manifest.reference, manifest.name, manifest.signature)
        except RegistryError as error:
            refused = refused or error
            continue
        if refused:
            _log.warning("warning: %s; %s is the newest that may", refused, manifest.reference)
        return manifest
    assert refused is not None
    raise refused


def _on_disk(source: Path | bytes, path: Path) -> Path:
    """Where a file's bytes are, after they were written there if need be."""
    if isinstance(source, bytes):
        path.write_bytes(source)
        return path
    return source


def state_folder(name: str, version: int) -> str:
    """Where the log of a version is."""
    return f"models/{name}/states/{version:08d}"


def alias_folder(name: str, alias: str) -> str:
    """Where the log of an alias is."""
    return f"models/{name}/aliases/{alias}"


def blob_key(entry: FileEntry) -> str:
    """Where a file is."""
    return garbage.blob_key(entry.sha256)


def manifest_key(name: str, version: int) -> str:
    """Where a version is."""
    return f"models/{name}/versions/{version:08d}.json"
