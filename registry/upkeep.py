"""Looking after a registry: are its files what they should be, and which does nobody need?"""

from __future__ import annotations

import fnmatch
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from registry import signing
from registry.api import Registry, blob_key
from registry.errors import RegistryError
from registry.manifest import Manifest
from registry.pages import page
from registry.store import Entry

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
    return registry.manifests(
        [(model.name, version) for model in registry.models() for version in model.versions]
    )


def verify(
    registry: Registry,
    reference: str | None,
    told: Callable[[Manifest], object] = lambda _: None,
    signed: bool = False,
) -> list[Finding]:
    """Read back every file of a version, of all of a model, or of all, and its manifest, and
    compare them with their digests; with `signed` also that it is, by whom the policy asks for."""
    if reference is None:
        versions = [(model.name, n) for model in registry.models() for n in model.versions]
    elif "@" in reference:
        manifest = registry.resolve(reference)
        versions = [(manifest.name, manifest.version)]
    else:
        versions = [(reference, n) for n in registry.versions(reference)]
    policy, found = signing.policy(), []
    for name, version in versions:
        try:
            (manifest,) = registry.manifests([(name, version)], fresh=True)
            registry.check(manifest)
        except RegistryError as error:
            found.append(Finding(f"{name}@{version}", str(error)))
            continue
        problem = None if manifest.signature else "is not signed"
        if policy is not None:
            problem = policy.problem(name, manifest.signature)
        if signed and problem:
            found.append(Finding(manifest.reference, problem))
        told(manifest)
    return found


def superfluous(
    registry: Registry, pattern: str, keep_last: int | None, keep_best: str | None
) -> list[str]:
    """The versions that no rule keeps, of the models whose names fit: none without a rule.

    What an alias means is always kept. Raises RegistryError if `keep_best` is not lowest:METRIC or
    highest:METRIC.
    """
    best = re.fullmatch(r"(lowest|highest):(.+)", keep_best) if keep_best else None
    if keep_best and best is None:
        raise RegistryError(
            f"--keep-best: expected lowest:METRIC or highest:METRIC, found {keep_best!r}"
        )
    if not (keep_last or best):
        return []
    found = []
    for model in registry.models():
        if not fnmatch.fnmatchcase(model.name, pattern):
            continue
        kept = {entry.version for entry in model.aliases.values()}
        kept |= set(model.versions[-keep_last:]) if keep_last else set()
        if best:
            sign = 1 if best[1] == "lowest" else -1
            read = registry.manifests([(model.name, n) for n in model.versions])
            scored = [(sign * m.metrics[best[2]], m.version) for m in read if best[2] in m.metrics]
            kept |= {min(scored)[1]} if scored else set(model.versions)
        found += [f"{model.name}@{n}" for n in model.versions if n not in kept]
    return found


def copy_version(source: Registry, reference: str, destination: Registry) -> Manifest:
    """Publish a version in another registry, as its next version there, with where it is from.

    Raises RegistryError as pull and push do.
    """
    manifest = source.resolve(reference)
    with tempfile.TemporaryDirectory() as folder:
        path = source.pull(manifest.reference, folder, everything=True)
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
            samples=[path.parent / f.path for f in manifest.files if f.path.endswith(".png")],
            card=page(source, manifest),
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
        if due and _still_old(registry, blob, now - grace):
            store.delete(blob.key)
            store.delete(f"garbage/{digest}")
        elif mark is None:
            store.put_if_absent(f"garbage/{digest}", b"no version needs this file\n")
    if not dry_run:
        for mark in marks.values():  # of files that are gone
            store.delete(mark.key)
    return found


def _still_old(registry: Registry, blob: Entry, limit: datetime) -> bool:
    """Has nobody written it anew since it was listed?"""
    return all(
        found.modified <= limit
        for found in registry.store.entries(blob.key)
        if found.key == blob.key
    )


def _digest(key: str) -> str:
    match = re.fullmatch(r"blobs/sha256/[0-9a-f]{2}/([0-9a-f]{64})", key)
    return match[1] if match else ""
