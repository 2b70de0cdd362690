"""The networks of Stable Diffusion as names and shapes: recognised from weights, written out.

Names are those of diffusers and transformers. The fields are those of the published configs, so a
model config of the same field names serves as a structure too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from weights.files import WeightsError

Shapes = dict[str, tuple[int, ...]]
NETWORKS = ("unet", "vae", "text_encoder")
MOST = 64
"""Levels of a network, or layers of a level: more are no Stable Diffusion but a made-up file."""


class UNetFields(Protocol):
    """What the shapes of a UNet2DConditionModel follow from."""

    @property
    def in_channels(self) -> int: ...
    @property
    def out_channels(self) -> int: ...
    @property
    def block_out_channels(self) -> tuple[int, ...]: ...
    @property
    def cross_attention(self) -> tuple[bool, ...]: ...
    @property
    def layers_per_block(self) -> int: ...
    @property
    def cross_attention_dim(self) -> int: ...
    @property
    def use_linear_projection(self) -> bool: ...


class VAEFields(Protocol):
    """What the shapes of an AutoencoderKL follow from."""

    @property
    def block_out_channels(self) -> tuple[int, ...]: ...
    @property
    def layers_per_block(self) -> int: ...
    @property
    def latent_channels(self) -> int: ...
    @property
    def mid_block_attention(self) -> bool: ...


class TextEncoderFields(Protocol):
    """What the shapes of a CLIPTextModel follow from."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


@dataclass(frozen=True)
class UNet:
    """A UNet2DConditionModel, as far as its shapes tell."""

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    cross_attention: tuple[bool, ...]
    layers_per_block: int
    cross_attention_dim: int
    use_linear_projection: bool


@dataclass(frozen=True)
class VAE:
    """An AutoencoderKL, as far as its shapes tell."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    mid_block_attention: bool


@dataclass(frozen=True)
class TextEncoder:
    """A CLIPTextModel, as far as its shapes tell."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    max_position_embeddings: int


# ---- names and shapes of a structure


def unet_shapes(unet: UNetFields) -> Shapes:
    """Every tensor of the UNet and its shape, in the network's order."""
    channels = unet.block_out_channels
    first, last, time = channels[0], channels[-1], 4 * channels[0]
    found = _conv("conv_in", unet.in_channels, first)
    found |= _linear("time_embedding.linear_1", first, time)
    found |= _linear("time_embedding.linear_2", time, time)

    def attention(name: str, width: int) -> Shapes:
        return _transformer(name, width, unet.cross_attention_dim, unet.use_linear_projection)

    skips = [first]
    width = first
    for i, out in enumerate(channels):
        block = f"down_blocks.{i}"
        for j in range(unet.layers_per_block):
            found |= _resnet(f"{block}.resnets.{j}", width, out, time)
            if unet.cross_attention[i]:
                found |= attention(f"{block}.attentions.{j}", out)
            width = out
            skips.append(out)
        if i < len(channels) - 1:
            found |= _conv(f"{block}.downsamplers.0.conv", out, out)
            skips.append(out)
    found |= _resnet("mid_block.resnets.0", last, last, time)
    found |= attention("mid_block.attentions.0", last)
    found |= _resnet("mid_block.resnets.1", last, last, time)
    for i, out in enumerate(reversed(channels)):
        block = f"up_blocks.{i}"
        for j in range(unet.layers_per_block + 1):
            found |= _resnet(f"{block}.resnets.{j}", width + skips.pop(), out, time)
            if unet.cross_attention[-1 - i]:
                found |= attention(f"{block}.attentions.{j}", out)
            width = out
        if i < len(channels) - 1:
            found |= _conv(f"{block}.upsamplers.0.conv", out, out)
    found |= _norm("conv_norm_out", first)
    return found | _conv("conv_out", first, unet.out_channels)


