"""AutoencoderKL: images to latents and back; module paths follow diffusers."""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from diffusion.attention import ScaledDotProduct
from diffusion.config import VAEConfig
from diffusion.convolution import Conv2d
from diffusion.layers import GroupNorm, Linear, Network, name_parameters, shared, silu
from diffusion.resnet import Downsample, ResnetBlock, Upsample

EPS = 1e-6


class Attention(nn.Cell):
    """Single-head self-attention over all positions, as a residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, EPS)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = nn.CellList([Linear(channels, channels)])
        self.attend = shared(ScaledDotProduct, channels)

    def construct(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows = self.group_norm(x).reshape(batch, channels, height * width).transpose(0, 2, 1)
        rows = self.attend(self.to_q(rows), self.to_k(rows), self.to_v(rows))
        rows = self.to_out[0](rows).transpose(0, 2, 1)
        return x + rows.reshape(batch, channels, height, width)


class MidBlock(nn.Cell):
    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.CellList(
            [ResnetBlock(channels, channels, None, groups, EPS) for _ in range(2)]
        )
        self.attentions = nn.CellList([Attention(channels, groups)] if attention else [])

    def construct(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class DownBlock(nn.Cell):
    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, last: bool):
        super().__init__()
        self.resnets = nn.CellList(
            [
                ResnetBlock(out_channels if j else in_channels, out_channels, None, groups, EPS)
                for j in range(layers)
            ]
        )
        self.downsamplers = nn.CellList([] if last else [Downsample(out_channels, True)])

    def construct(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x


class UpBlock(nn.Cell):
    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, last: bool):
        super().__init__()
        self.resnets = nn.CellList(
            [
                ResnetBlock(out_channels if j else in_channels, out_channels, None, groups, EPS)
                for j in range(layers)
            ]
        )
        self.upsamplers = nn.CellList([] if last else [Upsample(out_channels)])

    def construct(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class Encoder(nn.Cell):
    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.CellList(
            [
                DownBlock(
                    channels[max(i - 1, 0)],
                    channels[i],
                    config.layers_per_block,
                    groups,
                    last=i == len(channels) - 1,
                )
                for i in range(len(channels))
            ]
        )
        self.mid_block = MidBlock(channels[-1], groups, config.mid_block_attention)
        self.conv_norm_out = GroupNorm(groups, channels[-1], EPS)
        self.conv_out = Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def construct(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Cell):
    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups, config.mid_block_attention)
        self.up_blocks = nn.CellList(
            [
                UpBlock(
                    channels[max(i - 1, 0)],
                    channels[i],
                    config.layers_per_block + 1,
                    groups,
                    last=i == len(channels) - 1,
                )
                for i in range(len(channels))
            ]
        )
        self.conv_norm_out = GroupNorm(groups, channels[-1], EPS)
        self.conv_out = Conv2d(channels[-1], 3, 3, padding=1)

    def construct(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


class AutoencoderKL(Network):
    """The variational autoencoder of Stable Diffusion (Rombach et al., 2022).

    Images are (batch, 3, height, width) in [-1, 1]; latents are (batch, 4, height / factor,
    width / factor) before multiplication by `scaling_factor`.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.latent_channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = Conv2d(config.latent_channels, config.latent_channels, 1)
        name_parameters(self)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (clipped to [-30, 20]) of the latents' distribution."""
        mean, logvar = ops.split(self.quant_conv(self.encoder(images)), self.latent_channels, 1)
        return mean, ops.clamp(logvar, -30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents to images, not clipped."""
        return self.decoder(self.post_quant_conv(latents))

    def construct(self, latents: Tensor) -> Tensor:
        return self.decode(latents)
