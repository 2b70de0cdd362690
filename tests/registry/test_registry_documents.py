"""Documents in the registry that somebody else wrote or spoilt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from registry.api import Manifest, Registry, RegistryError, open_registry

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def manifest_file(loras: Registry, lora: Path, folder: Path) -> Path:
    """The manifest of ``ink@1``, as a file that can be written."""
    loras.push("ink", lora, metrics={"fid": 41.5}, metadata={"base": "sd15"})
    path = folder / "models" / "ink" / "versions" / "00000001.json"
    path.chmod(0o644)
    return path


def test_manifest_fields(manifest_file: Path) -> None:
    document = json.loads(manifest_file.read_text())
    assert list(document) == [
        "format_version",
        "name",
        "version",
        "created",
        "push_id",
        "files",
        "metrics",
        "intervals",
        "evaluation",
        "metadata",
        "pushed_by",
    ]
    assert document["created"].endswith("Z")
    assert list(document["files"][0]) == ["path", "sha256", "size", "chunks"]


def test_manifest_is_frozen(loras: Registry, manifest_file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        loras.resolve("ink").version = 2


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda document: document.update(colour="red"), "colour"),
        (lambda document: document.update(format_version=2), "format_version"),
        (lambda document: document.update(version="1"), "version"),
        (lambda document: document.update(created="yesterday"), "created"),
        (lambda document: document.update(created="2025-01-02T03:04:05"), "created"),
        (lambda document: document.update(files=[]), "files"),
        (lambda document: document.pop("push_id"), "push_id"),
        (lambda document: document["files"][0].update(path="../lora"), r"files\.0\.path"),
        (lambda document: document["files"][0].update(path="/etc/lora"), r"files\.0\.path"),
        (lambda document: document["files"][0].update(sha256="abc"), r"files\.0\.sha256"),
        (lambda document: document["files"][0].update(size=-1), r"files\.0\.size"),
        (lambda document: document["files"][0].update(mode=7), r"files\.0\.mode"),
        (lambda document: document["metrics"].update(fid=float("nan")), r"metrics\.fid"),
        (lambda document: document["metadata"].update(x=float("inf")), "metadata"),
    ],
)
def test_unreadable_manifest(
    loras: Registry, manifest_file: Path, change: Change, field: str
) -> None:
    document = json.loads(manifest_file.read_text())
    change(document)
    manifest_file.write_text(json.dumps(document))
    with pytest.raises(
        RegistryError, match=rf"models/ink/versions/00000001\.json .*is not a manifest.*{field}: "
    ):
        loras.resolve("ink@1")


def test_manifest_that_is_not_json(loras: Registry, manifest_file: Path) -> None:
    manifest_file.write_text('{"format_version": 1, "na')
    with pytest.raises(RegistryError, match="whole document: Invalid JSON"):
        loras.resolve("ink@1")


def test_manifest_of_another_version(loras: Registry, manifest_file: Path) -> None:
    manifest_file.with_name("00000002.json").write_bytes(manifest_file.read_bytes())
    with pytest.raises(RegistryError, match=r"00000002\.json .* is the manifest of ink@1"):
        loras.resolve("ink@2")


def test_stray_files_are_not_versions(loras: Registry, manifest_file: Path) -> None:
    for stray in ("notes.txt", "2.json", "00000002.json.bak", ".00000003.json"):
        manifest_file.with_name(stray).write_text("{}")
    assert loras.versions("ink") == [1]


def test_newer_registry(manifest_file: Path, folder: Path, lora: Path) -> None:
    mark = folder / "registry.json"
    mark.chmod(0o644)
    mark.write_text('{"format_version": 2}')
    loras = open_registry(str(folder))
    for use in (loras.names, lambda: loras.resolve("ink"), lambda: loras.push("ink", lora)):
        with pytest.raises(RegistryError, match="has format version 2, this program knows 1"):
            use()
    assert len(list(manifest_file.parent.iterdir())) == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00"])
def test_spoilt_registry_document(manifest_file: Path, folder: Path, content: str) -> None:
    mark = folder / "registry.json"
    mark.chmod(0o644)
    mark.write_text(content)
    with pytest.raises(RegistryError, match=r"registry\.json in .* should be"):
        open_registry(str(folder)).names()


def test_manifest_survives_a_round_trip(loras: Registry, manifest_file: Path) -> None:
    manifest = loras.resolve("ink@1")
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
