"""CLIP (arXiv 2103.00020): pictures and captions as vectors that lie close where they agree.

The vision transformers that OpenAI published, with the quick GELU they were trained with. Weights
may have OpenAI's names or those of transformers; which model a file holds follows from the shapes
of its tensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from diffusion.attention import MultiHead
from diffusion.config import TextEncoderConfig
from diffusion.convolution import Conv2d
from diffusion.layers import LayerNorm, Linear
from diffusion.models import in_batches
from diffusion.text_encoder import CLIPTextModel, Encoder
from diffusion.tokenizer import EOS_TOKEN_ID, Tokenizer, clip_vocabulary
from sampler.networks import Tensors, load, read
from weights.files import WeightsError
from weights.names import from_openclip

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Its input is (x / 255 − mean) / deviation, for each of red, green and blue."""

BATCH = 8
TEXT_BATCH = 16

_HEAD = 64  # the width of an attention head, in every model


class Structure(NamedTuple):
    """What tells the models apart; all layers have MLPs of four times their width."""

    patch: int
    size: int
    """Pixels along a side of a picture."""
    width: int
    layers: int
    text_width: int
    text_layers: int
    dimensions: int
    """Of an embedding."""


MODELS = {
    Structure(32, 224, 768, 12, 512, 12, 512): "ViT-B/32",
    Structure(16, 224, 768, 12, 512, 12, 512): "ViT-B/16",
    Structure(14, 224, 1024, 24, 768, 12, 768): "ViT-L/14",
    Structure(14, 336, 1024, 24, 768, 12, 768): "ViT-L/14-336",
}


def _encoder(width: int, layers: int) -> TextEncoderConfig:
    """Both towers have layers of the same make."""
    return TextEncoderConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // _HEAD,
        hidden_act="quick_gelu",
        pad_token_id=0,
    )


class Positions(nn.Cell):
    def __init__(self, count: int, width: int):
        super().__init__()
        self.weight = Parameter(initializer("zeros", (count, width)))


