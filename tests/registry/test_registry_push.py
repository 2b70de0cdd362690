from __future__ import annotations

import errno
import hashlib
import os
import pickle
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from registry.api import FileEntry, Registry, RegistryError, open_registry
from registry.store import FolderStore
from weights import lora_files
from weights.lora import Adapter


def test_manifest_tells_what_was_pushed(loras: Registry, lora: Path) -> None:
    lineage = {"base": {"name": "sd15", "sha256": "ab" * 32}, "steps": 200, "tags": ["ink", None]}
    manifest = loras.push("emoji-ink", lora, metrics={"fid": 41, "clip": 0.31}, metadata=lineage)

    assert manifest.reference == "emoji-ink@1"
    assert datetime.now(timezone.utc) - manifest.created < timedelta(minutes=5)
    entry, page = manifest.files
    assert page.path == "emoji-ink.md"
    assert entry.path == "emoji-ink.safetensors"
    assert entry.sha256 == hashlib.sha256(lora.read_bytes()).hexdigest()
    assert entry.size == lora.stat().st_size
    assert manifest.metrics == {"fid": 41.0, "clip": 0.31}
    assert manifest.metadata == lineage
    assert loras.resolve("emoji-ink@1") == manifest


def test_versions_count_from_one_for_each_name(loras: Registry, make_lora: Any) -> None:
    pushed = [
        loras.push(name, make_lora(seed=seed)).reference
        for seed, name in enumerate(["ink", "ink", "oil", "ink"])
    ]
    assert pushed == ["ink@1", "ink@2", "oil@1", "ink@3"]
    assert loras.names() == ["ink", "oil"]
    assert loras.versions("ink") == [1, 2, 3]
    assert loras.resolve("ink").version == 3


def test_newest_is_by_number_not_by_text(loras: Registry, lora: Path) -> None:
    for _ in range(11):
        loras.push("ink", lora)
    assert loras.versions("ink") == list(range(1, 12))
    assert loras.resolve("ink").version == 11


def test_equal_bytes_are_stored_once(loras: Registry, lora: Path, blob: Callable[[], Path]) -> None:
    loras.push("ink", lora)
    loras.push("ink", lora)
    loras.push("oil", lora)
    assert blob().read_bytes() == lora.read_bytes()


def test_layout(loras: Registry, lora: Path, folder: Path) -> None:
    digests = [file.sha256 for file in loras.push("ink", lora).files]
    assert sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    ) == [
        *sorted(f"blobs/sha256/{digest[:2]}/{digest}" for digest in digests),
        "models/ink/versions/00000001.json",
        "registry.json",
    ]


def test_stored_files_are_read_only(loras: Registry, lora: Path, folder: Path) -> None:
    loras.push("ink", lora)
    modes = {path.stat().st_mode & 0o222 for path in folder.rglob("*") if path.is_file()}
    assert modes == {0}


def test_other_weight_formats_are_kept_as_they_are(loras: Registry, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-200.ckpt"
    matrix = np.ones((4, 4), np.float32)
    adapters = {
        "unet": {
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": Adapter(matrix, matrix, 4.0)
        }
    }
    lora_files.write(checkpoint, adapters, {}, "mindone")
    assert loras.push("ink", checkpoint).files[0].path == "ink.ckpt"


_DOWN = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.ckpt", pickle.dumps({"a": 1}), "pickle"),
        ("x.safetensors", {"first_stage_model.x": np.ones(1, np.float32)}, "is a base model"),
        ("x.safetensors", {"words": np.ones((4, 4), np.float32)}, "found no LoRA in this file"),
        ("x.safetensors", {_DOWN: np.ones((4, 4), np.float32)}, "has no up matrix"),
        ("x.safetensors", {_DOWN: np.full((4, 4), np.nan, np.float32)}, "NaN or infinite"),
    ],
)
def test_what_is_no_lora_is_refused(
    loras: Registry, tmp_path: Path, folder: Path, name: str, content: Any, message: str
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    with pytest.raises(RegistryError, match=message):
        loras.push("ink", path)
    assert not folder.exists()


@pytest.mark.parametrize("metric", ["", " ", "kid\x1b[31m"])
def test_a_metric_has_a_name(loras: Registry, lora: Path, metric: str) -> None:
    with pytest.raises(RegistryError, match="is no name of a metric"):
        loras.push("ink", lora, metrics={metric: 1.0})


def test_words_about_scores_that_do_not_fit(loras: Registry, lora: Path) -> None:
    with pytest.raises(RegistryError) as caught:
        loras.push("ink", lora, metrics={"kid": {"value": 3, "lower": 4, "upper": 5}})
    assert "intervals: kid is 3 and not within 4 to 5; correct it" in str(caught.value)


def test_pushing_again_repairs_a_damaged_blob(
    loras: Registry,
    lora: Path,
    blob: Callable[[], Path],
    damage: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    loras.push("ink", lora)
    damage(blob())
    loras.push("ink", lora)
    assert loras.pull("ink@1", tmp_path / "out").read_bytes() == lora.read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Ink",
        "émoji",
        "a b",
        ".ink",
        "-ink",
        "../ink",
        "a/b",
        "a\\b",
        "ink@1",
        "a" * 65,
        "ink\n",
    ],
)
def test_bad_name(loras: Registry, lora: Path, folder: Path, name: str) -> None:
    with pytest.raises(RegistryError, match=r"is not a model name: use 1 to 64 of a-z, 0-9"):
        loras.push(name, lora)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["a", "0", "emoji-ink_v1.5", "a" * 64])
