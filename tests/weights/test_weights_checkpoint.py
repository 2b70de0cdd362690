"""MindSpore's `.ckpt`, both ways with MindSpore itself and byte by byte."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.weights import made
from weights import checkpoint, files
from weights.base import open_base
from weights.convert import write_base
from weights.files import WeightsError, open_tensors

RNG = np.random.default_rng(0)
TENSORS = {
    "a.weight": RNG.standard_normal((3, 5)).astype(np.float32),
    "a.half": RNG.standard_normal((2, 3, 1, 1)).astype(np.float16),
    "a.double": RNG.standard_normal(7),
    "count": np.arange(300, dtype=np.int64),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == array.dtype
        and found[name].shape == array.shape
        and np.array_equal(found[name], array)
        for name, array in wanted.items()
    )


@pytest.mark.parametrize("crc", [False, True], ids=["plain", "crc"])
def test_a_file_of_mindspore_is_read(crc: bool, tmp_path: Path) -> None:
    import mindspore as ms

    path = tmp_path / "theirs.ckpt"
    parameters = [{"name": name, "data": ms.Tensor(array)} for name, array in TENSORS.items()
                  if array.size]  # fmt: skip
    appended = {"lora_rank": 4, "epoch_num": 3, "rate": 0.5, "kept": True, "note": "a text"}
    ms.save_checkpoint(parameters, str(path), append_dict=appended, crc_check=crc)
    file = open_tensors(path)
    assert file.container == "MindSpore .ckpt"
    assert file.entries.keys() == {*TENSORS, *appended} - {"empty"}
    for name, array in TENSORS.items():
        if array.size:
            assert same({name: file.read(name)}, {name: array})
    assert {name: file.read(name).item() for name in ("lora_rank", "epoch_num", "rate")} == {
        "lora_rank": 4,
        "epoch_num": 3,
        "rate": 0.5,
    }
    with pytest.raises(WeightsError, match="note is of dtype str, expected one of float16"):
        file.read("note")


def test_a_file_of_ours_is_read_by_mindspore(tmp_path: Path) -> None:
    import mindspore as ms

    base = open_base(made.write_folder(tmp_path / "base", made.weights("emoji")))
    write_base(tmp_path / "base.ckpt", base, "mindone", {})
    found = ms.load_checkpoint(str(tmp_path / "base.ckpt"))
    assert same({name: p.asnumpy() for name, p in found.items()}, made.mindone("emoji"))


def test_a_file_of_ours_is_the_published_bytes(tmp_path: Path) -> None:
    wanted = {name: array for name, array in TENSORS.items() if name != "empty"}
    checkpoint.write(tmp_path / "a.ckpt", wanted)
    assert (tmp_path / "a.ckpt").read_bytes() == made.ckpt_bytes(wanted)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("crc", [False, True], ids=["plain", "crc"])
def test_split_tensors_are_put_together(parts: int, crc: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(made.ckpt_bytes(TENSORS, parts, crc, after=made.APPENDED))
    file = open_tensors(path)
    assert same({name: file.read(name) for name in TENSORS}, TENSORS)
    assert len(file.entries["count"].pieces) == parts


def test_ours_is_read_back(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "a.ckpt", TENSORS)
    assert same(files.load(tmp_path / "a.ckpt"), TENSORS)


def test_packed_dims_are_read_as_well(tmp_path: Path) -> None:
    """Protobuf readers accept both forms of a repeated number."""
    array = np.arange(6, dtype=np.float32)
    tensor = made.field(1, made.number(2) + made.number(3))
    tensor += made.field(2, b"Float32") + made.field(3, array.tobytes())
    path = tmp_path / "a.ckpt"
    path.write_bytes(made.field(1, made.field(1, b"a") + made.field(2, tensor)))
    assert np.array_equal(files.load(path)["a"], array.reshape(2, 3))


FLOAT = np.arange(6, dtype=np.float32).tobytes()
DAMAGED = {
    "too few bytes": made.value("a", "Float32", (2, 4), FLOAT),
    "too many bytes": made.value("a", "Float32", (5,), FLOAT),
    "parts that differ in shape": made.value("a", "Float32", (2, 3), FLOAT[:12])
    + made.value("a", "Float32", (3, 2), FLOAT[12:]),
    "parts that differ in dtype": made.value("a", "Float32", (2, 3), FLOAT[:12])
    + made.value("a", "Float16", (2, 3), FLOAT[12:]),
    "a part that ends within an element": made.value("a", "Float32", (2, 3), FLOAT[:13])
    + made.value("a", "Float32", (2, 3), FLOAT[13:]),
    "a negative size": made.value("a", "Float32", (2**64 - 2, 3), FLOAT),
    "a name that is not text": made.field(1, made.field(1, b"\xff\xfe") + made.field(2, b"")),
    "a value without a name": made.field(1, made.field(2, made.field(2, b"Float32"))),
    "another field": made.field(2, b"something") * 3,
    "an encrypted file": b"\n" + RNG.bytes(200),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(made.value("first", "Float32", (6,), FLOAT) + DAMAGED[damage])
    with pytest.raises(WeightsError, match=r"expected a complete MindSpore \.ckpt") as raised:
        open_tensors(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert str(raised.value).endswith("; copy or download it again")


def test_every_truncation_within_a_value_is_noticed(tmp_path: Path) -> None:
    whole = made.ckpt_bytes({"a": TENSORS["a.weight"], "b": TENSORS["a.half"]})
    first = len(made.ckpt_bytes({"a": TENSORS["a.weight"]}))
    path = tmp_path / "a.ckpt"
    for size in {*range(1, len(whole))} - {first}:
        path.write_bytes(whole[:size])
        with pytest.raises(WeightsError):
            open_tensors(path)


def test_the_crc_notices_a_single_bit(tmp_path: Path) -> None:
    content = bytearray(made.ckpt_bytes(TENSORS, crc=True))
    assert zlib.crc32(content[:-17]) == int.from_bytes(content[-10:], "big")
    content[len(content) // 2] ^= 1
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="its CRC does not agree with its content"):
        open_tensors(path)
