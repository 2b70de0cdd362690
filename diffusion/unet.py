"""UNet2DConditionModel of Stable Diffusion 1.x and 2.x; module paths follow diffusers."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from diffusion.attention import MultiHead
from diffusion.config import UNetConfig
from diffusion.convolution import Conv2d
from diffusion.layers import (
    RESHAPE,
    TRANSPOSE,
    GatedGELU,
    GroupNorm,
    LayerNorm,
    Linear,
    Network,
    name_parameters,
    shared,
    silu,
)
from diffusion.resnet import Downsample, ResnetBlock, Upsample

RESNET_EPS = 1e-5
TRANSFORMER_EPS = 1e-6


class Spread(nn.Cell):
    """(rows, …) → (batch, …): x as it is, or all of it as often as the batch has its rows."""

    def construct(self, x: Tensor, batch: int) -> Tensor:
        if x.shape[0] == batch:
            return x
        return ops.concat((x,) * (batch // x.shape[0]))


class TimestepEmbedding(nn.Cell):
    """Sinusoids of the timestep (cosines first, in float32), then two linear layers."""

    def __init__(self, channels: int, time_channels: int):
        super().__init__()
        half = channels // 2
        frequencies = np.exp(-math.log(10000) * np.arange(half, dtype=np.float64) / half)
        self.frequencies = Tensor(frequencies[None].astype(np.float32))
        self.linear_1 = Linear(channels, time_channels, batched=False)
        self.linear_2 = Linear(time_channels, time_channels, batched=False)

    def construct(self, timesteps: Tensor) -> Tensor:
        angles = timesteps.astype(self.frequencies.dtype).expand_dims(-1) * self.frequencies
        sinusoids = ops.concat((ops.cos(angles), ops.sin(angles)), -1)
        sinusoids = sinusoids.astype(self.linear_1.weight.dtype)
        return self.linear_2(silu(self.linear_1(sinusoids)))


class Attention(nn.Cell):
    """Multi-head attention of `width` channels over a context of `context_width` channels."""

    def __init__(self, width: int, context_width: int, heads: int, upcast: bool):
        super().__init__()
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(context_width, width, bias=False)
        self.to_v = Linear(context_width, width, bias=False)
        self.to_out = nn.CellList([Linear(width, width)])
        self.attend = shared(MultiHead, width, heads, False, upcast)

    def construct(self, x: Tensor, context: Tensor) -> Tensor:
        return self.to_out[0](self.attend(self.to_q(x), self.to_k(context), self.to_v(context)))


class GEGLU(nn.Cell):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = Linear(width, 2 * inner)
        self.split = ops.Split(-1, 2)
        self.gated = shared(GatedGELU)

    def construct(self, x: Tensor) -> Tensor:
        hidden, gate = self.split(self.proj(x))
        return self.gated(hidden, gate)


class FeedForward(nn.Cell):
    def __init__(self, width: int):
        super().__init__()
        # net.1 is the dropout of the published module: absent here, but it keeps the numbering.
        self.net = nn.CellList([GEGLU(width, 4 * width), nn.Identity(), Linear(4 * width, width)])

    def construct(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Cell):
    def __init__(self, width: int, context_width: int, heads: int, upcast: bool):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, width, heads, upcast)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, context_width, heads, upcast)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)
        self.spread = shared(Spread)

    def construct(self, x: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = self.spread(x + self.attn1(normed, normed), context.shape[0])
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Cell):
    """A transformer block over the positions of a feature map, as a residual.

    SD 1.x projects with 1×1 convolutions, SD 2.x with linear layers: the same sum, two shapes
    of weight.
    """

    def __init__(self, config: UNetConfig, level: int):
        super().__init__()
        channels, linear = config.block_out_channels[level], config.use_linear_projection
        heads, upcast = config.attention_heads[level], config.upcast_attention
        self.linear = linear
        self.norm = GroupNorm(config.norm_num_groups, channels, TRANSFORMER_EPS)
        self.proj_in = Linear(channels, channels) if linear else Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.CellList(
            [TransformerBlock(channels, config.cross_attention_dim, heads, upcast)]
        )
        self.proj_out = Linear(channels, channels) if linear else Conv2d(channels, channels, 1)
        self.spread = shared(Spread)

    def construct(self, x: Tensor, context: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        hidden = self.norm(x)
        if self.linear:
            hidden = TRANSPOSE(RESHAPE(hidden, (batch, channels, height * width)), (0, 2, 1))
            hidden = self.transformer_blocks[0](self.proj_in(hidden), context)
            hidden = TRANSPOSE(self.proj_out(hidden), (0, 2, 1))
            hidden = RESHAPE(hidden, (-1, channels, height, width))
        else:
            hidden = self.transformer_blocks[0](self.proj_in.to_rows(hidden), context)
            hidden = self.proj_out.from_rows(hidden, height, width)
        return self.spread(x, hidden.shape[0]) + hidden


class DownBlock(nn.Cell):
    def __init__(self, config: UNetConfig, level: int, time_channels: int):
        super().__init__()
        channels = config.block_out_channels
        out, groups = channels[level], config.norm_num_groups
        self.resnets = nn.CellList(
            [
                ResnetBlock(
                    out if j else channels[max(level - 1, 0)],
                    out,
                    time_channels,
                    groups,
                    RESNET_EPS,
                )
                for j in range(config.layers_per_block)
            ]
        )
        self.has_attention = config.cross_attention[level]
        self.attentions = nn.CellList(
            _transformers(config, level, config.layers_per_block) if self.has_attention else []
        )
        last = level == len(channels) - 1
        self.downsamplers = nn.CellList([] if last else [Downsample(out)])
        self.spread = shared(Spread)

    def construct(self, x: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        """The outputs of every layer, in order; the last one goes on."""
        outputs = ()
        for j in range(len(self.resnets)):
            x = self.resnets[j](x, self.spread(time, x.shape[0]))
            if self.has_attention:
                x = self.attentions[j](x, context)
            outputs = outputs + (x,)
        for downsample in self.downsamplers:
            x = downsample(x)
            outputs = outputs + (x,)
        return outputs


class MidBlock(nn.Cell):
    def __init__(self, config: UNetConfig, time_channels: int):
        super().__init__()
        channels, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = nn.CellList(
            [ResnetBlock(channels, channels, time_channels, groups, RESNET_EPS) for _ in range(2)]
        )
        self.attentions = nn.CellList(_transformers(config, -1, 1))
        self.spread = shared(Spread)

    def construct(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, self.spread(time, x.shape[0]))
        x = self.attentions[0](x, context)
        return self.resnets[1](x, self.spread(time, x.shape[0]))


class UpBlock(nn.Cell):
    """`level` counts from the finest, as in the down blocks; the blocks run from the coarsest."""

    def __init__(self, config: UNetConfig, level: int, time_channels: int):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        out = channels[level]
        before = channels[min(level + 1, len(channels) - 1)]
        layers = config.layers_per_block + 1
        resnets = []
        for j in range(layers):
            skip = channels[max(level - 1, 0)] if j == layers - 1 else out
            width = (out if j else before) + skip
            resnets.append(ResnetBlock(width, out, time_channels, groups, RESNET_EPS))
        self.resnets = nn.CellList(resnets)
        self.has_attention = config.cross_attention[level]
        self.attentions = nn.CellList(
            _transformers(config, level, layers) if self.has_attention else []
        )
        self.upsamplers = nn.CellList([Upsample(out)] if level > 0 else [])
        self.spread = shared(Spread)

    def construct(
        self, x: Tensor, skips: tuple[Tensor, ...], time: Tensor, context: Tensor, like: Tensor
    ) -> Tensor:
        """`skips` in the order in which the down blocks made them; the last is used first. `like`
        has the height and width of what is made."""
        time = self.spread(time, x.shape[0])
        for j in range(len(self.resnets)):
            skip = self.spread(skips[len(skips) - 1 - j], x.shape[0])
            x = self.resnets[j](ops.concat((x, skip), 1), time)
            if self.has_attention:
                x = self.attentions[j](x, context)
        for upsample in self.upsamplers:
            x = upsample(x, like)
        return x


def _transformers(config: UNetConfig, level: int, count: int) -> list[Transformer2D]:
    return [Transformer2D(config, level) for _ in range(count)]


class UNet2DConditionModel(Network):
    """Predicts ε or v from noisy latents, a timestep and the text.

    latents (batch, 4, h, w), timesteps (batch,), encoder_hidden_states (batch, tokens,
    cross_attention_dim) → (batch, 4, h, w), of any h and w. It computes in the dtype of its
    weights, casts its inputs to it and its output to float32.

    There may be several texts for each of the latents, as guidance has: encoder_hidden_states
    (n · batch, …) → (n · batch, …), as if latents and timesteps were there n times. What comes
    before the first attention to the text is then computed once.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        channels = config.block_out_channels
        levels = range(len(channels))
        time_channels = 4 * channels[0]
        self.layers_up = config.layers_per_block + 1
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], time_channels)
        self.down_blocks = nn.CellList([DownBlock(config, i, time_channels) for i in levels])
        self.mid_block = MidBlock(config, time_channels)
        self.up_blocks = nn.CellList([UpBlock(config, i, time_channels) for i in reversed(levels)])
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], RESNET_EPS)
        self.conv_out = Conv2d(channels[0], config.out_channels, 3, padding=1)
        name_parameters(self)

    def construct(
        self, latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor
    ) -> Tensor:
        dtype = self.conv_in.weight.dtype
        context = encoder_hidden_states.astype(dtype)
        time = self.time_embedding(timesteps)
        x = self.conv_in(latents.astype(dtype))
        skips = (x,)
        for block in self.down_blocks:
            outputs = block(x, time, context)
            skips = skips + outputs
            x = outputs[-1]
        x = self.mid_block(x, time, context)
        for block in self.up_blocks:
            own, skips = skips[-self.layers_up :], skips[: -self.layers_up]
            x = block(x, own, time, context, skips[-1] if skips else x)
        return self.conv_out(silu(self.conv_norm_out(x))).astype(ms.float32)
