"""The 2-D convolution that every network here is made of, and the ways that it takes."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, Uniform, initializer

from diffusion import winograd
from diffusion.layers import BIAS_ADD, CAST, CONCAT, RESHAPE, TRANSPOSE, on_cpu, shared

_PRODUCT, _JOIN = ops.MatMul(), ops.Concat(0)
_ROWS = ops.BatchMatMul(transpose_a=True, transpose_b=True)
_COLUMNS = ops.BatchMatMul(transpose_b=True)


class Convolving(nn.Cell):
    """What a convolution and one with an adapter have in common."""

    def convolve(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """The convolution with its bias, in the dtype of x; of x enlarged by repetition to `size`
        (height, width), if that is given, which is twice its own or one less."""
        height, width = x.shape[2:] if size is None else size
        if self.transformed is not None and winograd.worthwhile(
            x.shape[0], self.in_channels, self.out_channels, height, width
        ):
            y = self.winograd(x, self.transformed, height, width)
        else:
            if size is not None:
                x = upsample_nearest(x)
                if x.shape[2:] != size:
                    x = x[:, :, :height, :width]
            y = self.conv(x, CAST(self.weight, x.dtype))
        if self.bias is not None:
            y = self.bias_add(y, CAST(self.bias, x.dtype))
        return y

    def to_rows(self, x: Tensor) -> Tensor:
        """The same for a kernel of 1×1, with positions before channels: (batch, h·w, out)."""
        batch, channels, height, width = x.shape
        # With fewer positions repeating the weight for each image costs more than it spares.
        if self.by_products and height * width >= channels:
            weight = RESHAPE(CAST(self.weight, x.dtype), (1, self.out_channels, channels))
            y = _ROWS(RESHAPE(x, (batch, channels, -1)), _JOIN((weight,) * batch))
            y = RESHAPE(y, (-1, self.out_channels))
            if self.bias is not None:
                y = BIAS_ADD(y, CAST(self.bias, x.dtype))
            return RESHAPE(y, (batch, height * width, self.out_channels))
        y = RESHAPE(self.construct(x), (batch, self.out_channels, height * width))
        return TRANSPOSE(y, (0, 2, 1))

    def from_rows(self, x: Tensor, height: int, width: int) -> Tensor:
        """The same of (batch, h·w, channels), for a kernel of 1×1: (batch, out, height, width)."""
        batch, positions, channels = x.shape
        if self.by_products and positions >= channels:
            weight = RESHAPE(CAST(self.weight, x.dtype), (1, self.out_channels, channels))
            y = _COLUMNS(_JOIN((weight,) * batch), x)
            y = RESHAPE(y, (batch, self.out_channels, height, width))
            if self.bias is not None:
                y = BIAS_ADD(y, CAST(self.bias, x.dtype))
            return y
        x = RESHAPE(TRANSPOSE(x, (0, 2, 1)), (batch, channels, height, width))
        return self.construct(x)

    @property
    def is_transformed(self) -> bool:
        """Has the weight been prepared by `transform`?"""
        return self.transformed is not None

    def transform(self) -> None:
        """Prepare the weight for a faster way to convolve, if there is one here; it is not trained
        from then on. To be called again when it has changed."""
        fits = (self.kernel, self.stride, self.padding) == (3, 1, 1) and winograd.fits(
            self.in_channels, self.out_channels
        )
        if not (fits and on_cpu() and self.weight.dtype == ms.float32):
            return
        self.weight.requires_grad = False
        kernel = Tensor(winograd.transform(self.weight.asnumpy()))
        if self.transformed is None:
            self.transformed = Parameter(kernel, name="transformed", requires_grad=False)
        else:
            self.transformed.set_data(kernel)


class Conv2d(Convolving):
    """2-D convolution over (batch, channels, height, width); weight (out, in, k, k)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        padding: int | tuple = 0,
        bias: bool = True,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel = kernel
        self.stride = stride
        self.padding = padding
        shape = (out_channels, in_channels, kernel, kernel)
        self.weight = Parameter(initializer(HeUniform(math.sqrt(5)), shape))
        self.bias = None
        if bias:
            bound = 1 / math.sqrt(in_channels * kernel * kernel)
            self.bias = Parameter(initializer(Uniform(bound), (out_channels,)))
        self.transformed = None
        # A product for each image, which exchanges the axes too: a Transpose takes as long on CPU,
        # and keeps a table of all elements (as attention._GatheredExchange says).
        self.by_products = kernel == 1 and on_cpu()
        self.conv = ops.Conv2D(out_channels, kernel, pad_mode="pad", pad=padding, stride=stride)
        self.bias_add = ops.BiasAdd()
        self.winograd = shared(winograd.Winograd)

    def construct(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return self.convolve(x, size)


def upsample_nearest(x: Tensor) -> Tensor:
    """(batch, channels, h, w) → (batch, channels, 2h, 2w) by repetition.

    Columns by a product with a matrix of ones and zeros, rows by joining: BroadcastTo, and the sum
    that is its backward pass, take longer on CPU.
    """
    batch, channels, height, width = x.shape
    twice = Tensor(np.repeat(np.eye(width, dtype=np.float32), 2, 1), x.dtype)
    rows = _PRODUCT(RESHAPE(x, (-1, width)), twice)
    rows = RESHAPE(rows, (-1, 2 * width))
    return RESHAPE(CONCAT((rows, rows)), (batch, channels, 2 * height, 2 * width))
