"""The layers that every network here is made of, with parameters named as in PyTorch files.

Softmax, GELU and GroupNorm carry backward passes of their own: MindSpore's built-in ones are
several times slower on CPU and keep the attention matrix alive between the two passes.
"""

from __future__ import annotations

import math

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, Normal, Uniform, initializer


class Linear(nn.Cell):
    """y = x Wᵀ + b over the last axis; weight (out, in), bias (out,)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = Parameter(initializer(HeUniform(math.sqrt(5)), (out_features, in_features)))
        self.bias = None
        if bias:
            bound = 1 / math.sqrt(in_features)
            self.bias = Parameter(initializer(Uniform(bound), (out_features,)))
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor) -> Tensor:
        shape = x.shape
        y = self.matmul(x.reshape(-1, self.in_features), self.weight)
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(shape[:-1] + (self.out_features,))


class Conv2d(nn.Cell):
    """2-D convolution over (batch, channels, height, width); weight (out, in, k, k)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        padding: int | tuple = 0,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel = kernel
        self.stride = stride
        self.padding = padding
        shape = (out_channels, in_channels, kernel, kernel)
        self.weight = Parameter(initializer(HeUniform(math.sqrt(5)), shape))
        bound = 1 / math.sqrt(in_channels * kernel * kernel)
        self.bias = Parameter(initializer(Uniform(bound), (out_channels,)))
        self.conv = ops.Conv2D(out_channels, kernel, pad_mode="pad", pad=padding, stride=stride)
        self.bias_add = ops.BiasAdd()

    def construct(self, x: Tensor) -> Tensor:
        return self.bias_add(self.conv(x, self.weight), self.bias)


class Embedding(nn.Cell):
    """Rows of a table; weight (entries, width)."""

    def __init__(self, entries: int, width: int):
        super().__init__()
        self.weight = Parameter(initializer(Normal(0.02), (entries, width)))

    def construct(self, ids: Tensor) -> Tensor:
        return ops.gather(self.weight, ids, 0)


class LayerNorm(nn.Cell):
    """Normalisation over the last axis; weight and bias (width,)."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = Parameter(initializer("ones", (width,)))
        self.bias = Parameter(initializer("zeros", (width,)))
        self.norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, self.bias)[0]


class _Normalize(nn.Cell):
    """(rows, n) → zero mean and unit variance per row.

    Means are products with a constant vector: a reduction over the last axis costs several
    times as much on CPU.
    """

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def construct(self, x: Tensor) -> Tensor:
        average = ops.fill(x.dtype, (x.shape[1], 1), 1.0 / x.shape[1])
        centred = x - ops.matmul(x, average)
        variance = ops.matmul(centred * centred, average)
        return centred * ops.rsqrt(variance + self.eps)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        average = ops.fill(x.dtype, (x.shape[1], 1), 1.0 / x.shape[1])
        centred = x - ops.matmul(x, average)
        inverse_std = ops.rsqrt(ops.matmul(centred * centred, average) + self.eps)
        dx = dout - ops.matmul(dout, average) - out * ops.matmul(dout * out, average)
        return (dx * inverse_std,)


class GroupNorm(nn.Cell):
    """Normalisation over groups of channels of (batch, channels, height, width)."""

    def __init__(self, groups: int, channels: int, eps: float):
        super().__init__()
        self.groups = groups
        self.weight = Parameter(initializer("ones", (channels,)))
        self.bias = Parameter(initializer("zeros", (channels,)))
        self.normalize = _Normalize(eps)

    def construct(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows = x.reshape(batch * self.groups, -1)
        y = self.normalize(rows).reshape(batch, channels, height, width)
        return y * self.weight.reshape(1, -1, 1, 1) + self.bias.reshape(1, -1, 1, 1)


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x)."""
    return x * ops.sigmoid(x)


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * ops.sigmoid(1.702 * x)


_INV_SQRT2 = 1 / math.sqrt(2)
_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