def vae_shapes(vae: VAEFields) -> Shapes:
    """Every tensor of the autoencoder and its shape."""
    channels, z = vae.block_out_channels, vae.latent_channels
    last = channels[-1]

    def middle(name: str) -> Shapes:
        found = _resnet(f"{name}.resnets.0", last, last) | _resnet(f"{name}.resnets.1", last, last)
        if vae.mid_block_attention:
            attention = f"{name}.attentions.0"
            found |= _norm(f"{attention}.group_norm", last)
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                found |= _linear(f"{attention}.{part}", last, last)
        return found

    found = _conv("encoder.conv_in", 3, channels[0])
    width = channels[0]
    for i, out in enumerate(channels):
        for j in range(vae.layers_per_block):
            found |= _resnet(f"encoder.down_blocks.{i}.resnets.{j}", width, out)
            width = out
        if i < len(channels) - 1:
            found |= _conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", out, out)
    found |= middle("encoder.mid_block")
    found |= _norm("encoder.conv_norm_out", last) | _conv("encoder.conv_out", last, 2 * z)
    found |= _conv("quant_conv", 2 * z, 2 * z, 1) | _conv("post_quant_conv", z, z, 1)
    found |= _conv("decoder.conv_in", z, last) | middle("decoder.mid_block")
    width = last
    for i, out in enumerate(reversed(channels)):
        for j in range(vae.layers_per_block + 1):
            found |= _resnet(f"decoder.up_blocks.{i}.resnets.{j}", width, out)
            width = out
        if i < len(channels) - 1:
            found |= _conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", out, out)
    found |= _norm("decoder.conv_norm_out", channels[0])
    return found | _conv("decoder.conv_out", channels[0], 3)


def text_encoder_shapes(text: TextEncoderFields) -> Shapes:
    """Every tensor of the text encoder and its shape."""
    width = text.hidden_size
    found: Shapes = {
        "text_model.embeddings.token_embedding.weight": (text.vocab_size, width),
        "text_model.embeddings.position_embedding.weight": (text.max_position_embeddings, width),
    }
    for i in range(text.num_hidden_layers):
        layer = f"text_model.encoder.layers.{i}"
        found |= _norm(f"{layer}.layer_norm1", width) | _norm(f"{layer}.layer_norm2", width)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= _linear(f"{layer}.self_attn.{part}", width, width)
        found |= _linear(f"{layer}.mlp.fc1", width, text.intermediate_size)
        found |= _linear(f"{layer}.mlp.fc2", text.intermediate_size, width)
    return found | _norm("text_model.final_layer_norm", width)


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    found: Shapes = {f"{name}.weight": (outputs, inputs)}
    return found | {f"{name}.bias": (outputs,)} if bias else found


def _conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


