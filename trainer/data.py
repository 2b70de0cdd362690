"""From the examples that samples show to latents and text: from the caches, or computed anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops

from diffusion.images import read_image, read_mask
from diffusion.layers import Network
from diffusion.models import in_batches, release
from diffusion.tokenizer import Tokenizer
from trainer import cache as store
from trainer.batches import Draws
from trainer.cache import Cache
from trainer.dataset import Example
from trainer.distributed import Group

ENCODE_BATCH = 8
"""Images and captions in a pass, at most."""
_PASS_PIXELS = 2**17
"""Of all images in a pass together, if more than one: the memory of a pass stays the process's, and
at Stable Diffusion's width eight images of 256 × 256 would take more than a training step."""
Report = Callable[[int, int], None]
"""Called with how much is done and how much there is to do."""


class Encode(Network):
    """Images → mean and log-variance of the latents, stacked; not scaled."""

    def __init__(self, vae: nn.Cell):
        super().__init__(auto_prefix=False)
        self.vae = vae
        self.set_train(False)

    def construct(self, images: Tensor) -> Tensor:
        return ops.concat(self.vae.encode(images), 1)


def fill_latents(
    group: Group,
    cache: Cache,
    examples: Sequence[Example],
    vae: Callable[[], nn.Cell],
    factor: int,
    report: Report,
) -> None:
    """Compute the latents that the cache lacks, each process its share; returns when all are done.

    `vae` is called, to load it, only where something is missing; `factor` is pixels per cell.
    """
    missing = group.agreed(cache.missing_latents(examples), len(examples))
    mine = [examples[row] for row in missing[group.rank_id :: group.world_size]]
    mine.sort(key=lambda example: example.shape)
    encode = Encode(vae()) if mine else None
    done = 0
    while done < len(mine):
        shape = mine[done].shape
        size = max(1, min(ENCODE_BATCH, _PASS_PIXELS // math.prod(shape)))
        part = [example for example in mine[done : done + size] if example.shape == shape]
        faces = [
            in_batches(encode, np.stack([_pixels(e, flip) for e in part]), size)
            for flip in _faces(cache)
        ]
        for row, example in enumerate(part):
            planes = [moments[row] for moments in faces]
            if cache.masks:
                masks = [_mask(example, cache.masks, factor, flip) for flip in _faces(cache)]
                planes = [np.concatenate((p, m[None])) for p, m in zip(planes, masks, strict=True)]
            store.write(cache.latents_path(example), np.stack(planes))
        done += len(part)
        report(min(done * group.world_size, len(missing)), len(missing))
    if encode is not None:
        release(encode)
    group.wait()


def fill_text(
    group: Group,
    cache: Cache,
    captions: Sequence[str],
    tokenizer: Tokenizer,
    text_encoder: Callable[[], nn.Cell],
    report: Report,
) -> None:
    """The same for the hidden states of captions."""
    missing = group.agreed(cache.missing_text(captions), len(captions))
    mine = [captions[row] for row in missing[group.rank_id :: group.world_size]]
    encoder = text_encoder() if mine else None
    for start in range(0, len(mine), ENCODE_BATCH):
        part = mine[start : start + ENCODE_BATCH]
        states = in_batches(encoder, tokenizer(part), ENCODE_BATCH)
        for caption, state in zip(part, states, strict=True):
            store.write(cache.text_path(caption), state)
        report(min((start + len(part)) * group.world_size, len(missing)), len(missing))
    if encoder is not None:
        release(encoder)
    group.wait()


class CachedLatents:
    """Latents from the cache."""

    def __init__(self, cache: Cache):
        self.cache = cache

    def read(self, draws: Draws) -> tuple[np.ndarray, np.ndarray | None]:
        """What can be read ahead: here (batch, 2 · channels, h, w), and the weights of cells."""
        pairs = zip(draws.examples, draws.flips, strict=True)
        planes = np.stack([store.read(self.cache.latents_path(e))[int(flip)] for e, flip in pairs])
        return (planes[:, :-1], planes[:, -1]) if self.cache.masks else (planes, None)

    def moments(self, read: np.ndarray) -> np.ndarray:
        """Mean and log-variance of the latents, stacked."""
        return read


class EncodedLatents:
    """Latents computed for each sample, as a random crop needs it; the VAE stays in memory."""

    def __init__(self, vae: nn.Cell, masks: str | None, factor: int):
        self.encode = Encode(vae)
        self.masks = masks
        self.factor = factor

    def read(self, draws: Draws) -> tuple[np.ndarray, np.ndarray | None]:
        """What can be read ahead: here the pixels (batch, 3, height, width), and the weights."""
        seen = list(zip(draws.examples, draws.flips, draws.positions, strict=True))
        pixels = np.stack([_pixels(e, flip, position) for e, flip, position in seen])
        if not self.masks:
            return pixels, None
        masks = [_mask(e, self.masks, self.factor, flip, position) for e, flip, position in seen]
        return pixels, np.stack(masks)

    def moments(self, read: np.ndarray) -> np.ndarray:
        """Mean and log-variance of the latents, stacked."""
        return self.encode(Tensor(read)).asnumpy()


Latents = CachedLatents | EncodedLatents
Text = Callable[[Sequence[str]], np.ndarray]
"""Captions → what the step takes as text: hidden states, or token ids."""


def cached_text(cache: Cache) -> Text:
    """Hidden states (batch, 77, width) from the cache."""
    return lambda captions: np.stack([store.read(cache.text_path(text)) for text in captions])


_MIDDLE = (0.5, 0.5)


def _faces(cache: Cache) -> tuple[bool, ...]:
    """As it is, and mirrored if that is asked for."""
    return (False, True) if cache.flip else (False,)


def _pixels(example: Example, flip: bool, position: tuple[float, float] = _MIDDLE) -> np.ndarray:
    return read_image(Path(example.path), example.shape, position, flip)


def _mask(
    example: Example,
    kind: str,
    factor: int,
    flip: bool,
    position: tuple[float, float] = _MIDDLE,
) -> np.ndarray:
    mask = Path(example.mask) if example.mask else None
    return read_mask(Path(example.path), mask, kind, example.shape, factor, position, flip)
