"""Pushes that are written down before they are made: to send later, or once more.

Each has a random id that becomes the manifest's `push_id`, so that one which was interrupted after
it was published is not published twice; and a lock, so that two processes do not send it at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from registry.api import Manifest, Registry, RegistryError
from registry.cache import default_cache
from registry.errors import os_errors
from registry.files import written_beside
from registry.references import check_name
from registry.store import Progress, silent

_DOCUMENT, _BEGUN, _LOCK = "push.json", "push.begun", "push.lock"
_DONE = ".done"
"""Ends the name of a folder that is no push any more, and has to go."""


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
    report: str | None = None
    card: str | None = None
    push_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    address: str = ""
    """Where the location was when the push was written down: two folders, or two servers, can be
    named alike."""


def add(
    registry: Registry,
    name: str,
    file: Path,
    samples: Sequence[Path],
    report: Path | None = None,
    **facts: Any,
) -> Path:
    """Keep copies of the files and what is to be said about them; returns the push's folder.

    `facts` are further fields of a Push. Raises RegistryError if the push could never be taken, or
    the cache cannot be written.
    """
    from registry.draft import draft

    check_name(name)
    copies = [f"{number}-{sample.name}" for number, sample in enumerate(samples)]
    push = Push(
        registry.location,
        name,
        file.name,
        samples=tuple(copies),
        report=None if report is None else f"report-{report.name}",
        address=registry.store.address,
        **facts,
    )
    pages = [] if report is None else [report]
    draft(
        name, file, push.metrics, push.metadata, push.evaluation, samples, report, push.card, None
    )
    queue = _queue()
    folder = queue / f"{time.time_ns():020d}-{push.push_id[:8]}"
    filling = queue / f".{folder.name}"
    with os_errors(f"write to the queue {queue}"):
        filling.mkdir(parents=True)
        written = (push.file, *copies, *([push.report] if push.report else []))
        for source, copy in zip((file, *samples, *pages), written, strict=True):
            shutil.copyfile(source, filling / copy)
        write(filling, push)
        os.replace(filling, folder)
    return folder


def waiting(registry: Registry | None = None) -> list[tuple[Path, Push | None]]:
    """The folders of the pushes that wait for a registry, or for any, oldest first, and what is
    written down there. None, for whichever registry, is what cannot be read: `read` says why."""
    found: list[tuple[Path, Push | None]] = []
    for folder in sorted(path.parent for path in _queue().glob(f"[0-9]*/{_DOCUMENT}")):
        try:
            push = read(folder)
        except RegistryError:
            if is_written(folder):  # or another process has just sent it
                found.append((folder, None))
            continue
        if registry is None or push.address == registry.store.address:
            found.append((folder, push))
    return found


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


def deliver(registry: Registry, folder: Path, progress: Progress = silent) -> Manifest | None:
    """Make a push that waits and forget it; None if another process did so in the meantime.

    Raises RegistryError as Registry.push does; it waits on then.
    """
    with _locked(folder) as there:
        if not there:
            return None
        manifest = _send(registry, folder, progress)
        _forget(folder)
    return manifest


def drop(folder: Path) -> None:
    """Forget a push that waits. Raises RegistryError."""
    with _locked(folder) as there:
        if there:
            _forget(folder)


def send(registry: Registry, folder: Path, progress: Progress = silent) -> Manifest:
    """Make the push that is written down there, unless it was made before.

    Raises RegistryError as Registry.push does.
    """
    with _locked(folder):
        return _send(registry, folder, progress)


def _send(registry: Registry, folder: Path, progress: Progress) -> Manifest:
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
        report=None if push.report is None else folder / push.report,
        card=push.card,
        push_id=push.push_id,
        progress=progress,
    )


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Be the only one at a push, and say whether it is still there; waits for who sends it."""
    with os_errors(f"lock the push {folder}"):
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            yield False
            return
    try:
        with os_errors(f"lock the push {folder}"):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield is_written(folder)
    finally:
        os.close(lock)


def _forget(folder: Path) -> None:
    """Take a push away in one step: of one half removed, nobody could tell whether it was made."""
    with os_errors(f"remove from the queue {folder}"):
        os.replace(folder, folder.with_name(f".{folder.name}{_DONE}"))
    for done in folder.parent.glob(f".*{_DONE}"):  # also what a killed process has left
        shutil.rmtree(done, ignore_errors=True)


def _published(registry: Registry, push: Push) -> Manifest | None:
    if not registry.store.names(f"models/{push.name}/versions"):
        return None
    versions = [(push.name, version) for version in registry.versions(push.name)]
    manifests = registry.manifests(versions)
    return next((found for found in manifests if found.push_id == push.push_id), None)


def _queue() -> Path:
    return default_cache().folder / "queue"
