from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from registry.api import Registry, RegistryError


def test_pull_gives_the_same_bytes(loras: Registry, make_lora: Any, tmp_path: Path) -> None:
    first, second = make_lora("a.safetensors", seed=1), make_lora("b.safetensors", seed=2)
    loras.push("ink", first)
    loras.push("ink", second)

    pulled = loras.pull("ink@1", tmp_path / "deep" / "out")
    assert pulled == tmp_path / "deep" / "out" / "ink.safetensors"
    assert pulled.read_bytes() == first.read_bytes()
    assert loras.pull("ink", tmp_path / "newest").read_bytes() == second.read_bytes()
    assert [path.name for path in pulled.parent.iterdir()] == ["ink.safetensors"]


def test_a_pulled_file_can_be_written(loras: Registry, lora: Path, tmp_path: Path) -> None:
    loras.push("ink", lora)
    assert loras.pull("ink", tmp_path / "out").stat().st_mode & 0o200


def test_fetch_gives_a_verified_file(loras: Registry, lora: Path) -> None:
    pushed = loras.push("ink", lora)
    path, manifest = loras.fetch("ink")
    assert path.read_bytes() == lora.read_bytes()
    assert manifest == pushed


def test_pulling_twice_leaves_the_file_alone(loras: Registry, lora: Path, tmp_path: Path) -> None:
    loras.push("ink", lora)
    before = loras.pull("ink", tmp_path / "out").stat()
    after = loras.pull("ink", tmp_path / "out").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_another_file_is_not_overwritten_unless_told(
    loras: Registry, lora: Path, tmp_path: Path
) -> None:
    loras.push("ink", lora)
    mine = tmp_path / "ink.safetensors"
    mine.write_text("mine")
    with pytest.raises(RegistryError, match="exists and is not that of ink@1; pull into"):
        loras.pull("ink", tmp_path)
    assert mine.read_text() == "mine"
    assert loras.pull("ink", tmp_path, overwrite=True) == mine
    assert mine.read_bytes() == lora.read_bytes()


def test_damaged_blob(
    loras: Registry,
    lora: Path,
    blob: Callable[[], Path],
    damage: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    from weights.files import sha256

    digest = loras.push("ink", lora).files[0].sha256
    damage(blob())
    for get in (lambda: loras.pull("ink", tmp_path / "out"), lambda: loras.fetch("ink")):
        with pytest.raises(RegistryError, match="ink@1 is damaged") as caught:
            get()
        assert digest in str(caught.value)
        assert sha256(blob()) in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_every_sampled_damage_of_a_blob_is_refused(
    loras: Registry, lora: Path, blob: Callable[[], Path], tmp_path: Path
) -> None:
    """A bit anywhere, bytes cut off or added."""
    loras.push("ink", lora)
    path = blob()
    path.chmod(0o644)
    whole = path.read_bytes()
    damaged = [whole[:-1], whole[: len(whole) // 2], whole + b"\0", b"\0" * len(whole)]
    draw = random.Random(0)
    for position in [0, len(whole) - 1, *draw.sample(range(len(whole)), 60)]:
        changed = bytearray(whole)
        changed[position] ^= 1 << draw.randrange(8)
        damaged.append(bytes(changed))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(RegistryError, match="the stored file of ink@1 is damaged"):
            loras.fetch("ink")
        with pytest.raises(RegistryError, match="the stored file of ink@1 is damaged"):
            loras.pull("ink", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
    path.write_bytes(whole)
    assert loras.pull("ink", tmp_path / "out").read_bytes() == lora.read_bytes()


def test_damaged_blob_does_not_replace_a_file(
    loras: Registry,
    lora: Path,
    blob: Callable[[], Path],
    damage: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    loras.push("ink", lora)
    damage(blob())
    mine = tmp_path / "ink.safetensors"
    mine.write_text("mine")
    with pytest.raises(RegistryError, match="damaged"):
        loras.pull("ink", tmp_path, overwrite=True)
    assert mine.read_text() == "mine"


def test_missing_blob(
    loras: Registry, lora: Path, blob: Callable[[], Path], tmp_path: Path
) -> None:
    loras.push("ink", lora)
    blob().unlink()
    with pytest.raises(RegistryError, match="a file of ink@1, is missing"):
        loras.pull("ink", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(loras: Registry, lora: Path) -> None:
    loras.push("ink", lora)
    with pytest.raises(RegistryError, match=r"cannot pull ink@1, \d+ B, into .*: .*"):
        loras.pull("ink", lora)


def test_no_registry_yet(loras: Registry, folder: Path) -> None:
    for ask in (loras.names, lambda: loras.versions("ink"), lambda: loras.resolve("ink@1")):
        with pytest.raises(RegistryError, match=f"there is no registry at {folder}"):
            ask()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("pushed", "asked", "remedy"),
    [
        (["emoji-ink", "oil"], "emoji-inc", r"did you mean emoji-ink\?"),
        (["oil"], "emoji-ink", "see 'lora-registry list'"),
    ],
)
def test_unknown_name(
    loras: Registry, lora: Path, pushed: list[str], asked: str, remedy: str
) -> None:
    for name in pushed:
        loras.push(name, lora)
    with pytest.raises(RegistryError, match=f"has no '{asked}'; {remedy}"):
        loras.resolve(asked)


def test_unknown_version(loras: Registry, lora: Path) -> None:
    loras.push("ink", lora)
    loras.push("ink", lora)
    with pytest.raises(RegistryError, match=r"ink has no version 3; .* has 1, 2"):
        loras.resolve("ink@3")


@pytest.mark.parametrize("version", ["", "0", "-1", "01", "v1", "1.0", "Prod", "1@2", "\uff19"])
def test_malformed_version(loras: Registry, version: str) -> None:
    with pytest.raises(RegistryError, match="is not a version: write a whole number from 1"):
        loras.resolve(f"ink@{version}")


def test_malformed_name(loras: Registry) -> None:
    with pytest.raises(RegistryError, match="is not a model name"):
        loras.resolve("../../etc/passwd@1")
