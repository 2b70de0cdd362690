"""Pushes to send later, kept in this machine's cache until the registry can be reached."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from registry.api import Manifest, Registry, RegistryError
from registry.cache import default_cache
from registry.errors import os_errors
from registry.references import check_name
from registry.store import Progress, silent

_BEGUN = "begun"


@dataclass(frozen=True)
class Job:
    """A push that waits. Its files lie beside the job's own, under these names."""

    location: str
    name: str
    file: str
    metrics: dict[str, Any]
    metadata: dict[str, Any]
    evaluation: dict[str, Any]
    samples: tuple[str, ...]
    card: str | None
    push_id: str


def add(
    location: str,
    name: str,
    file: Path,
    *,
    metrics: Mapping[str, Any] = {},
    metadata: Mapping[str, Any] = {},
    evaluation: Mapping[str, Any] = {},
    samples: Sequence[Path] = (),
    card: str | None = None,
) -> Path:
    """Keep copies of the files and what is to be said about them; returns the job's folder.

    Raises RegistryError if the push could never be taken, or the cache cannot be written.
    """
    from registry.draft import draft

    check_name(name)
    draft(name, file, metrics, metadata, evaluation, samples, card, None)
    queue = _folder()
    job = Job(
        location,
        name,
        file.name,
        dict(metrics),
        dict(metadata),
        dict(evaluation),
        tuple(f"{number}-{sample.name}" for number, sample in enumerate(samples)),
        card,
        uuid.uuid4().hex,
    )
    folder = queue / f"{time.time_ns():020d}-{job.push_id[:8]}"
    filling = queue / f".{folder.name}"
    with os_errors(f"write to the queue {queue}"):
        filling.mkdir(parents=True)
        for source, copy in zip((file, *samples), (job.file, *job.samples), strict=True):
            shutil.copyfile(source, filling / copy)
        (filling / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
        os.replace(filling, folder)
    return folder


def waiting(location: str) -> list[Path]:
    """The folders of the jobs for a registry, oldest first."""
    queue = _folder()
    found = sorted(path for path in queue.glob("[0-9]*") if (path / "job.json").exists())
    return [path for path in found if read(path).location == location]


def read(folder: Path) -> Job:
    """A job. Raises RegistryError if it cannot be read."""
    try:
        with os_errors("read the queue"):
            values = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        return Job(**{**values, "samples": tuple(values["samples"])})
    except (ValueError, TypeError, KeyError) as error:
        raise RegistryError(f"{folder} is no push of this program; move it away") from error


def send(registry: Registry, folder: Path, progress: Progress = silent) -> Manifest:
    """Make a push that waits, and take it from the queue.

    One that was interrupted after it was published is not published twice. Raises RegistryError as
    Registry.push does; the job then stays.
    """
    job, begun = read(folder), folder / _BEGUN
    found = _published(registry, job) if begun.exists() else None
    if found is None:
        with os_errors("write to the queue"):
            begun.touch()
        found = registry.push(
            job.name,
            folder / job.file,
            metrics=job.metrics,
            metadata=job.metadata,
            evaluation=job.evaluation,
            samples=[folder / sample for sample in job.samples],
            card=job.card,
            push_id=job.push_id,
            progress=progress,
        )
    shutil.rmtree(folder)
    return found


def _published(registry: Registry, job: Job) -> Manifest | None:
    if job.name not in registry.names():
        return None
    versions = [(job.name, version) for version in registry.versions(job.name)]
    manifests = registry.manifests(versions)
    return next((found for found in manifests if found.push_id == job.push_id), None)


def _folder() -> Path:
    return default_cache().folder / "queue"
