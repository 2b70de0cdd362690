"""A version's page as it is now: the one it was published with, or what was written later."""

from __future__ import annotations

from registry import logs
from registry.api import Manifest, Registry
from registry.errors import RegistryError, os_errors

_LONGEST = 200_000


def page(registry: Registry, manifest: Manifest) -> str:
    """The page in Markdown. Raises RegistryError if it is missing or damaged."""
    entry = logs.standing(registry.store, _folder(manifest))
    if entry is not None:
        return str(entry.facts["card"])
    for file in manifest.files:
        if file.path == f"{manifest.name}.md":
            path = registry.file(manifest, file)
            with os_errors(f"read the registry {registry.location}"):
                return path.read_text(encoding="utf-8")
    raise RegistryError(f"{manifest.reference} has no card; write one with card --set FILE")


def edit(registry: Registry, manifest: Manifest, text: str) -> None:
    """Replace the page; what it was is kept in a log. Raises RegistryError if it is too long."""
    if len(text) > _LONGEST:
        raise RegistryError(f"the card has {len(text):,} characters, and {_LONGEST:,} are the most")
    fields = {"action": "card", "version": manifest.version, "facts": {"card": text}}
    logs.append(registry.store, _folder(manifest), registry.store.now(), lambda _: fields)


def _folder(manifest: Manifest) -> str:
    return f"models/{manifest.name}/cards/{manifest.version:08d}"
