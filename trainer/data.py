"""Latents and text of the whole data set, computed once and held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, nn, ops

from diffusion.models import in_batches
from diffusion.tokenizer import Tokenizer
from trainer.distributed import Group
from trainer.images import Example, read_images

ENCODE_BATCH = 8


@dataclass(frozen=True)
class EncodedData:
    """What the training step needs of the images and captions.

    mean, std: (examples, 4, h, w) of the scaled latents' distribution; text: (captions, 77) token
    ids or (captions, 77, width) hidden states, the empty caption last; caption: (examples,) row of
    `text` of each example.
    """

    mean: np.ndarray
    std: np.ndarray
    text: np.ndarray
    caption: np.ndarray

    @property
    def examples(self) -> int:
        """Number of images."""
        return len(self.mean)


class Encode(nn.Cell):
    """Images → mean and standard deviation of the latents, stacked."""

    def __init__(self, vae: nn.Cell):
        super().__init__(auto_prefix=False)
        self.vae = vae

    def construct(self, images: Tensor) -> Tensor:
        mean, logvar = self.vae.encode(images)
        return ops.concat((mean, ops.exp(0.5 * logvar)), 1)


def encode(
    group: Group,
    examples: Sequence[Example],
    resolution: int,
    vae: nn.Cell,
    scaling_factor: float,
    tokenizer: Tokenizer,
    text_encoder: nn.Cell | None,
) -> EncodedData:
    """Encode images and captions, each process its share, and gather the whole on all.

    With `text_encoder` None the captions stay token ids.
    """
    cell = Encode(vae)
    cell.set_train(False)
    mine = group.share(len(examples))
    images = read_images([examples[i] for i in mine], resolution)
    moments = group.gather(in_batches(cell, images, ENCODE_BATCH), len(examples)) * scaling_factor
    mean, std = np.split(moments, 2, axis=1)
    captions = sorted({example.caption for example in examples})
    row = {caption: number for number, caption in enumerate(captions)}
    text = tokenizer([*captions, ""])
    if text_encoder is not None:
        text_encoder.set_train(False)
        mine = text[group.share(len(text))]
        text = group.gather(in_batches(text_encoder, mine, ENCODE_BATCH), len(text))
    caption = np.array([row[example.caption] for example in examples])
    return EncodedData(mean, std, text, caption)