def test_good_name(loras: Registry, lora: Path, name: str) -> None:
    assert loras.push(name, lora).reference == f"{name}@1"


def _missing(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _text(path: Path) -> None:
    path.write_text("these are not weights")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_missing, "there is no file"),
        (_folder, "there is no file"),
        (_empty, "is empty"),
        (_truncated, "safetensors"),
        (_text, "safetensors"),
    ],
)
def test_bad_file(
    loras: Registry, lora: Path, folder: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(lora)
    with pytest.raises(RegistryError, match=message) as caught:
        loras.push("ink", lora)
    assert str(lora) in str(caught.value)
    assert not folder.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "41", True, None])
def test_bad_metric(loras: Registry, lora: Path, folder: Path, value: Any) -> None:
    with pytest.raises(RegistryError, match=r"cannot publish .*metrics\.fid: .* number.*found"):
        loras.push("ink", lora, metrics={"clip": 0.3, "fid": value})
    assert not folder.exists()


@pytest.mark.parametrize("value", [float("nan"), Path("x"), {1, 2}, {"deep": [float("inf")]}])
def test_metadata_that_is_not_json(loras: Registry, lora: Path, folder: Path, value: Any) -> None:
    with pytest.raises(RegistryError, match=r"cannot publish .*metadata"):
        loras.push("ink", lora, metadata={"base": value})
    assert not folder.exists()


def test_file_that_changes_while_it_is_pushed(folder: Path, lora: Path) -> None:
    store = FolderStore(folder)
    with pytest.raises(RegistryError, match="changed while it was pushed"):
        digest = hashlib.sha256(b"what it was before").hexdigest()
        store.put_blob("blobs/x", lora, FileEntry(path="x", sha256=digest, size=20))
    assert list((folder / "blobs").iterdir()) == []


class ForgetfulStore(FolderStore):
    """Writes, then reports the key as taken: a client that repeats a write whose reply was lost."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        super().put_if_absent(key, data)
        return False


def test_a_push_recognises_its_own_manifest(folder: Path, lora: Path) -> None:
    forgetful = Registry(ForgetfulStore(folder))
    assert forgetful.push("ink", lora).version == 1
    assert forgetful.push("ink", lora).version == 2
    assert forgetful.versions("ink") == [1, 2]


class ShortSightedStore(FolderStore):
    """Lists no version, so that every push believes it is the first."""

    def names(self, prefix: str) -> list[str]:
        return [] if prefix.endswith("/versions") else super().names(prefix)


def test_a_push_never_replaces_a_version(folder: Path, loras: Registry, make_lora: Any) -> None:
    first = loras.push("ink", make_lora(seed=1))
    second = Registry(ShortSightedStore(folder)).push("ink", make_lora(seed=2))
    assert loras.resolve("ink@1") == first
    assert loras.resolve("ink@2") == second


def test_file_system_without_hard_links(
    loras: Registry, lora: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(RegistryError, match="has no hard links"):
        loras.push("ink", lora)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("https://example.org/loras", "https://example.org/loras is another URL"),
        ("s3://", "is no place for a registry"),
        ("s3:///loras", "is no place for a registry"),
        ("s3://bucket/../loras", "is no place for a registry"),
        ("s3://bucket/a//b", "is no place for a registry"),
        ("s3://bucket/lör", "is no place for a registry"),
        ("s3://bucket/loras?x=1", "is no place for a registry"),
        ("s3://key:secret@bucket/loras", "a registry's location holds no credentials"),
    ],
)
def test_what_is_no_location(location: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message) as caught:
        open_registry(location)
    assert "secret" not in str(caught.value)


def test_no_location() -> None:
    with pytest.raises(RegistryError, match="no registry is named"):
        open_registry("")


def test_opening_writes_nothing(folder: Path) -> None:
    open_registry(str(folder))
    assert not folder.exists()


def test_a_folder_with_other_things_is_left_alone(
    loras: Registry, lora: Path, folder: Path
) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(RegistryError, match=r"is not empty and has no registry\.json"):
        loras.push("ink", lora)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_becomes_a_registry(loras: Registry, lora: Path, folder: Path) -> None:
    folder.mkdir()
    assert loras.push("ink", lora).version == 1


def test_a_file_is_not_a_registry(loras: Registry, lora: Path, folder: Path) -> None:
    folder.write_text("a file")
    with pytest.raises(RegistryError, match="Not a directory"):
        loras.push("ink", lora)
    with pytest.raises(RegistryError, match="Not a directory"):
        loras.names()


def test_a_push_can_be_checked_without_writing(tmp_path: Path) -> None:
    new = tmp_path / "new"
    open_registry(str(new)).check_push("ink")
    assert not new.exists()
    with pytest.raises(RegistryError, match="name"):
        open_registry(str(new)).check_push("../ink")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RegistryError, match="not empty"):
        open_registry(str(tmp_path)).check_push("ink")
