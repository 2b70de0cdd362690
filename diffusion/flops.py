"""Floating-point operations of the networks, counted from their descriptions; needs no MindSpore.

A multiplication and an addition are two. Convolutions, linear layers and the products of attention
count; everything else is far below a hundredth of them. Each figure is for one image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffusion.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig

TOKENS = 77


@dataclass(frozen=True)
class Cost:
    """Operations of a forward pass, and how many of them are products of attention."""

    layers: float
    """Of convolutions and linear layers."""
    attention: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.layers + other.layers, self.attention + other.attention)

    @property
    def total(self) -> float:
        """All of them."""
        return self.layers + self.attention


@dataclass(frozen=True)
class Level:
    """A residual block or a transformer of the UNet: where it is and what goes through it."""

    kind: str
    """"resnet" or "transformer"."""
    channels_in: int
    channels: int
    positions: int
    """Height times width."""
    heads: int = 0


def unet_levels(config: UNetConfig, height: int, width: int) -> Iterator[Level]:
    """The blocks in the order in which they run, for latents of this size."""
    channels, layers = config.block_out_channels, config.layers_per_block
    last = len(channels) - 1
    sizes = [(height, width)]
    for _ in range(last):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    positions = [h * w for h, w in sizes]

    def block(level: int, into: int) -> Iterator[Level]:
        yield Level("resnet", into, channels[level], positions[level])
        if config.cross_attention[level]:
            yield transformer(level)

    def transformer(level: int) -> Level:
        c = channels[level]
        return Level("transformer", c, c, positions[level], config.attention_heads[level])

    for level in range(last + 1):
        for j in range(layers):
            yield from block(level, channels[level] if j else channels[max(level - 1, 0)])
    yield Level("resnet", channels[-1], channels[-1], positions[-1])
    yield transformer(last)
    yield Level("resnet", channels[-1], channels[-1], positions[-1])
    for level in reversed(range(last + 1)):
        for j in range(layers + 1):
            skip = channels[max(level - 1, 0)] if j == layers else channels[level]
            before = channels[level] if j else channels[min(level + 1, last)]
            yield from block(level, before + skip)


def unet(config: UNetConfig, height: int, width: int, tokens: int = TOKENS) -> Cost:
    """A forward pass over latents of this size."""
    channels, last = config.block_out_channels, len(config.block_out_channels) - 1
    time = 4 * channels[0]
    cost = Cost(_conv(3, config.in_channels + config.out_channels, channels[0], height * width))
    cost += Cost(2.0 * (channels[0] * time + time * time))
    for one in unet_levels(config, height, width):
        cost += level(one, config.cross_attention_dim, tokens)
        if one.kind == "resnet":
            cost += Cost(2.0 * time * one.channels)
    for i in range(last):
        h, w = (height + 2**i - 1) >> i, (width + 2**i - 1) >> i
        down = _conv(3, channels[i], channels[i], ((h + 1) // 2) * ((w + 1) // 2))
        cost += Cost(down + _conv(3, channels[i + 1], channels[i + 1], h * w))
    return cost


def level(one: Level, context: int, tokens: int = TOKENS) -> Cost:
    """A forward pass through one block, without what the timestep adds; `context` is the width of
    the text."""
    if one.kind == "resnet":
        return _resnet(one.channels_in, one.channels, one.positions)
    return _transformer(one.channels, one.positions, context, tokens)


def vae_encoder(config: VAEConfig, height: int, width: int) -> Cost:
    """Encoding of a picture of this size in pixels."""
    channels, into = config.block_out_channels, config.block_out_channels[0]
    cost = Cost(_conv(3, 3, into, height * width))
    for level, out in enumerate(channels):
        for _ in range(config.layers_per_block):
            cost += _resnet(into, out, height * width)
            into = out
        if level < len(channels) - 1:
            height, width = height // 2, width // 2
            cost += Cost(_conv(3, out, out, height * width))
    positions = height * width
    for _ in range(2):
        cost += _resnet(into, into, positions)
    if config.mid_block_attention:
        cost += Cost(8.0 * into * into * positions, 4.0 * positions * positions * into)
    moments = 2 * config.latent_channels
    return cost + Cost(_conv(3, into, moments, positions) + _conv(1, moments, moments, positions))


def text_encoder(config: TextEncoderConfig, tokens: int = TOKENS) -> Cost:
    """Encoding of a caption."""
    width, inner = config.hidden_size, config.intermediate_size
    layers = 2.0 * tokens * (4 * width * width + 2 * width * inner)
    return Cost(
        config.num_hidden_layers * layers,
        config.num_hidden_layers * 4.0 * tokens * tokens * width,
    )


def model(config: ModelConfig, pixels: tuple[int, int]) -> dict[str, Cost]:
    """Each network's forward pass for a picture of this height and width."""
    height, width = pixels
    factor = config.vae.factor
    return {
        "unet": unet(config.unet, height // factor, width // factor),
        "vae": vae_encoder(config.vae, height, width),
        "text_encoder": text_encoder(config.text_encoder),
    }


def _conv(kernel: int, channels_in: int, channels_out: int, positions: int) -> float:
    return 2.0 * kernel * kernel * channels_in * channels_out * positions


def _resnet(channels_in: int, channels: int, positions: int) -> Cost:
    shortcut = _conv(1, channels_in, channels, positions) if channels_in != channels else 0.0
    both = _conv(3, channels_in, channels, positions) + _conv(3, channels, channels, positions)
    return Cost(both + shortcut)


def _transformer(channels: int, positions: int, context: int, tokens: int) -> Cost:
    """Projections in and out, self-attention, cross-attention, feed-forward with its gate."""
    square = 2.0 * channels * channels * positions
    layers = (2 + 4 + 2 + 12) * square + 2.0 * 2 * context * channels * tokens
    return Cost(layers, 4.0 * channels * positions * (positions + tokens))
