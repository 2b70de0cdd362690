"""The residual block and the two samplers that UNet and VAE share."""

from __future__ import annotations

from mindspore import Tensor, nn

from diffusion.convolution import Conv2d
from diffusion.layers import AddToChannels, GroupNorm, Linear, shared, silu


class ResnetBlock(nn.Cell):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))); both ends (batch, channels, h, w).

    `time_channels` is None in the VAE, which knows no time.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_channels: int | None,
        groups: int,
        eps: float,
    ):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None
        if time_channels is not None:
            self.time_emb_proj = Linear(time_channels, out_channels, batched=False)
            self.add_time = shared(AddToChannels)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = Conv2d(in_channels, out_channels, 1)

    def construct(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        hidden = self.conv1(silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            hidden = self.add_time(hidden, self.time_emb_proj(silu(time)))
        hidden = self.conv2(silu(self.norm2(hidden)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + hidden


class Downsample(nn.Cell):
    """Halves height and width by a strided convolution.

    The VAE pads only on the right and at the bottom (`asymmetric`), the UNet all around.
    """

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        padding = (0, 1, 0, 1) if asymmetric else 1
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def construct(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Cell):
    """Doubles height and width by repetition, then convolves; to those of `like`, if it is given,
    which are odd if they were halved from an odd size."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def construct(self, x: Tensor, like: Tensor | None = None) -> Tensor:
        size = (2 * x.shape[2], 2 * x.shape[3])
        if like is not None:
            size = like.shape[2:]
        return self.conv(x, size)
