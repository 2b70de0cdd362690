"""Pushes that are written down before they are made: to send later, or once more.

Each has a random id that becomes the manifest's `push_id`, so that one which was interrupted after
it was published is not published twice.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from registry.api import Manifest, Registry, RegistryError
from registry.cache import default_cache
from registry.errors import os_errors
from registry.files import written_beside
from registry.references import check_name
from registry.store import Progress, silent

_DOCUMENT, _BEGUN = "push.json", "push.begun"


@dataclass(frozen=True)
class Push:
    """What is to be published, and where."""

    location: str
    name: str
    file: str
    """Of the LoRA; if it is relative, then to the folder that the push is written down in."""
    metrics: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    samples: tuple[str, ...] = ()
    card: str | None = None
    push_id: str = field(default_factory=lambda: uuid.uuid4().hex)


def add(location: str, name: str, file: Path, samples: Sequence[Path], **facts: Any) -> Path:
    """Keep copies of the files and what is to be said about them; returns the push's folder.

    `facts` are further fields of a Push. Raises RegistryError if the push could never be taken, or
    the cache cannot be written.
    """
    from registry.draft import draft

    check_name(name)
    copies = [f"{number}-{sample.name}" for number, sample in enumerate(samples)]
    push = Push(location, name, file.name, samples=tuple(copies), **facts)
    draft(name, file, push.metrics, push.metadata, push.evaluation, samples, push.card, None)
    queue = _queue()
    folder = queue / f"{time.time_ns():020d}-{push.push_id[:8]}"
    filling = queue / f".{folder.name}"
    with os_errors(f"write to the queue {queue}"):
        filling.mkdir(parents=True)
        for source, copy in zip((file, *samples), (push.file, *copies), strict=True):
            shutil.copyfile(source, filling / copy)
        write(filling, push)
        os.replace(filling, folder)
    return folder


def waiting(location: str) -> list[Path]:
    """The folders of the pushes that wait for a registry, oldest first."""
    found = sorted(path.parent for path in _queue().glob(f"[0-9]*/{_DOCUMENT}"))
    return [folder for folder in found if read(folder).location == location]


def write(folder: Path, push: Push) -> None:
    """Write a push down. Raises OSError."""
    document = json.dumps(asdict(push), indent=2).encode()
    with written_beside(folder / _DOCUMENT, lambda file: file.write(document)) as temporary:
        os.replace(temporary, folder / _DOCUMENT)


def is_written(folder: Path) -> bool:
    """Is a push written down there?"""
    return (folder / _DOCUMENT).exists()


def read(folder: Path) -> Push:
    """What is written down there. Raises RegistryError if it cannot be read."""
    try:
        with os_errors("read the push"):
            values = json.loads((folder / _DOCUMENT).read_text(encoding="utf-8"))
        return Push(**{**values, "samples": tuple(values["samples"])})
    except (ValueError, TypeError, KeyError) as error:
        raise RegistryError(f"{folder} holds no push of this program; move it away") from error


def send(registry: Registry, folder: Path, progress: Progress = silent) -> Manifest:
    """Make the push that is written down there, unless it was made before.

    Raises RegistryError as Registry.push does.
    """
    push, begun = read(folder), folder / _BEGUN
    found = _published(registry, push) if begun.exists() else None
    if found is not None:
        return found
    with os_errors("note that a push begins"):
        begun.touch()
    return registry.push(
        push.name,
        folder / push.file,
        metrics=push.metrics,
        metadata=push.metadata,
        evaluation=push.evaluation,
        samples=[folder / sample for sample in push.samples],
        card=push.card,
        push_id=push.push_id,
        progress=progress,
    )


def _published(registry: Registry, push: Push) -> Manifest | None:
    if not registry.store.names(f"models/{push.name}/versions"):
        return None
    versions = [(push.name, version) for version in registry.versions(push.name)]
    manifests = registry.manifests(versions)
    return next((found for found in manifests if found.push_id == push.push_id), None)


def _queue() -> Path:
    return default_cache().folder / "queue"
