"""State dicts that `torch.save` wrote, read without PyTorch and without running anything.

The pickle in them is interpreted by `weights.torch_pickle`; tensors are then cut from the bytes
around it, after every size and offset has been checked.

Two layouts exist (`torch/serialization.py`). The legacy one is a chain: magic number, protocol,
facts about the machine, the state dict, the list of storages, each a pickle; then each storage as
its number of elements (int64) and its bytes. The newer one is a zip archive with `data.pkl` and an
uncompressed member `data/KEY` for each storage.
"""

from __future__ import annotations

import mmap
import os
import struct
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from weights.files import WeightsError
from weights.torch_pickle import Pickle, Refused, Tensor

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All tensors of a state dict by name, in the file's dtypes; bfloat16 is widened to float32.

    Raises WeightsError if the file is missing, damaged, truncated, or holds anything but tensors
    by name: then nothing of it has run.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such weight file; check the path")
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # not allowed; empty
        raise WeightsError(f"{path}: cannot be read ({error}); check it") from error
    try:
        read = _read_zip if data[:4] == b"PK\x03\x04" else _read_legacy
        tensors, offsets = read(data)
        _check_total(tensors, len(data))
        return {name: _cut(data, name, tensor, offsets) for name, tensor in tensors.items()}
    except (Refused, zipfile.BadZipFile, NotImplementedError) as error:  # no such zip version
        raise WeightsError(
            f"{path}: expected a state dict of torch.save, tensors by name and nothing else, found "
            f"{error}; get the file again, or save its tensors as safetensors where PyTorch is"
        ) from error


# ---- the two layouts: tensors by name, and where in the file each storage begins


def _read_legacy(data: mmap.mmap) -> tuple[dict[str, Tensor], dict[str, int]]:
    stream = cast("IO[bytes]", data)
    if Pickle(stream).value() != MAGIC:
        raise Refused("a pickle that does not begin with PyTorch's magic number")
    if Pickle(stream).value() != PROTOCOL:
        raise Refused(f"another version of the format than {PROTOCOL}")
    machine = Pickle(stream).value()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Refused("numbers in big-endian order")
    pickle = Pickle(stream)
    tensors = _state_dict(pickle.value())
    keys = Pickle(stream).value()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Refused("no list of its storages")
    offsets: dict[str, int] = {}
    position = data.tell()
    for key in keys:
        storage = pickle.storages.get(key)
        if storage is None or key in offsets:
            raise Refused(f"a list of storages in which {key[:40]!r} is strange")
        head = data[position : position + 8]
        length = storage.numel * storage.itemsize
        if len(head) < 8 or position + 8 + length > len(data):
            raise Refused(f"a file that ends within the storage {key[:40]!r}")
        if int.from_bytes(head, "little", signed=True) != storage.numel:
            raise Refused(f"a storage {key[:40]!r} that has not the length of its tensors")
        offsets[key] = position + 8
        position += 8 + length
    return tensors, offsets


def _read_zip(data: mmap.mmap) -> tuple[dict[str, Tensor], dict[str, int]]:
    try:
        listed = zipfile.ZipFile(cast("IO[bytes]", data)).infolist()
    except (ValueError, OverflowError, struct.error) as error:
        raise Refused(f"a damaged archive ({error})") from error
    members = {info.filename: info for info in listed}
    if len(members) < len(listed):
        raise Refused("an archive with two members of one name")
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Refused(f"an archive with {len(roots)} files data.pkl")
    root = roots[0]
    if (order := members.get(f"{root}byteorder")) is not None:
        start, end = _extent(data, order)
        if data[start:end] != b"little":
            raise Refused("numbers in big-endian order")
    start, end = _extent(data, members[f"{root}data.pkl"])
    pickle = Pickle(BytesIO(data[start:end]))
    tensors = _state_dict(pickle.value())
    offsets = {}
    for key, storage in pickle.storages.items():
        member = members.get(f"{root}data/{key}")
        if member is None:
            raise Refused(f"no data of the storage {key[:40]!r}")
        start, end = _extent(data, member)
        if end - start != storage.numel * storage.itemsize:
            raise Refused(f"a storage {key[:40]!r} that has not the length of its tensors")
        offsets[key] = start
    return tensors, offsets


def _extent(data: mmap.mmap, member: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the bytes of an uncompressed member are; its local header tells how long that is."""
    head = data[member.header_offset : member.header_offset + 30]
    if member.header_offset < 0 or len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise Refused(f"an archive whose member {member.filename[:80]} is not where it should be")
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise Refused(f"an archive whose member {member.filename[:80]} is compressed or encrypted")
    name, extra = struct.unpack("<HH", head[26:])
    start = member.header_offset + 30 + name + extra
    if start + member.file_size > len(data):
        raise Refused(f"a file that ends within {member.filename[:80]}")
    return start, start + member.file_size


# ---- the tensors


def _state_dict(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, dict):
        raise Refused(f"a {_kind(value)}")
    for name, tensor in value.items():
        if not isinstance(tensor, Tensor):
            raise Refused(f"a {_kind(tensor)} under the name {name[:80]!r}")
    return value


def _kind(value: Any) -> str:
    return type(value).__name__.lstrip("_").lower()


def _check_total(tensors: Mapping[str, Tensor], length: int) -> None:
    """Tensors may share their elements; that must not make a huge thing of a small file."""
    total = sum(tensor.numel * tensor.storage.itemsize for tensor in tensors.values())
    if total > 4 * length:
        raise Refused(f"{total} bytes of tensors in a file of {length}")


def _cut(data: mmap.mmap, name: str, tensor: Tensor, offsets: Mapping[str, int]) -> np.ndarray:
    """A copy of the tensor, contiguous."""
    storage = tensor.storage
    if storage.key not in offsets:
        raise Refused(f"no data of {name[:80]!r}")
    dtype = np.dtype("<u2" if storage.dtype == "bfloat16" else storage.dtype).newbyteorder("<")
    if not tensor.numel:
        return np.zeros(tensor.shape, "float32" if storage.dtype == "bfloat16" else storage.dtype)
    view: np.ndarray = np.ndarray(
        tensor.shape,
        dtype,
        data,
        offsets[storage.key] + tensor.offset * dtype.itemsize,
        tuple(stride * dtype.itemsize for stride in tensor.strides),
    )
    if storage.dtype == "bfloat16":
        return (view.astype(np.uint32) << 16).view(np.float32)
    return np.array(view, storage.dtype, order="C")
