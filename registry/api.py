"""Publishing LoRAs under ``name@version`` and getting them back, verified.

Layout of a registry::

    registry.json                                   settings of the whole registry
    blobs/sha256/ab/<digest>                        files, shared by versions with the same bytes
    models/<name>/versions/00000001.json            manifest: with it, the version exists
    models/<name>/states/00000001/00000001.json     log of a version: yanked, removed
    models/<name>/aliases/<alias>/00000001.json     log of an alias
"""

from __future__ import annotations

import logging
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from registry import documents, signing
from registry.errors import RegistryError, os_errors
from registry.files import copy_hashing, copy_whole, written_beside
from registry.manifest import FileEntry, Manifest
from registry.models import Model, in_parallel, models
from registry.references import check_alias, check_name, parse_reference
from registry.s3_client import without_credentials
from registry.settings import Settings
from registry.store import FolderStore, Progress, Store, silent

__all__ = ["FileEntry", "Manifest", "Model", "Registry", "RegistryError", "open_registry"]

# A push loses an attempt only when another push wins it, so this bounds a malfunction, not a race.
_MAX_ATTEMPTS = 1000
_LOST_BEFORE_LISTING = 3
_LONGEST_WAIT = 2.0

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

    def resolve(self, reference: str) -> Manifest:
        """The manifest of ``name@version``, ``name@alias`` or ``name@sha256:…``, or of the newest
        version of ``name`` that is not yanked.

        Raises ``RegistryError`` if the reference is malformed, the name, version, alias or digest
        unknown, the manifest not readable, or not signed by whom the policy asks for.
        """
        return self.located(reference)[1]

    def located(self, reference: str) -> tuple[Model, Manifest]:
        """The same with its model."""
        wanted = parse_reference(reference)
        model, version = self.model(wanted.name), wanted.version
        name = model.name
        if wanted.sha256 is not None:
            manifest = self._by_digest(model, wanted.sha256)
            self._check_signer(manifest, None)
            return model, manifest
        if wanted.alias is not None:
            version = self._aliased(model, wanted.alias)
        elif version is None:
            version = model.newest
            if version is None:
                raise RegistryError(
                    f"every version of {name} is yanked; name one, such as "
                    f"{name}@{model.versions[-1]}"
                )
        if version not in model.versions:
            existing = ", ".join(map(str, model.versions[-20:]))
            raise RegistryError(
                f"{name} has no version {version}; the registry {self.location} has {existing}"
            )
        manifest = self._read_manifest(name, version)
        self._check_signer(manifest, None)
        return model, manifest

    def push(
        self,
        name: str,
        file: str | os.PathLike[str],
        *,
        metrics: Mapping[str, Any] = {},
        metadata: Mapping[str, Any] = {},
        evaluation: Mapping[str, Any] = {},
        samples: Sequence[str | os.PathLike[str]] = (),
        card: str | None = None,
        push_id: str | None = None,
        progress: Progress = silent,
    ) -> Manifest:
        """Publish ``file`` as the next version of ``name`` and return its manifest.

        The version becomes visible whole, with its manifest, or not at all. Any number of
        processes can push at once; each gets a version of its own. ``samples`` are PNGs; ``card``
        is a page in Markdown, written from the facts by default. ``push_id`` is random, unless a
        push that may have been made before is made again.

        Raises ``RegistryError``, with nothing written, if the name is malformed, a file is
        missing, empty or a damaged safetensors file, a metric is not a finite number, or the
        metadata is not JSON. A metric is a number, or a mapping with value, lower and upper.
        """
        from registry.draft import draft

        check_name(name)
        pictures = tuple(Path(path) for path in samples)
        made = draft(name, Path(file), metrics, metadata, evaluation, pictures, card, push_id)
        key = signing.own_key()
        documents.sealed(made.manifest, key)  # not too large
        self.create()
        with tempfile.TemporaryDirectory() as folder:
            files = {
                entry: _on_disk(source, Path(folder, entry.path))
                for entry, source in zip(made.manifest.files, made.sources, strict=True)
            }
            marked = self._put_files(files, progress)
            manifest = self._commit(made.manifest, key)
            for entry in marked:  # a gc that was already on its way may have taken them
                if self.store.size(blob_key(entry)) != entry.size:
                    self.store.put_blob(blob_key(entry), files[entry], entry, anew=True)
        return manifest

    def _put_files(self, files: Mapping[FileEntry, Path], progress: Progress) -> list[FileEntry]:
        """Store the files; returns those that a gc has marked.

        They are written anew: then they are too young for the gc that is about to remove them.
        """
        marks = set(self.store.names("garbage"))

        def put(entry: FileEntry) -> None:
            marked = entry.sha256 in marks
            self.store.put_blob(blob_key(entry), files[entry], entry, progress, anew=marked)
            if marked:
                self.store.delete(f"garbage/{entry.sha256}")

        in_parallel(put, list(files))
        return [entry for entry in files if entry.sha256 in marks]

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

        With ``everything`` its card and pictures come too. A file that is already there with the
        same bytes is left alone.

        Raises ``RegistryError`` as :meth:`fetch` does, with nothing left in ``out_dir``, or if
        another file has the name and ``overwrite`` is not set.
        """
        model, manifest = self.located(reference)
        _check_state(model, manifest, yanked)
        wanted = manifest.files if everything else manifest.files[:1]
        in_parallel(
            lambda entry: self._pull_file(manifest, entry, Path(out_dir), overwrite, progress),
            wanted,
        )
        return Path(out_dir) / manifest.files[0].path

    def _pull_file(
        self,
        manifest: Manifest,
        entry: FileEntry,
        folder: Path,
        overwrite: bool,
        progress: Progress,
    ) -> None:
        from weights.files import sha256

        destination = folder / entry.path
        source = self.file(manifest, entry, progress)

        def write(target: BinaryIO) -> None:
            if self.store.verified:
                copy_whole(source, target)
            else:
                self._check_digest(manifest, entry, copy_hashing(source, target))

        with os_errors(f"pull {manifest.reference}"):
            if destination.exists():
                if sha256(destination) == entry.sha256:
                    return
                if not overwrite:
                    raise RegistryError(
                        f"{destination} exists and is not that of {manifest.reference}; "
                        "pull into another folder, or with --overwrite to replace it"
                    )
            with written_beside(destination, write) as temporary:
                os.replace(temporary, destination)

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
        signing.own_key()
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
            known = ", ".join(model.aliases) or "none"
            raise RegistryError(
                f"{model.name} has no alias {alias!r}; it has {known}; see lora-registry alias list"
            )
        self._judge(f"{model.name}@{alias}", model.name, entry.signature, alias)
        return entry.version

    def _by_digest(self, model: Model, sha256: str) -> Manifest:
        manifests = self.manifests([(model.name, number) for number in model.versions])
        found = [m for m in manifests if m.files[0].sha256.startswith(sha256)]
        if not found:
            raise RegistryError(
                f"no version of {model.name} has a file whose sha256 begins with {sha256}; see "
                "lora-registry show"
            )
        if len({manifest.files[0].sha256 for manifest in found}) > 1:
            references = ", ".join(manifest.reference for manifest in found)
            raise RegistryError(f"sha256 {sha256} stands for {references}; write more digits")
        return found[-1]

    def _check_signer(self, manifest: Manifest, alias: str | None) -> None:
        self._judge(manifest.reference, manifest.name, manifest.signature, alias)

    def _judge(self, words: str, name: str, signature: str | None, alias: str | None) -> None:
        """Hold a signature against the policy, if there is one."""
        policy = signing.policy()
        if policy is None or policy.mode == "off":
            return
        problem = policy.problem(name, signature, alias)
        if problem and policy.mode == "enforce":
            raise RegistryError(
                f"{words} {problem}; see the policy {os.environ[signing.POLICY_VARIABLE]}"
            )
        if problem:
            _log.warning("warning: %s %s", words, problem)

    def _read_manifest(self, name: str, version: int, fresh: bool = False) -> Manifest:
        key = manifest_key(name, version)
        manifest = documents.read(self.store, key, Manifest, "a manifest", fresh)
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
    return f"blobs/sha256/{entry.sha256[:2]}/{entry.sha256}"


def manifest_key(name: str, version: int) -> str:
    """Where a version is."""
    return f"models/{name}/versions/{version:08d}.json"
