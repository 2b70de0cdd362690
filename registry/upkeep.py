"""Looking after a registry: are its files what they should be, and which does nobody need?"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from registry.api import Registry, blob_key
from registry.errors import RegistryError
from registry.manifest import Manifest

GRACE = timedelta(days=1)
"""No push takes longer than this."""


@dataclass(frozen=True)
class Finding:
    """What is wrong with a version."""

    reference: str
    problem: str


@dataclass(frozen=True)
class Garbage:
    """A file that no version needs."""

    key: str
    size: int
    due: bool
    """Can be removed now; else it has to wait for the grace period."""


def manifests(registry: Registry) -> list[Manifest]:
    """Those of all versions of all models."""
    return [
        registry.resolve(f"{name}@{version}")
        for name in registry.names()
        for version in registry.versions(name)
    ]


def verify(
    registry: Registry, reference: str | None, told: Callable[[Manifest], object] = lambda _: None
) -> list[Finding]:
    """Read back every file of a version, or of all, and compare it with its digest."""
    found = []
    for manifest in [registry.resolve(reference)] if reference else manifests(registry):
        try:
            registry.check(manifest)
        except RegistryError as error:
            found.append(Finding(manifest.reference, str(error)))
        told(manifest)
    return found


def copy_version(source: Registry, reference: str, destination: Registry) -> Manifest:
    """Publish a version in another registry, as its next version there, with where it is from.

    Raises RegistryError as fetch and push do.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = source.pull(reference, folder)
        manifest = source.resolve(reference)
        metrics: dict[str, Any] = dict(manifest.metrics)
        for key, (lower, upper) in manifest.intervals.items():
            metrics[key] = {"value": metrics[key], "lower": lower, "upper": upper}
        origin = {"registry": source.location, "version": manifest.reference}
        return destination.push(
            manifest.name,
            path,
            metrics=metrics,
            metadata={**manifest.metadata, "copied_from": origin},
            evaluation=manifest.evaluation,
        )


def collect(registry: Registry, *, dry_run: bool = True, grace: timedelta = GRACE) -> list[Garbage]:
    """Remove the files that no version needs, in two phases.

    A file that nobody needs is marked, and removed by a later call when mark and file are older
    than the grace period by the store's clock. A push that finds its file marked writes it anew
    (Registry.push), so a file in use is never old enough; and it looks once more after its
    manifest is there.
    """
    store = registry.store
    registry.names()  # raises if there is no registry
    now = store.now()
    marks = {entry.key.removeprefix("garbage/"): entry for entry in store.entries("garbage/")}
    blobs = [blob for blob in store.entries("blobs/sha256/") if _digest(blob.key)]
    needed = {blob_key(entry) for manifest in manifests(registry) for entry in manifest.files}
    found = []
    for blob in blobs:
        digest = _digest(blob.key)
        mark = marks.pop(digest, None)
        if blob.key in needed:
            if mark is not None and not dry_run:
                store.delete(mark.key)
            continue
        due = mark is not None and now - max(mark.modified, blob.modified) >= grace
        found.append(Garbage(blob.key, blob.size, due))
        if dry_run:
            continue
        if due:
            store.delete(blob.key)
            store.delete(f"garbage/{digest}")
        elif mark is None:
            store.put_if_absent(f"garbage/{digest}", b"no version needs this file\n")
    if not dry_run:
        for mark in marks.values():  # of files that are gone
            store.delete(mark.key)
    return found


def _digest(key: str) -> str:
    match = re.fullmatch(r"blobs/sha256/[0-9a-f]{2}/([0-9a-f]{64})", key)
    return match[1] if match else ""
