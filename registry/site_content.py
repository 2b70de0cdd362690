"""What a gallery shows, read from a registry: manifests of the versions that are shown, their
pictures, cards and logs, and nothing else."""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict

from registry import logs, signing
from registry.api import Registry, blob_key
from registry.card import card
from registry.errors import RegistryError, os_errors
from registry.logs import LogEntry
from registry.manifest import FileEntry, Manifest
from registry.models import Model, in_parallel, listings
from registry.site import Lora, Picture, Version
from registry.states import Event

_EVENTS = 50
"""So many of a model are shown, the newest."""
_CAPTIONS, _LONGEST_CAPTION = 16, 400
_PNG = b"\x89PNG\r\n\x1a\n"

_log = logging.getLogger("lora-registry")

Advance = Callable[[int], object]
"""Is told how many more are done."""


class Seen(BaseModel):
    """What the bytes of a picture say of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    width: int
    height: int
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shown:
    """A model and what of it is shown, its pictures not yet looked at."""

    model: Model
    manifests: tuple[Manifest, ...]
    """Newest first."""
    card: str
    card_is_written: bool
    events: tuple[Event, ...]
    problems: tuple[str, ...] = ()

    def lora(self, seen: dict[str, Seen], problems: dict[str, str]) -> Lora:
        """With what is known of pictures, and of those that cannot be shown, by digest."""

        def picture(entry: FileEntry) -> Picture:
            if entry.sha256 in problems:
                return Picture(entry.path, entry.sha256, problem=problems[entry.sha256])
            found = seen[entry.sha256]
            return Picture(entry.path, entry.sha256, found.width, found.height, found.captions)

        versions = tuple(
            Version(
                manifest,
                tuple(sorted(self.model.meaning(manifest.version))),
                self.model.yanked.get(manifest.version),
                tuple(picture(entry) for entry in pictures_of(manifest)),
            )
            for manifest in self.manifests
        )
        return Lora(self.model, versions, self.card, self.card_is_written, self.events)


def pictures_of(manifest: Manifest) -> list[FileEntry]:
    """The files that are pictures."""
    return [entry for entry in manifest.files if entry.path.endswith(".png")]


def read(
    registry: Registry, most: int, begin: Callable[[int], Advance] = lambda _: lambda _: None
) -> list[Shown]:
    """All models with their newest versions, `most` at most, and all that an alias means.

    `begin` is told the number of models and gives what is told that one is done. Raises
    RegistryError if there is no registry, or a manifest or log cannot be read.
    """
    found = registry.models()
    listed = listings(registry.store)
    advance = begin(len(found))

    def one(model: Model) -> Shown | None:
        shown = _shown(registry, model, most, listed[model.name].logs)
        advance(1)
        return shown

    return [shown for shown in in_parallel(one, found) if shown is not None]


def _shown(
    registry: Registry, model: Model, most: int, numbers: dict[str, list[int]]
) -> Shown | None:
    """What of a model the policy lets count, None if that is nothing."""
    name = model.name
    aliases = {
        alias: entry
        for alias, entry in model.aliases.items()
        if _allowed(f"{name}@{alias}", name, entry.signature, alias)
    }
    model = replace(model, aliases=aliases)
    wanted = {entry.version for entry in aliases.values()} & set(model.versions)
    wanted |= {*model.versions[-most:], model.newest or model.versions[-1]}
    order = sorted((number for number in wanted if number is not None), reverse=True)
    manifests = [
        manifest
        for number in order
        for manifest in registry.manifests([(name, number)])  # several models at a time are enough
        if _allowed(manifest.reference, name, manifest.signature)
    ]
    if not manifests:
        return None
    head = next((m for m in manifests if m.version not in model.yanked), manifests[0])
    text, problem = _card(registry, head, numbers.get(f"cards/{head.version:08d}", []))
    events = sorted(_events(registry, name, manifests, numbers), key=lambda e: e.at)
    return Shown(
        model,
        tuple(manifests),
        text,
        text != card(head),
        tuple(reversed(events[-_EVENTS:])),
        (problem,) if problem else (),
    )


def _allowed(words: str, name: str, signature: str | None, alias: str | None = None) -> bool:
    """Does the policy let it count? Says why not, on the way."""
    try:
        signing.judge(words, name, signature, alias)
    except RegistryError as error:
        _log.warning("warning: %s; it is not shown", error)
        return False
    return True


def _card(registry: Registry, manifest: Manifest, edits: list[int]) -> tuple[str, str]:
    """The page of a version as it is now, and what keeps it from being read."""
    folder = f"models/{manifest.name}/cards/{manifest.version:08d}"
    if edit := logs.newest(registry.store, folder, edits):
        return str(edit.facts.get("card", "")), ""
    entry = next((file for file in manifest.files if file.path == f"{manifest.name}.md"), None)
    if entry is None:
        return "", ""
    data, problem = blob(registry, manifest, entry)
    try:
        return data.decode(), problem
    except UnicodeDecodeError:
        return "", f"the card of {manifest.reference} is not UTF-8 text; write one with card --set"


def _events(
    registry: Registry, name: str, manifests: list[Manifest], numbers: dict[str, list[int]]
) -> Iterator[Event]:
    """The pushes of versions that are shown, and all else; see registry.states.log."""
    for manifest in reversed(manifests):
        yield Event(manifest.created, manifest.pushed_by, f"push {manifest.reference}", "")
    for log in sorted(numbers):
        kind, _, of = log.partition("/")
        if kind == "cards":
            of = str(int(of))
        for number in numbers[log][-_EVENTS:]:
            entry = logs.read(registry.store, f"models/{name}/{log}", number)
            yield Event(entry.at, entry.by, _said(entry, name, kind, of), entry.reason)


def _said(entry: LogEntry, name: str, kind: str, of: str) -> str:
    reference = f"{name}@{entry.version}"
    if kind == "aliases":
        means = "nothing" if entry.version is None else reference
        return f"{entry.action} {of}: {means}{', forced' if entry.facts.get('forced') else ''}"
    if kind == "events":
        return f"{entry.action} {reference} as {entry.facts.get('alias')}"
    return f"{entry.action} {reference}"


def blob(registry: Registry, manifest: Manifest, entry: FileEntry) -> tuple[bytes, str]:
    """The bytes of a file, compared with its digest; or nothing, and in a sentence why.

    Raises RegistryError if the registry cannot be asked.
    """
    from registry.chunks import digest

    store, key = registry.store, blob_key(entry)
    where = f"{entry.path} of {manifest.reference}"
    remedy = f"push the same file again to {registry.location} to repair it"
    damaged = f"{where} is damaged in the registry; {remedy}"
    try:
        path = store.blob_file(key, entry)
    except RegistryError:
        if store.digest(key) in (None, entry.sha256):
            raise
        return b"", damaged
    if path is None:
        return b"", f"{where} is missing from the registry; {remedy}"
    with os_errors(f"read the registry {registry.location}"):
        data = path.read_bytes()
    return (data, "") if digest(data) == entry.sha256 else (b"", damaged)


def look(data: bytes) -> Seen:
    """What a PNG says: its size, and the prompts that lora-launch and lora-sample, or other
    programs, wrote into it. Raises ValueError if it is none."""
    if data[:8] != _PNG or data[12:16] != b"IHDR" or len(data) < 33:
        raise ValueError("is no PNG")
    width, height = struct.unpack(">II", data[16:24])
    if not (0 < width < 1 << 16 and 0 < height < 1 << 16):
        raise ValueError(f"is a PNG of {width} × {height} pixels")
    captions = []
    for key, words in _texts(data):
        if key == "parameters":  # as the web interfaces write it: the prompt, then the settings
            words = re.split(r"\n(?:Negative prompt|Steps): ", words, maxsplit=1)[0]
        elif not key.startswith("prompt"):
            continue
        plain = " ".join(words.split())
        captions.append(plain if len(plain) <= _LONGEST_CAPTION else f"{plain[:_LONGEST_CAPTION]}…")
    return Seen(width=width, height=height, captions=tuple(filter(None, captions))[:_CAPTIONS])


def _texts(data: bytes) -> Iterator[tuple[str, str]]:
    """Keys and texts of a PNG that are not compressed (PNG specification, 11.3.3)."""
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += 12 + length
        key, _, rest = content.partition(b"\0")
        if kind == b"tEXt":
            yield key.decode("latin-1"), rest.decode("latin-1")
        elif kind == b"iTXt" and rest[:1] == b"\0":
            words = rest[2:].split(b"\0", 2)[-1]
            yield key.decode("latin-1"), words.decode("utf-8", "replace")
