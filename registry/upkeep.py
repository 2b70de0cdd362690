"""Looking after a registry: are its files what they should be, and which does nobody need?"""

from __future__ import annotations

import fnmatch
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from registry import garbage, logs, signing
from registry.api import Registry
from registry.errors import RegistryError
from registry.manifest import Manifest
from registry.models import Listing, listings
from registry.pages import page
from registry.references import check_name
from registry.states import remove


@dataclass(frozen=True)
class Finding:
    """What is wrong with a version, or with an entry of a log."""

    reference: str
    """Of an entry its key."""
    problem: str


@dataclass(frozen=True)
class Garbage:
    """A file that no version needs."""

    key: str
    size: int
    due: bool
    """Can be removed now; else it has to wait for the grace period."""


def verify(
    registry: Registry,
    reference: str | None,
    told: Callable[[Manifest], object] = lambda _: None,
    signed: bool = False,
) -> list[Finding]:
    """Read back every file of a version, of all of a model, or of all, and its manifest, and
    compare them with their digests; with `signed` also that it is, by whom the policy asks for.

    Of models also what was done to them and their aliases, and cards that were edited.
    """
    if reference is not None and "@" in reference:
        model, version = registry.placed(reference)
        return _verify_version(registry, model.name, version, told, signed)
    _ = registry.settings
    if reference is not None:
        check_name(reference)
    known = listings(registry.store, reference)
    if reference is not None and not known:
        registry.model(reference)  # which says what there is instead
    found = []
    for name, listing in known.items():
        damaged, removed = _verify_logs(registry, name, listing)
        found += damaged
        for version in listing.versions:
            if version not in removed:
                found += _verify_version(registry, name, version, told, signed)
    return found


def _verify_logs(registry: Registry, name: str, listing: Listing) -> tuple[list[Finding], set[int]]:
    """What is wrong with the entries of a model's logs, and the versions that were removed."""
    found, removed = [], set()
    for log, numbers in listing.logs.items():
        folder = f"models/{name}/{log}"
        for number in numbers:
            try:
                entry = logs.read(registry.store, folder, number, fresh=True)
            except RegistryError as error:
                found.append(Finding(f"{folder}/{number:08d}.json", str(error)))
                continue
            if log.startswith("states/") and number == numbers[-1] and entry.action == "remove":
                removed.add(int(log.removeprefix("states/")))
    return found, removed


def _verify_version(
    registry: Registry,
    name: str,
    version: int,
    told: Callable[[Manifest], object],
    signed: bool,
) -> list[Finding]:
    try:
        (manifest,) = registry.manifests([(name, version)], fresh=True)
        registry.check(manifest)
    except RegistryError as error:
        return [Finding(f"{name}@{version}", str(error))]
    told(manifest)
    policy = signing.policy()
    problem = None if manifest.signature else "is not signed"
    if policy is not None:
        problem = policy.problem(name, manifest.signature)
    return [Finding(manifest.reference, problem)] if signed and problem else []


def superfluous(
    registry: Registry, pattern: str, keep_last: int | None, keep_best: str | None
) -> list[str]:
    """The versions that no rule keeps, of the models whose names fit: none without a rule.

    What an alias means is always kept. Versions that are yanked are neither among the last nor the
    best. Raises RegistryError if `keep_best` is not lowest:METRIC or highest:METRIC.
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
        good = [n for n in model.versions if n not in model.yanked]
        kept |= set(good[-keep_last:]) if keep_last else set()
        if best:
            sign = 1 if best[1] == "lowest" else -1
            read = registry.manifests([(model.name, n) for n in good])
            scored = [(sign * m.metrics[best[2]], m.version) for m in read if best[2] in m.metrics]
            kept |= {min(scored)[1]} if scored else set(model.versions)
        found += [f"{model.name}@{n}" for n in model.versions if n not in kept]
    return found


def retire(registry: Registry, references: list[str], reason: str) -> list[Finding]:
    """Remove versions; returns those of which it failed, and why."""
    found = []
    for reference in references:
        try:
            remove(registry, reference, reason)
        except RegistryError as error:
            found.append(Finding(reference, str(error)))
    return found


def copy_version(
    source: Registry, reference: str, destination: Registry, *, yanked: bool = False
) -> tuple[Manifest, bool]:
    """Publish a version in another registry, as its next version there, with where it is from,
    unless it is there already; returns what it is there, and whether it is new.

    Raises RegistryError as pull and push do, or if both are one registry.
    """
    model, manifest = source.located(reference)
    origin = {
        "registry": source.location,
        "registry_id": source.identity(),
        "version": manifest.reference,
    }
    if destination.identity() == source.identity():
        raise RegistryError(
            f"{destination.location} is the registry that {manifest.reference} is in; name another"
        )
    for found in destination.readable(
        [(manifest.name, n) for n in destination.numbers(manifest.name)]
    ):
        copied = found.metadata.get("copied_from")
        if isinstance(copied, dict) and {**copied, "registry": source.location} == origin:
            return found, False
    with tempfile.TemporaryDirectory() as folder:
        path = source.pull_version(model, manifest, folder, everything=True, yanked=yanked)
        metrics: dict[str, Any] = dict(manifest.metrics)
        for key, (lower, upper) in manifest.intervals.items():
            metrics[key] = {"value": metrics[key], "lower": lower, "upper": upper}
        made = destination.push(
            manifest.name,
            path,
            metrics=metrics,
            metadata={**manifest.metadata, "copied_from": origin},
            evaluation=manifest.evaluation,
            samples=[path.parent / f.path for f in manifest.files if f.path.endswith(".png")],
            report=next(
                (path.parent / f.path for f in manifest.files if f.path.endswith(".html")), None
            ),
            card=page(source, manifest),
        )
    return made, True


def collect(
    registry: Registry, *, dry_run: bool = True, grace: timedelta = garbage.GRACE
) -> list[Garbage]:
    """Remove the files that no version needs, in two phases, and what killed writers have left.

    A file that nobody needs is marked, and removed by a later call when the mark is older than the
    grace period by the store's clock; see registry.garbage. Raises RegistryError, with nothing
    removed, if a manifest cannot be read: what it needs is not known.
    """
    store = registry.store
    _ = registry.settings  # raises if there is no registry
    limit = store.now() - grace
    marks = garbage.marks(store)
    blobs = {garbage.digest_in(entry.key): entry for entry in store.entries("blobs/sha256/")}
    # Read last: what a push that began before the marks has published is there by now.
    versions = [(model.name, n) for model in registry.models() for n in model.versions]
    needed = {entry.sha256 for made in registry.manifests(versions) for entry in made.files}
    unneeded = [digest for digest in blobs if digest and digest not in needed]
    due = {digest for digest in unneeded if digest in marks and marks[digest].modified <= limit}
    if not dry_run:
        for digest in marks:
            if digest not in unneeded:
                garbage.unmark(store, digest)
        for digest in unneeded:
            if digest not in marks:
                garbage.mark(store, digest)
        due = garbage.remove(store, sorted(due), limit)
    found = [Garbage(blobs[d].key, blobs[d].size, d in due) for d in unneeded]
    left = store.leftovers(limit, not dry_run)
    return found + [Garbage(entry.key, entry.size, True) for entry in left]
