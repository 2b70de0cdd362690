"""MindSpore's `.ckpt`: a chain of protobuf messages, read and written without MindSpore.

The schema (`mindspore/ccsrc/utils/checkpoint.proto`):

    Checkpoint  { repeated Value value = 1; }
    Value       { string tag = 1; TensorProto tensor = 2; }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3; }

A tensor above 512 MiB is split into Values of the same tag, each with the full dims. The file may
end in `crc_num` and ten bytes of CRC-32.
"""

from __future__ import annotations

import math
import mmap
import os
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from weights.files import Entry, WeightsError, atomic_path, check_space, itemsize

SPLIT = 512 << 20
"""Bytes from which on MindSpore splits a tensor."""

_CRC = b"crc_num"
_DTYPES = {
    "Float16": "float16",
    "BFloat16": "bfloat16",
    "Float32": "float32",
    "Float64": "float64",
    "Bool": "bool",
    **{f"{kind}{bits}": f"{kind.lower()}{bits}" for kind in ("Int", "UInt")
       for bits in (8, 16, 32, 64)},
}  # fmt: skip


class _Damaged(ValueError):
    """What is wrong with the bytes."""


def index(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """Where each tensor lies; only the few bytes around the tensors are read.

    Raises WeightsError if the file is truncated, altered (by its CRC, if it has one), encrypted
    or not a checkpoint.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _index(data)
    except (_Damaged, OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: expected a complete MindSpore .ckpt, found a damaged, truncated or "
            f"encrypted one ({error}); copy or download it again"
        ) from error


def _index(data: mmap.mmap) -> dict[str, Entry]:
    end = len(data)
    if data[end - 17 : end - 10] == _CRC:
        end -= 17
        if zlib.crc32(memoryview(data)[:end]) != int.from_bytes(data[end + 7 : end + 17], "big"):
            raise _Damaged("its CRC does not agree with its content")
    found: dict[str, tuple[str, tuple[int, ...], list[tuple[int, int]]]] = {}
    for field, start, stop in _fields(data, 0, end):
        if field != 1 or start == stop:
            raise _Damaged("a value is expected and is not there")
        tag, dtype, dims, piece = _value(data, start, stop)
        known = found.setdefault(tag, (dtype, dims, []))
        if known[:2] != (dtype, dims):
            raise _Damaged(f"the parts of {tag!r} differ in shape or dtype")
        known[2].append(piece)
    entries = {}
    for tag, (dtype, dims, pieces) in found.items():
        entry = Entry(dtype, dims, tuple(pieces))
        size = itemsize(dtype)
        if size is not None:
            if math.prod(dims) * size != entry.nbytes:
                raise _Damaged(f"{tag!r} of {dims} has {entry.nbytes} bytes of {dtype}")
            if any(length % size for _, length in pieces):
                raise _Damaged(f"a part of {tag!r} ends within an element")
        entries[tag] = entry
    return entries


def _value(
    data: mmap.mmap, start: int, stop: int
) -> tuple[str, str, tuple[int, ...], tuple[int, int]]:
    tag: str | None = None
    dtype = ""
    dims: list[int] = []
    piece = (0, 0)
    for field, begin, end in _fields(data, start, stop):
        if field == 1:
            tag = _text(data, begin, end)
        elif field == 2:
            for inner, first, last in _fields(data, begin, end):
                if inner == 1:
                    dims.extend(_integers(data, first, last))
                elif inner == 2:
                    dtype = _text(data, first, last)
                elif inner == 3:
                    piece = (first, last - first)
    if tag is None or not dtype:
        raise _Damaged("a value has no name or no dtype")
    if any(size < 0 for size in dims):
        raise _Damaged(f"{tag!r} has the shape {tuple(dims)}")
    return tag, _DTYPES.get(dtype, dtype), tuple(dims), piece


def _fields(data: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, stop) of each field of a message; of a varint, where it stands."""
    while position < end:
        key, position = _varint(data, position, end)
        field, wire = key >> 3, key & 7
        start = position
        if wire == 0:
            _, position = _varint(data, position, end)
        elif wire == 1:
            position += 8
        elif wire == 2:
            length, start = _varint(data, position, end)
            position = start + length
        elif wire == 5:
            position += 4
        else:
            raise _Damaged(f"no protobuf field at byte {start - 1}")
        if position > end:
            raise _Damaged(f"the field at byte {start} ends behind its message")
        yield field, start, position


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise _Damaged("it ends within a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _Damaged(f"the number before byte {position} is too long")


def _integers(data: mmap.mmap, start: int, stop: int) -> Iterator[int]:
    """int64 values, one or packed."""
    while start < stop:
        value, start = _varint(data, start, stop)
        yield value - (1 << 64) if value >= 1 << 63 else value


def _text(data: mmap.mmap, start: int, stop: int) -> str:
    if stop - start > 4096:
        raise _Damaged(f"the name at byte {start} has {stop - start} bytes")
    return data[start:stop].decode("utf-8")


def write(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Write a checkpoint atomically, as `mindspore.save_checkpoint` does.

    A mapping that makes its arrays when asked keeps one in memory at a time. Raises WeightsError
    if the disk is full.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    with atomic_path(path) as part, open(part, "wb") as file:
        for tag, given in tensors.items():
            array = np.asarray(given, order="C")
            check_space(path, array.nbytes)
            flat = array.reshape(-1)
            step = max(1, SPLIT // array.itemsize)
            for start in range(0, max(1, flat.size), step):
                content = flat[start : start + step]
                head = b"".join(b"\x08" + _number(size) for size in array.shape)
                head += _bytes(2, names[array.dtype.name].encode())
                head += b"\x1a" + _number(content.nbytes)
                value = _bytes(1, tag.encode()) + b"\x12" + _number(len(head) + content.nbytes)
                size = len(value) + len(head) + content.nbytes
                file.write(b"\x0a" + _number(size) + value + head)
                file.write(content.data)


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _bytes(field: int, content: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _number(len(content)) + content
