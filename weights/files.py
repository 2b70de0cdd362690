"""Weight files: opened by content, indexed without reading a tensor, written whole or not at all.

Two containers are read, safetensors and MindSpore's `.ckpt`; pickles never are.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


class WeightsError(ValueError):
    """A weight file that is missing, damaged or does not fit; the message is one sentence.

    Names in a file may be anything: what would disturb a terminal is escaped, and the middle of
    what is too long is left out.
    """

    def __init__(self, message: str) -> None:
        if len(message) > 4000:
            message = f"{message[:2000]} … {message[-1000:]}"
        printable = (c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__("".join(printable))


FLOATS = ("float16", "bfloat16", "float32", "float64")
"""The dtypes that weights may have."""

_SAFETENSORS_DTYPES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "BOOL": "bool",
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint"))
       for bits in (8, 16, 32, 64)},
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file: a numpy dtype name (or bfloat16), the shape, byte ranges."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]
    """(offset, length) of each part, in order."""

    @property
    def nbytes(self) -> int:
        return sum(length for _, length in self.pieces)


def itemsize(dtype: str) -> int | None:
    """Bytes of one element; None for a dtype that numpy and this project do not know."""
    if dtype == "bfloat16":
        return 2
    return np.dtype(dtype).itemsize if dtype in _SAFETENSORS_DTYPES.values() else None


@dataclass(frozen=True)
class TensorFile:
    """A weight file whose index is in memory and whose tensors are on disk."""

    path: Path
    container: str
    """"safetensors" or "MindSpore .ckpt"."""
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def read(self, name: str) -> np.ndarray:
        """One tensor in the file's dtype, bfloat16 widened to float32.

        The file is not mapped: that would count as memory of the process, whole, and be slower.
        Raises WeightsError for a dtype that is not a number's, or if the file has become shorter.
        """
        entry = self.entries[name]
        size = itemsize(entry.dtype)
        if size is None:
            raise WeightsError(
                f"{self.path}: {name} is of dtype {entry.dtype}, expected one of "
                f"{', '.join(FLOATS)}; convert the file to float16 first"
            )
        dtype = np.dtype(np.uint16 if entry.dtype == "bfloat16" else entry.dtype)
        if not _possible(entry.shape):
            raise WeightsError(
                f"{self.path}: expected {name} to be a tensor, found the shape {entry.shape}; copy "
                "or download the file again"
            )
        if not entry.nbytes:
            return np.zeros(entry.shape, np.float32 if entry.dtype == "bfloat16" else dtype)
        parts = [
            np.fromfile(self.path, dtype, length // size, offset=offset)
            for offset, length in entry.pieces
        ]
        flat = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if flat.nbytes != entry.nbytes:
            raise WeightsError(f"{self.path}: the file has become shorter; copy it again")
        if entry.dtype == "bfloat16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(entry.shape)


def _possible(shape: tuple[int, ...]) -> bool:
    """Can numpy have an array of this shape? A size of 0 beside a huge one is no less huge."""
    return len(shape) <= 32 and math.prod(size or 1 for size in shape) < 1 << 59


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Index a weight file; what it is follows from its first bytes, not from its name.

    Raises WeightsError if it is missing, damaged, a pickle, or neither safetensors nor a
    MindSpore `.ckpt`.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise WeightsError(f"{path}: this is a folder, expected a weight file; name a file in it")
    if not os.path.isfile(path):
        raise WeightsError(f"{path}: there is no such weight file; check the path")
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); check it") from error
    if head[8:9] == b"{":
        return _open_safetensors(path)
    if head.startswith((b"PK\x03\x04", b"\x80")) or path.suffix in (".bin", ".pt", ".pth"):
        raise WeightsError(_pickle_refusal(path))
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if head.startswith(b"\n"):
        from weights.checkpoint import index

        return TensorFile(path, "MindSpore .ckpt", index(path), {})
    raise WeightsError(
        f"{path}: expected a safetensors file or a MindSpore .ckpt, found neither "
        f"(it begins with {head[:8]!r}); check that it is a weight file and complete"
    )


def _pickle_refusal(path: Path) -> str:
    return (
        f"{path}: this is a PyTorch pickle, which can run any code when it is opened, so it is "
        "never read; convert it on a machine that has PyTorch and safetensors: python -c "
        f"\"import torch, safetensors.torch as s; w = torch.load('{path.name}', "
        "map_location='cpu', weights_only=True); w = w.get('state_dict', w); s.save_file({k: "
        "v.contiguous().clone() for k, v in w.items() if isinstance(v, torch.Tensor)}, "
        f"'{path.stem}.safetensors')\""
    )


def _open_safetensors(path: Path) -> TensorFile:
    try:
        with safe_open(path, framework="numpy") as file:  # checks every offset and the length
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: expected a complete safetensors file, found a damaged or truncated one "
            f"({error}); copy or download it again"
        ) from error
    with open(path, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    header.pop("__metadata__", None)
    entries = {}
    for name, found in header.items():
        begin, end = found["data_offsets"]
        dtype = _SAFETENSORS_DTYPES.get(found["dtype"], found["dtype"])
        entries[name] = Entry(dtype, tuple(found["shape"]), ((8 + length + begin, end - begin),))
    return TensorFile(path, "safetensors", entries, metadata)


def sha256(path: str | os.PathLike[str]) -> str:
    """Digest of a file's bytes, in lower-case hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in the same folder that takes the place of `path` if the block succeeds.

    The file is fsynced before it is renamed, so `path` holds either its old bytes or all the
    new ones; a block that raises leaves nothing behind. A full disk, or a path where no file can
    be, raises WeightsError.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise WeightsError(f"{path}: this is a folder, expected the name of a file; change it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise cannot_write(path, error) from error
    os.close(handle)
    part = Path(name)
    try:
        yield part
        settle(part)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        raise cannot_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def settle(path: Path) -> None:
    """See to it that a file is on the disk, and that everybody may read it."""
    if path.is_file():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        path.chmod(0o644)


def cannot_write(path: Path, error: Exception) -> WeightsError:
    """What to raise if the disk did not take a file."""
    if _is_full(error):
        return WeightsError(
            f"{path}: the disk is full (or a quota is), nothing was written; free some space or "
            "write to another disk"
        )
    return WeightsError(f"{path}: cannot be written ({error}); choose another place")


def _is_full(error: Exception) -> bool:
    """Also for an error that the safetensors library passes on as text."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in full
    return any(f"os error {number})" in str(error) for number in full)


def check_space(path: str | os.PathLike[str], needed: int) -> None:
    """Raise WeightsError if the disk of `path` has less than `needed` bytes free."""
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WeightsError(
            f"{path}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free on that "
            "disk; free some space or write to another disk"
        )


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The header metadata of a weight file; no tensor is read.

    Raises WeightsError as `open_tensors` does.
    """
    return dict(open_tensors(path).metadata)


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All tensors of a weight file by name; bfloat16 is widened to float32.

    Raises WeightsError as `open_tensors` does.
    """
    file = open_tensors(path)
    return {name: file.read(name).copy() for name in file.entries}


def dump(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file atomically; the header keeps `metadata`.

    Raises WeightsError if the disk is full.
    """
    with atomic_path(path) as part:
        save(part, tensors, metadata, path)


def save(
    part: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None,
    final: str | os.PathLike[str],
) -> None:
    """Write a safetensors file as a part of what will be `final`.

    Raises WeightsError if there is no room, OSError or SafetensorError if that shows later.
    """
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    check_space(final, sum(array.nbytes for array in arrays.values()))
    save_file(arrays, part, metadata=dict(metadata or {}))
    _sort_metadata(part)


def _sort_metadata(path: Path) -> None:
    """Put the header's metadata in order: the library shuffles it, and one content is one file."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a weight file; no tensor is read.

    Raises WeightsError as `open_tensors` does.
    """
    return {name: entry.shape for name, entry in open_tensors(path).entries.items()}


def count_not_finite(tensor: np.ndarray) -> int:
    """How many elements are NaN or infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        # One pass over memory: the sum is finite unless an element is not, or it overflows.
        if np.isfinite(tensor.sum(dtype=np.float32 if tensor.itemsize < 8 else np.float64)):
            return 0
    return math.prod(tensor.shape) - int(np.isfinite(tensor).sum())


def cast(array: np.ndarray, dtype: type, name: str) -> np.ndarray:
    """The array in another float dtype; WeightsError if a value is too large for it."""
    with np.errstate(over="ignore"):
        found: np.ndarray = array.astype(dtype, copy=False)
    lost = count_not_finite(found) if found.itemsize < array.itemsize else 0
    if lost and lost > count_not_finite(array):
        raise WeightsError(
            f"{name} has values that {found.dtype} cannot hold (up to "
            f"{np.finfo(found.dtype).max:g}); write float32 instead (--dtype float32)"
        )
    return found
