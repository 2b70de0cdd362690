"""Reading and writing safetensors files, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save


class WeightsError(ValueError):
    """A weight file that is missing, damaged or does not fit; the message is one sentence."""


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
    new ones; a block that raises leaves nothing behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such weight file; check the path")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise WeightsError(
            f"{path}: expected a complete safetensors file, found a damaged or truncated one "
            f"({error}); copy or download it again"
        ) from error


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The header metadata of a safetensors file; no tensor is read.

    Raises WeightsError if the file is missing, truncated or not safetensors.
    """
    with _opened(Path(path)) as file:
        return dict(file.metadata() or {})


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file by name, in the file's own dtypes.

    Raises WeightsError if the file is missing, truncated or not safetensors.
    """
    with _opened(Path(path)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def dump(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file atomically; the header keeps `metadata`."""
    payload = save(
        {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()},
        metadata=dict(metadata or {}),
    )
    with atomic_path(path) as part:
        part.write_bytes(payload)


def shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a safetensors file; no tensor is read.

    Raises WeightsError as `metadata` does.
    """
    with _opened(Path(path)) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