class GatedGELU(nn.Cell):
    """hidden · gelu(gate), with the exact (erf) GELU."""

    def construct(self, hidden: Tensor, gate: Tensor) -> Tensor:
        return hidden * (gate * (0.5 + 0.5 * ops.erf(gate * _INV_SQRT2)))

    def bprop(
        self, hidden: Tensor, gate: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor]:
        cdf = 0.5 + 0.5 * ops.erf(gate * _INV_SQRT2)
        pdf = _INV_SQRT_2PI * ops.exp(-0.5 * gate * gate)
        return dout * gate * cdf, dout * hidden * (cdf + gate * pdf)


class GELU(nn.Cell):
    """The exact (erf) GELU, the activation of OpenCLIP."""

    def construct(self, x: Tensor) -> Tensor:
        return x * (0.5 + 0.5 * ops.erf(x * _INV_SQRT2))

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        cdf = 0.5 + 0.5 * ops.erf(x * _INV_SQRT2)
        pdf = _INV_SQRT_2PI * ops.exp(-0.5 * x * x)
        return (dout * (cdf + x * pdf),)


class ScaledDotProduct(nn.Cell):
    """softmax(q kᵀ / √d) v on (batch·heads, tokens, d); `causal` hides later tokens.

    The backward pass computes the probabilities again instead of keeping them, and uses
    dS = P · (dP − Σ out·dout).
    """

    def __init__(self, head_width: int, causal: bool = False):
        super().__init__()
        self.scale = 1 / math.sqrt(head_width)
        self.causal = causal
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.product = ops.BatchMatMul()
        self.product_transposed = ops.BatchMatMul(transpose_a=True)

    def probabilities(self, q: Tensor, k: Tensor) -> Tensor:
        scores = self.scores(q * self.scale, k)
        if self.causal:
            tokens = q.shape[1]
            hidden = np.triu(np.full((1, tokens, tokens), -1e4, np.float32), 1)
            scores = scores + Tensor(hidden, scores.dtype)
        return ops.softmax(scores, axis=-1)

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.product(self.probabilities(q, k), v)

    def bprop(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        p = self.probabilities(q, k)
        dv = self.product_transposed(p, dout)
        dp = self.scores(dout, v)
        ds = p * (dp - (out * dout).sum(-1, keepdims=True)) * self.scale
        return self.product(ds, k), self.product_transposed(ds, q), dv


class MultiHead(nn.Cell):
    """Splits (batch, tokens, heads·d) into heads, attends, and joins them again."""

    def __init__(self, width: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads = heads
        self.head_width = width // heads
        self.attend = ScaledDotProduct(self.head_width, causal)

    def split(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        x = x.reshape(batch, tokens, self.heads, self.head_width).transpose(0, 2, 1, 3)
        return x.reshape(batch * self.heads, tokens, self.head_width)

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, tokens, width = q.shape
        out = self.attend(self.split(q), self.split(k), self.split(v))
        out = out.reshape(batch, self.heads, tokens, self.head_width).transpose(0, 2, 1, 3)
        return out.reshape(batch, tokens, width)


def upsample_nearest(x: Tensor) -> Tensor:
    """(batch, channels, h, w) → (batch, channels, 2h, 2w) by repetition."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height, 1, width, 1)
    x = ops.broadcast_to(x, (batch, channels, height, 2, width, 2))
    return x.reshape(batch, channels, 2 * height, 2 * width)


def name_parameters(network: nn.Cell) -> nn.Cell:
    """Give every parameter its path inside `network` as its name, as weight files do."""
    for name, parameter in network.parameters_and_names():
        parameter.name = name
    return network


def count_parameters(network: nn.Cell) -> int:
    """The number of scalars in all parameters of `network`."""
    return sum(math.prod(parameter.shape) for parameter in network.get_parameters())


__all__ = [
    "Conv2d",
    "Embedding",
    "GELU",
    "GatedGELU",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "MultiHead",
    "ScaledDotProduct",
    "count_parameters",
    "name_parameters",
    "quick_gelu",
    "silu",
    "upsample_nearest",
]