class VisionEmbeddings(nn.Cell):
    def __init__(self, structure: Structure):
        super().__init__()
        width, patch = structure.width, structure.patch
        self.class_embedding = Parameter(initializer("zeros", (width,)))
        self.patch_embedding = Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = Positions((structure.size // patch) ** 2 + 1, width)

    def construct(self, pixels: Tensor) -> Tensor:
        batch, width = pixels.shape[0], self.class_embedding.shape[0]
        patches = self.patch_embedding(pixels).reshape(batch, width, -1).transpose(0, 2, 1)
        first = ops.tile(self.class_embedding.reshape(1, 1, width), (batch, 1, 1))
        return ops.concat((first, patches), 1) + self.position_embedding.weight


class VisionModel(nn.Cell):
    def __init__(self, structure: Structure):
        super().__init__()
        self.embeddings = VisionEmbeddings(structure)
        self.pre_layrnorm = LayerNorm(structure.width)  # transformers' spelling
        self.encoder = Encoder(_encoder(structure.width, structure.layers))
        for layer in self.encoder.layers:  # the text's layers hide later tokens, these do not
            layer.self_attn.attend = MultiHead(structure.width, structure.width // _HEAD)
        self.post_layernorm = LayerNorm(structure.width)

    def construct(self, pixels: Tensor) -> Tensor:
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.post_layernorm(hidden[:, 0])


class VisionTower(nn.Cell):
    """(n, 3, size, size) float32 → embeddings (n, dimensions), not normalised."""

    def __init__(self, structure: Structure):
        super().__init__()
        self.vision_model = VisionModel(structure)
        self.visual_projection = Linear(
            structure.width, structure.dimensions, bias=False, batched=False
        )

    def construct(self, pixels: Tensor) -> Tensor:
        return self.visual_projection(self.vision_model(pixels))


@dataclass(frozen=True)
class Clip:
    """Both towers with their weights."""

    name: str
    structure: Structure
    vision: nn.Cell
    text: nn.Cell
    text_projection: np.ndarray
    """(dimensions, width of the text tower)."""
    tokenizer: Tokenizer


def load_clip(path: str | os.PathLike[str]) -> Clip:
    """The model in a file: safetensors or a state dict, not OpenAI's TorchScript archive.

    Raises WeightsError if the file is missing, damaged or holds no model of `MODELS`.
    """
    tensors = from_openai(read(path))
    structure = _structure(tensors, f"{path}")
    if structure not in MODELS:
        raise WeightsError(
            f"{path}: expected one of CLIP's {', '.join(MODELS.values())}, found a model with "
            f"{', '.join(f'{k} {v}' for k, v in structure._asdict().items())}; use one of those"
        )
    _check_activation(Path(path))
    text = _encoder(structure.text_width, structure.text_layers)
    return Clip(
        name=MODELS[structure],
        structure=structure,
        vision=load(lambda: VisionTower(structure), tensors, f"{path}"),
        text=load(lambda: CLIPTextModel(text), tensors, f"{path}"),
        text_projection=tensors["text_projection.weight"].astype(np.float32),
        tokenizer=Tokenizer(clip_vocabulary(), text.pad_token_id),
    )


def image_embeddings(clip: Clip, pixels: np.ndarray) -> np.ndarray:
    """Float32 (n, 3, size, size), normalised by MEAN and DEVIATION → (n, dimensions) of length 1.

    Compiled once, for `BATCH` pictures at a time.
    """
    return _of_length_one(in_batches(clip.vision, pixels, BATCH))


def text_embeddings(clip: Clip, texts: Sequence[str]) -> np.ndarray:
    """Captions → (n, dimensions) of length 1; what goes beyond 77 tokens is cut off."""
    if not texts:
        return np.zeros((0, clip.structure.dimensions), np.float32)
    ids = clip.tokenizer(texts)
    hidden = in_batches(clip.text, ids, TEXT_BATCH)
    ends = (ids == EOS_TOKEN_ID).argmax(1)  # the first: a caption may be padded with it
    return _of_length_one(hidden[np.arange(len(ids)), ends] @ clip.text_projection.T)


def _of_length_one(rows: np.ndarray) -> np.ndarray:
    found: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return found


def _structure(tensors: Mapping[str, np.ndarray], source: str) -> Structure:
    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != axes:
            found = f"shape {tensors[name].shape}" if name in tensors else "none"
            raise WeightsError(
                f"{source}: expected CLIP's vision and text transformers, with a tensor {name} of "
                f"{axes} axes, found {found}; use one of {', '.join(MODELS.values())}"
            )
        return tensors[name].shape

    def layers(tower: str) -> int:
        end = ".layer_norm1.weight"
        begun = (n for n in tensors if n.startswith(f"{tower}.encoder.layers."))
        return sum(name.endswith(end) for name in begun)

    patch = shape("vision_model.embeddings.patch_embedding.weight", 4)[2]
    positions, width = shape("vision_model.embeddings.position_embedding.weight", 2)
    dimensions, text_width = shape("text_projection.weight", 2)
    return Structure(
        patch=patch,
        size=patch * math.isqrt(max(0, positions - 1)),
        width=width,
        layers=layers("vision_model"),
        text_width=text_width,
        text_layers=layers("text_model"),
        dimensions=dimensions,
    )


def _check_activation(path: Path) -> None:
    """Other people's models of the same shapes have another GELU: their `config.json` says so."""
    try:
        config = json.loads((path.parent / "config.json").read_text())
        towers = [config.get(f"{tower}_config") or {} for tower in ("vision", "text")]
        found = [tower.get("hidden_act", "quick_gelu") for tower in towers]
    except (OSError, ValueError, AttributeError):
        return
    if other := next((name for name in found if name != "quick_gelu"), None):
        raise WeightsError(
            f"{path}: expected a CLIP of OpenAI's with the activation quick_gelu, found {other} "
            "in the config.json beside it; use OpenAI's weights"
        )


# ---- names

_OPENAI = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}


def from_openai(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """OpenAI's names (`clip/model.py`) as those of transformers; whatever else there is stays."""
    found = {}
    for name, tensor in tensors.items():
        if name in _OPENAI:
            found[_OPENAI[name]] = tensor
        elif name in _TRANSPOSED:
            found[_TRANSPOSED[name]] = tensor.T
        elif pieces := from_openclip(name.removeprefix("visual.")):
            for ours, piece in pieces:
                if name.startswith("visual."):
                    ours = ours.replace("text_model.", "vision_model.", 1)
                found[ours] = tensor if piece is None else _part(tensor, *piece)
        else:
            found[name] = tensor
    return found


def _part(tensor: np.ndarray, index: int, count: int) -> np.ndarray:
    """One of `count` equal parts along the first axis."""
    size = len(np.atleast_1d(tensor)) // count
    return np.atleast_1d(tensor)[index * size : (index + 1) * size]