def _resnet(name: str, inputs: int, outputs: int, time: int | None = None) -> Shapes:
    found = _norm(f"{name}.norm1", inputs) | _conv(f"{name}.conv1", inputs, outputs)
    if time is not None:
        found |= _linear(f"{name}.time_emb_proj", time, outputs)
    found |= _norm(f"{name}.norm2", outputs) | _conv(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        found |= _conv(f"{name}.conv_shortcut", inputs, outputs, 1)
    return found


def _transformer(name: str, width: int, context: int, linear: bool) -> Shapes:
    def projection(part: str) -> Shapes:
        if linear:
            return _linear(f"{name}.{part}", width, width)
        return _conv(f"{name}.{part}", width, width, 1)

    block = f"{name}.transformer_blocks.0"
    found = _norm(f"{name}.norm", width) | projection("proj_in")
    for number, inputs in ((1, width), (2, context)):
        attention = f"{block}.attn{number}"
        found |= _linear(f"{attention}.to_q", width, width, bias=False)
        found |= _linear(f"{attention}.to_k", inputs, width, bias=False)
        found |= _linear(f"{attention}.to_v", inputs, width, bias=False)
        found |= _linear(f"{attention}.to_out.0", width, width)
    found |= _linear(f"{block}.ff.net.0.proj", width, 8 * width)
    found |= _linear(f"{block}.ff.net.2", 4 * width, width)
    for number in (1, 2, 3):
        found |= _norm(f"{block}.norm{number}", width)
    return found | projection("proj_out")


# ---- the structure of weights


def unet_of(shapes: Mapping[str, tuple[int, ...]]) -> UNet:
    """What UNet these tensors belong to; WeightsError if the telling ones are not there."""
    levels = 1 + _highest(r"down_blocks\.(\d+)\.", shapes)
    layers = 1 + _highest(r"down_blocks\.0\.resnets\.(\d+)\.", shapes)
    attends = (_any(rf"down_blocks\.{i}\.attentions\.", shapes) for i in range(levels))
    channels = (
        _shape(rf"down_blocks\.{i}\.resnets\.\d+\.conv2\.bias", shapes)[0] for i in range(levels)
    )
    return UNet(
        in_channels=_shape(r"conv_in\.weight", shapes, 4)[1],
        out_channels=_shape(r"conv_out\.bias", shapes)[0],
        block_out_channels=tuple(channels),
        cross_attention=tuple(attends),
        layers_per_block=layers,
        cross_attention_dim=_shape(r".*\.attn2\.to_[kv]\.weight", shapes, 2)[1],
        use_linear_projection=len(_shape(r".*\.proj_(in|out)\.weight", shapes)) == 2,
    )


def vae_of(shapes: Mapping[str, tuple[int, ...]]) -> VAE:
    """What autoencoder these tensors belong to; WeightsError as `unet_of`."""
    levels = 1 + _highest(r"encoder\.down_blocks\.(\d+)\.", shapes)
    channels = (
        _shape(rf"encoder\.down_blocks\.{i}\.resnets\.\d+\.conv2\.bias", shapes)[0]
        for i in range(levels)
    )
    return VAE(
        block_out_channels=tuple(channels),
        layers_per_block=1 + _highest(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.", shapes),
        latent_channels=_shape(r"post_quant_conv\.bias", shapes)[0],
        mid_block_attention=_any(r"(en|de)coder\.mid_block\.attentions\.", shapes),
    )


def text_encoder_of(shapes: Mapping[str, tuple[int, ...]]) -> TextEncoder:
    """What text encoder these tensors belong to; WeightsError as `unet_of`."""
    vocabulary, width = _shape(r"text_model\.embeddings\.token_embedding\.weight", shapes, 2)
    positions, _ = _shape(r"text_model\.embeddings\.position_embedding\.weight", shapes, 2)
    return TextEncoder(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=_shape(r".*\.mlp\.fc1\.bias", shapes)[0],
        num_hidden_layers=1 + _highest(r"text_model\.encoder\.layers\.(\d+)\.", shapes),
        max_position_embeddings=positions,
    )


def shapes_of(structure: UNet | VAE | TextEncoder) -> Shapes:
    """Names and shapes of a recognised structure."""
    if isinstance(structure, UNet):
        return unet_shapes(structure)
    return vae_shapes(structure) if isinstance(structure, VAE) else text_encoder_shapes(structure)


RECOGNISE: dict[str, Callable[[Mapping[str, tuple[int, ...]]], UNet | VAE | TextEncoder]] = {
    "unet": unet_of,
    "vae": vae_of,
    "text_encoder": text_encoder_of,
}


def _matches(pattern: str, names: Iterable[str]) -> Iterator[re.Match[str]]:
    found = re.compile(pattern)
    return (match for name in names if (match := found.match(name)))


def _any(pattern: str, names: Iterable[str]) -> bool:
    return next(_matches(pattern, names), None) is not None


def _highest(pattern: str, names: Iterable[str]) -> int:
    numbers = [int(match[1][:4]) for match in _matches(pattern, names)]
    if not numbers or max(numbers) >= MOST:
        raise WeightsError(f"no tensor is called like {_readable(pattern)}")
    return max(numbers)


def _shape(
    pattern: str, shapes: Mapping[str, tuple[int, ...]], dimensions: int | None = None
) -> tuple[int, ...]:
    for match in _matches(f"{pattern}$", shapes):
        shape = shapes[match.string]
        if shape and (dimensions is None or len(shape) == dimensions):
            return shape
    raise WeightsError(f"no tensor is called like {_readable(pattern)}")


def _readable(pattern: str) -> str:
    return pattern.replace("\\.", ".").replace(r"(\d+)", "N").replace(r"\d+", "N").rstrip(".")
