"""From a file on disk to the manifest of a version that has no number yet."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from registry import chunks, logs
from registry.card import card
from registry.errors import RegistryError, os_errors, problems
from registry.manifest import FileEntry, Manifest

_LONGEST_HEADER_VALUE = 500
_HEADER_KEYS = re.compile(r"ss_|modelspec\.|lora\.")
_LONGEST_CARD = 1 << 20
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Draft:
    """What is to be published: the manifest, its number not yet right, and where its files are."""

    manifest: Manifest
    sources: tuple[Path | bytes, ...]
    """Of each of the manifest's files: a path, or the bytes themselves."""


def draft(
    name: str,
    file: Path,
    metrics: Mapping[str, Any],
    metadata: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    samples: Sequence[Path],
    report: Path | None,
    text: str | None,
    push_id: str | None,
    folder: Path | None = None,
) -> Draft:
    """Look at the files and write the card, unless its text is given.

    Where the metadata has trigger words or a licence, and the header of the LoRA has not, a copy
    with them is made in `folder`, if there is one. Raises RegistryError if a file is not fit to be
    published, or a value cannot be kept.
    """
    entries = [_entry(name + file.suffix, file)]
    header = _header(file)
    said = {key: value for key, value in _said(metadata).items() if header.get(key) != value}
    if folder and said and file.suffix == ".safetensors":
        file, header = _with_header(file, said, folder / "lora"), {**header, **said}
        entries = [_entry(entries[0].path, file)]
    pictures = [_entry(_picture_name(name, n), path, _PNG) for n, path in enumerate(samples)]
    reports = [] if report is None else [report]
    values, intervals = _scores(metrics)
    try:
        manifest = Manifest(
            name=name,
            version=1,
            created=datetime.now(timezone.utc).replace(microsecond=0),
            push_id=push_id or uuid.uuid4().hex,
            files=(*entries, *pictures),
            metrics=dict(values),
            intervals=intervals,
            evaluation=dict(evaluation),
            metadata=dict(metadata),
            header=header,
            pushed_by=logs.who(),
        )
    except ValidationError as error:
        raise RegistryError(
            f"cannot publish {file} as {name}: {problems(error)}; correct it and push again"
        ) from error
    content = (card(manifest) if text is None else text).encode()
    if len(content) > _LONGEST_CARD:
        raise RegistryError(f"the card has {len(content):,} bytes, and 1 MiB is the most")
    page = FileEntry(path=f"{name}.md", sha256=chunks.digest(content), size=len(content))
    files = (*entries, page, *pictures, *(_entry(f"{name}.html", path) for path in reports))
    sources: tuple[Path | bytes, ...] = (file, content, *samples, *reports)
    return Draft(manifest.model_copy(update={"files": files}), sources)


def _picture_name(name: str, number: int) -> str:
    """The first is named as LoRA managers look for a preview."""
    return f"{name}.{number + 1}.png" if number else f"{name}.preview.png"


def _entry(name: str, path: Path, begins: bytes = b"") -> FileEntry:
    if not path.is_file():
        raise RegistryError(f"there is no file {path} to push; correct the path")
    with os_errors(f"read {path}"):
        with path.open("rb") as file:
            if file.read(len(begins)) != begins:
                raise RegistryError(f"{path} is no PNG; convert the picture")
        size = path.stat().st_size
        if size == 0:
            raise RegistryError(f"{path} is empty; push a file that was written to its end")
        digest, parts = chunks.digests(path)
    try:
        return FileEntry(
            path=name, sha256=digest, size=size, chunks=parts if len(parts) > 1 else ()
        )
    except ValidationError as error:
        raise RegistryError(f"cannot publish {path}: {problems(error)}; rename it") from error


def _header(file: Path) -> dict[str, str]:
    """What a LoRA file says of itself, without what is too long to read. Raises RegistryError if it
    is no LoRA, or holds NaN."""
    from weights import lora_files
    from weights.files import WeightsError

    try:
        found = lora_files.read(file, ignore_unknown=True)
    except WeightsError as error:
        raise RegistryError(str(error)) from error
    return {
        key: value
        for key, value in sorted(found.metadata.items())
        if _HEADER_KEYS.match(key) and len(value) <= _LONGEST_HEADER_VALUE
    }


def _said(metadata: Mapping[str, Any]) -> dict[str, str]:
    """What other programs read in the header of a LoRA, as far as the metadata says it."""
    words = metadata.get("trigger_words")
    found = {
        "modelspec.trigger_phrase": ", ".join(map(str, words)) if isinstance(words, list) else "",
        "modelspec.license": metadata.get("licence"),
    }
    return {key: value for key, value in found.items() if value and isinstance(value, str)}


def _with_header(file: Path, said: Mapping[str, str], path: Path) -> Path:
    """A copy of a safetensors file with more in its header; the tensors are the same bytes.

    The format: 8 bytes with the length of the header, the header as JSON, padded to a multiple of 8
    bytes, the tensors.
    """
    with os_errors(f"write a copy of {file}"), file.open("rb") as source, path.open("wb") as target:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        metadata = {**header.pop("__metadata__", {}), **said}
        text = json.dumps({"__metadata__": metadata, **header}, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        target.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, target)
    return path


def _scores(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and intervals of metrics given as numbers or as value, lower and upper."""
    values, intervals = {}, {}
    for key, given in metrics.items():
        if not (isinstance(key, str) and key.strip() and key.isprintable()):
            raise RegistryError(f"{key!r} is no name of a metric; give it one that can be read")
        values[key] = given
        if isinstance(given, Mapping) and set(given) == {"value", "lower", "upper"}:
            values[key] = given["value"]
            intervals[key] = (given["lower"], given["upper"])
    return values, intervals
