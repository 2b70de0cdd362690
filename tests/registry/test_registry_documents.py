"""Documents in the registry that somebody else wrote or spoilt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from registry.aliases import set_alias
from registry.api import Manifest, Registry, RegistryError, open_registry
from registry.documents import opened
from registry.documents import sealed as sealed_document
from registry.settings import Settings
from registry.signing import new_key

Change = Callable[[dict[str, Any]], object]


def sealed(text: str) -> bytes:
    """A JSON object with its digest at the end, as the format's page says."""
    body = text.rstrip().removesuffix("}").rstrip()
    return f'{body},\n  "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'.encode()


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
        "header",
        "pushed_by",
        "sha256",
    ]
    text = manifest_file.read_text()
    assert sealed(text[: text.index(',\n  "sha256": "' + document["sha256"])]) == text.encode()
    assert document["created"].endswith("Z")
    assert list(document["files"][0]) == ["path", "sha256", "size", "chunks"]


def test_manifest_is_frozen(loras: Registry, manifest_file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        loras.resolve("ink").version = 2


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda document: document.update(colour="red"), "colour"),
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
    del document["sha256"]
    change(document)
    manifest_file.write_bytes(sealed(json.dumps(document)))
    with pytest.raises(
        RegistryError, match=rf"models/ink/versions/00000001\.json .*is not a manifest.*{field}: "
    ):
        loras.resolve("ink@1")


def test_manifest_that_is_not_json(loras: Registry, manifest_file: Path) -> None:
    manifest_file.write_text('{"format_version": 1, "na')
    with pytest.raises(RegistryError, match="does not end with its sha256"):
        loras.resolve("ink@1")


def test_manifest_of_another_version(loras: Registry, manifest_file: Path) -> None:
    manifest_file.with_name("00000002.json").write_bytes(manifest_file.read_bytes())
    with pytest.raises(RegistryError, match=r"00000002\.json .* is the manifest of ink@1"):
        loras.resolve("ink@2")


def test_stray_files_are_not_versions(loras: Registry, manifest_file: Path) -> None:
    for stray in ("notes.txt", "2.json", "00000002.json.bak", ".00000003.json"):
        manifest_file.with_name(stray).write_text("{}")
    assert loras.versions("ink") == [1]


@pytest.mark.parametrize(
    "text", ['{"format_version": 2}', sealed('{"format_version": 2}').decode()]
)
def test_newer_registry(manifest_file: Path, folder: Path, lora: Path, text: str) -> None:
    mark = folder / "registry.json"
    mark.chmod(0o644)
    mark.write_text(text)
    loras = open_registry(str(folder))
    for use in (loras.names, lambda: loras.resolve("ink"), lambda: loras.push("ink", lora)):
        with pytest.raises(RegistryError, match="has format version 2, and this program knows 1"):
            use()
    assert len(list(manifest_file.parent.iterdir())) == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00"])
def test_spoilt_registry_document(manifest_file: Path, folder: Path, content: str) -> None:
    mark = folder / "registry.json"
    mark.chmod(0o644)
    mark.write_text(content)
    with pytest.raises(RegistryError, match=r"registry\.json in .* is not a registry's settings"):
        open_registry(str(folder)).names()


def test_manifest_survives_a_round_trip(loras: Registry, manifest_file: Path) -> None:
    manifest = loras.resolve("ink@1")
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_a_newer_manifest(loras: Registry, manifest_file: Path) -> None:
    document = {**json.loads(manifest_file.read_text()), "format_version": 2}
    manifest_file.write_text(json.dumps(document))
    with pytest.raises(RegistryError, match="it has format version 2, and this program knows 1"):
        loras.resolve("ink@1")


def test_every_changed_byte_is_seen(
    loras: Registry, lora: Path, folder: Path, tmp_path: Path
) -> None:
    """Of a manifest, an alias and the registry's settings, by every single bit of every byte."""
    key = new_key(tmp_path / "key.pem")
    manifest = loras.push("ink", lora, metrics={"fid": 41.5}, metadata={"base": "sd15"})
    entry = set_alias(loras, "ink", "prod", 1)
    for document in (manifest, entry, loras.settings):
        for signer in (None, key):
            if signer and isinstance(document, Settings):
                continue
            data = sealed_document(document, signer)
            assert opened(data, type(document)).model_copy(update={"signature": None}) == document
            for place in range(len(data)):
                for bit in range(8):
                    changed = bytearray(data)
                    changed[place] ^= 1 << bit
                    with pytest.raises(ValueError, match="it "):
                        opened(bytes(changed), type(document))
            for end in (0, 1, len(data) // 2, len(data) - 1):
                with pytest.raises(ValueError, match="it "):
                    opened(data[:end], type(document))


def test_a_document_too_large_is_neither_written_nor_read(
    loras: Registry, lora: Path, manifest_file: Path
) -> None:
    with pytest.raises(
        RegistryError, match=r"has 1,1\d\d,\d\d\d bytes, and 1,048,576 are the most"
    ):
        loras.push("ink", lora, metadata={"notes": "x" * 1_100_000})
    assert loras.versions("ink") == [1]
    with manifest_file.open("ab") as file:
        file.write(b" " * (1 << 20))
    with pytest.raises(RegistryError, match="it has more than 1,048,576 bytes"):
        loras.resolve("ink")
