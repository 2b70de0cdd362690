"""A file in chunks, each with its digest, so that a transfer that was cut off goes on and a damaged
part alone is fetched again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 8 << 20
"""Also the size of a part of a multipart upload; S3 wants 5 MiB at least, and 10,000 at most."""


@dataclass(frozen=True)
class Chunk:
    """Bytes `start` to `start + size` of a file."""

    number: int
    start: int
    size: int


def chunks_of(size: int) -> Iterator[Chunk]:
    """The chunks of a file of `size` bytes; the last may be shorter."""
    for number, start in enumerate(range(0, size, CHUNK_BYTES)):
        yield Chunk(number, start, min(CHUNK_BYTES, size - start))


def digests(path: Path) -> tuple[str, tuple[str, ...]]:
    """SHA-256 in hex of a file and of each of its chunks. Raises OSError."""
    whole = hashlib.sha256()
    parts: list[str] = []
    with path.open("rb") as file, ThreadPoolExecutor(2) as pool:
        while data := file.read(CHUNK_BYTES):
            if len(data) < CHUNK_BYTES and not parts:
                whole.update(data)
                return whole.hexdigest(), (whole.hexdigest(),)
            part = pool.submit(hashlib.sha256, data)  # beside the whole: both let go of the GIL
            whole.update(data)
            parts.append(part.result().hexdigest())
    return whole.hexdigest(), tuple(parts)


def missing(path: Path, size: int, sha256s: Sequence[str]) -> list[Chunk]:
    """The chunks that a file, perhaps of a download that was cut off, does not have."""
    wanted = list(chunks_of(size))
    if not path.exists():
        return wanted
    found = []
    with path.open("rb") as file:
        for chunk, sha256 in zip(wanted, sha256s, strict=True):
            file.seek(chunk.start)
            if hashlib.sha256(file.read(chunk.size)).hexdigest() != sha256:
                found.append(chunk)
    return found


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()
