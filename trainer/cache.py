"""Latents and text embeddings on disk, a file each, kept between runs; needs no MindSpore.

A file's name is the digest of everything that its content follows from, so nothing stale is ever
read, what has not changed is found again, and filling that was cut off goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion.images import DataError
from trainer.dataset import Example
from weights.files import atomic_path

_FORMAT = 1


@dataclass(frozen=True)
class Cache:
    """A folder of latents and text embeddings of one base.

    A file of latents is (1 or 2, channels, h, w) float32: the latents' mean and log-variance, not
    scaled, and with `masks` the weight of each cell; with `flip` then those of the mirrored image.
    A file of text is (77, width) float32, the hidden states of one caption.
    """

    folder: Path
    vae_key: str
    """Digest of the VAE's weights and structure."""
    text_key: str
    flip: bool
    masks: str | None

    def latents_path(self, example: Example) -> Path:
        """Where the latents of an image are, or belong."""
        parts = [self.vae_key, example.sha256, list(example.shape), self.flip]
        if self.masks:
            parts += [self.masks, example.mask_sha256]
        return self._path("latents", parts)

    def text_path(self, caption: str) -> Path:
        """Where the hidden states of a caption are, or belong."""
        return self._path("text", [self.text_key, caption])

    def missing_latents(self, examples: Sequence[Example]) -> list[int]:
        """The examples whose latents are not there, of images with the same content the first."""
        return _missing([self.latents_path(example) for example in examples])

    def missing_text(self, captions: Sequence[str]) -> list[int]:
        """The captions whose hidden states are not there."""
        return _missing([self.text_path(caption) for caption in captions])

    def _path(self, kind: str, parts: list[object]) -> Path:
        digest = hashlib.sha256(json.dumps([_FORMAT, kind, *parts]).encode()).hexdigest()
        return self.folder / kind / digest[:2] / f"{digest}.npy"


def _missing(paths: list[Path]) -> list[int]:
    first = {path: i for i, path in reversed(list(enumerate(paths)))}
    return sorted(i for path, i in first.items() if not path.is_file())


def write(path: Path, array: np.ndarray) -> None:
    """Store an array, whole or not at all; WeightsError if the folder cannot be written."""
    with atomic_path(path) as part, open(part, "wb") as file:
        np.save(file, array.astype(np.float32), allow_pickle=False)


def read(path: Path) -> np.ndarray:
    """An array that was stored; DataError if it is not there or damaged."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: expected an entry of the cache, found a file that does not read ({error}); "
            "remove it and start again, it will be made anew"
        ) from error
