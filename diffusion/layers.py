"""The layers that every network here is made of, with parameters named as in PyTorch files.

A layer computes in the dtype of its input, whatever its weights are stored in; normalisation
computes in float32. Every output has the dtype of the input.

Some carry backward passes of their own, the activations with an erf, ChannelAffine and
AddToChannels: MindSpore's are several times slower on CPU, or keep what is not needed.
"""

from __future__ import annotations

import math
from functools import cache

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, Normal, Uniform, initializer
from mindspore.ops.primitive import constexpr


@cache
def shared(kind: type[nn.Cell], *arguments: object) -> nn.Cell:
    """The one cell of this kind and these arguments; it must have no parameters.

    MindSpore reads the source of each cell that it meets, and what it comes to, once for each.
    """
    return kind(*arguments)


# Primitives, because methods of tensors take longer to compile. Functions of this module have no
# branches: MindSpore loses parts of a branch when a second gradient is compiled in one process.
RESHAPE, CAST, TRANSPOSE = ops.Reshape(), ops.Cast(), ops.Transpose()
CONCAT, BIAS_ADD = ops.Concat(-1), ops.BiasAdd()
_MATMUL, _SUM, _TILE = ops.MatMul(transpose_b=True), ops.ReduceSum(), ops.Tile()


class Network(nn.Cell):
    """A cell that is called itself, and not from inside another one alone.

    At each call MindSpore tells all cells inside which graph they belong to, hundreds of them in
    2 ms. They know it if the last call was for the same graph.
    """

    @property
    def compile_phase(self) -> str | None:
        """Which graph it is."""
        return super().compile_phase

    @compile_phase.setter
    def compile_phase(self, phase: str) -> None:
        if phase != self._compile_phase:
            nn.Cell.compile_phase.fset(self, phase)


class Affine(nn.Cell):
    """What a linear layer and one with an adapter have in common."""

    def affine(self, x: Tensor) -> Tensor:
        """x Wᵀ + b over the last axis of (rows, in) or (batch, rows, in), in the dtype of x."""
        y = _MATMUL(RESHAPE(x, (-1, self.in_features)), CAST(self.weight, x.dtype))
        if self.bias is not None:
            y = BIAS_ADD(y, CAST(self.bias, x.dtype))
        if self.batched:
            y = RESHAPE(y, (x.shape[0], -1, self.out_features))
        return y


class Linear(Affine):
    """y = x Wᵀ + b over the last axis of (batch, rows, in), or of (rows, in) if not `batched`;
    weight (out, in), bias (out,)."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, batched: bool = True
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.batched = batched
        self.weight = Parameter(initializer(HeUniform(math.sqrt(5)), (out_features, in_features)))
        self.bias = None
        if bias:
            bound = 1 / math.sqrt(in_features)
            self.bias = Parameter(initializer(Uniform(bound), (out_features,)))

    def construct(self, x: Tensor) -> Tensor:
        return self.affine(x)


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
        self.normalize = shared(_BatchedLayerNorm if on_cpu() else _LayerNorm, eps)

    def construct(self, x: Tensor) -> Tensor:
        weight, bias = CAST(self.weight, ms.float32), CAST(self.bias, ms.float32)
        return CAST(self.normalize(CAST(x, ms.float32), weight, bias), x.dtype)


class _LayerNorm(nn.Cell):
    """The function of x, weight and bias, all float32."""

    def __init__(self, eps: float):
        super().__init__()
        self.norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.norm(x, weight, bias)[0]


class _BatchedLayerNorm(nn.Cell):
    """The same, as a BatchNorm whose channels are the rows, and a product: on CPU the backward pass
    of LayerNorm takes two to four times as long. See _FusedGroupNorm."""

    def __init__(self, eps: float):
        super().__init__()
        self.norm = batch_norm(eps)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        width = weight.shape[0]
        rows = RESHAPE(x, (1, -1, width, 1))
        normalised = RESHAPE(normalised_rows(self.norm, rows), (-1, width))
        scale = _TILE(RESHAPE(weight, (1, width)), (normalised.shape[0], 1))
        return RESHAPE(BIAS_ADD(normalised * scale, bias), x.shape)


def on_cpu() -> bool:
    """Is it the CPU that runs the networks?"""
    return bool(ms.get_context("device_target") == "CPU")


def batch_norm(eps: float) -> ops.BatchNorm:
    """BatchNorm that finds mean and variance of what it is given."""
    return ops.BatchNorm(is_training=True, epsilon=eps, momentum=0.0)


@constexpr
def constants(count: int, value: float) -> Tensor:
    """(count,) of this value, float32; part of a graph, and not computed in it."""
    return Tensor(np.full(count, value, np.float32))


def normalised_rows(norm: ops.BatchNorm, rows: Tensor) -> Tensor:
    """(1, rows, height, width), each row less its mean and divided by its deviation."""
    ones, zeros = constants(rows.shape[1], 1.0), constants(rows.shape[1], 0.0)
    return norm(rows, ones, zeros, zeros, ones)[0]


_EPS = 1e-5
_BATCH_NORM = ops.BatchNorm(is_training=False, epsilon=_EPS)


def channel_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(batch, channels, height, width), (channels,), (channels,), all float32 → x · scale + shift.

    As a BatchNorm that infers, with mean 0 and variance 1 − ε: it divides by √(variance + ε). On
    CPU a product whose factors differ in shape keeps two index tables of 16 bytes for each element,
    for as long as the graph lives: at the size of Stable Diffusion tens of gigabytes.
    """
    channels = x.shape[1]
    return _BATCH_NORM(x, scale, shift, constants(channels, 0.0), constants(channels, 1 - _EPS))[0]


def row_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(rows, n), (rows,), (rows,), all float32 → x · scale + shift, row by row."""
    rows, n = x.shape
    return RESHAPE(channel_affine(RESHAPE(x, (1, rows, n, 1)), scale, shift), (rows, n))


class GroupNorm(nn.Cell):
    """Normalisation over groups of channels of (batch, channels, height, width)."""

    def __init__(self, groups: int, channels: int, eps: float):
        super().__init__()
        self.weight = Parameter(initializer("ones", (channels,)))
        self.bias = Parameter(initializer("zeros", (channels,)))
        self.normalize = shared(_FusedGroupNorm if on_cpu() else _GroupNorm, groups, eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.normalize(x, CAST(self.weight, ms.float32), CAST(self.bias, ms.float32))


class _GroupNorm(nn.Cell):
    """The function of x, weight and bias, the latter float32."""

    def __init__(self, groups: int, eps: float):
        super().__init__()
        self.groups = groups
        self.eps = eps

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = ops.group_norm(CAST(x, ms.float32), self.groups, weight, bias, self.eps)
        return CAST(y, x.dtype)


class ChannelAffine(nn.Cell):
    """`channel_affine`, whose backward pass asks for x only if scale is trained; BatchNorm's own
    keeps it in any case."""

    def construct(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return channel_affine(x, scale, shift)

    def bprop(
        self, x: Tensor, scale: Tensor, shift: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx = channel_affine(dout, scale, constants(x.shape[1], 0.0))
        return dx, _SUM(dout * x, (0, 2, 3)), _SUM(dout, (0, 2, 3))


class _FusedGroupNorm(nn.Cell):
    """The same as two BatchNorms: one whose channels are the groups, and that finds mean and
    variance, and one that scales and shifts.

    On CPU these are oneDNN's, forward and back, and several times as fast as MindSpore's GroupNorm.
    On other devices BatchNorm takes its running statistics from Parameters alone, of which there
    are none here: so this is for CPU.
    """

    def __init__(self, groups: int, eps: float):
        super().__init__()
        self.groups = groups
        self.norm = batch_norm(eps)
        self.affine = shared(ChannelAffine)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = RESHAPE(CAST(x, ms.float32), (1, x.shape[0] * self.groups, -1, x.shape[3]))
        y = RESHAPE(normalised_rows(self.norm, rows), x.shape)
        return CAST(self.affine(y, weight, bias), x.dtype)


class AddToChannels(nn.Cell):
    """(batch, channels, height, width) + (batch, channels)."""

    def construct(self, x: Tensor, addend: Tensor) -> Tensor:
        rows = CAST(RESHAPE(x, (x.shape[0] * x.shape[1], -1)), ms.float32)
        addend = CAST(RESHAPE(addend, (-1,)), ms.float32)
        ones = constants(rows.shape[0], 1.0)
        return CAST(RESHAPE(row_affine(rows, ones, addend), x.shape), x.dtype)

    def bprop(self, x: Tensor, addend: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        rows = CAST(RESHAPE(dout, (x.shape[0] * x.shape[1], -1)), ms.float32)
        sums = _SUM(rows, 1)
        return dout, CAST(RESHAPE(sums, addend.shape), addend.dtype)


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x)."""
    return x * ops.sigmoid(x)


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * ops.sigmoid(1.702 * x)


_INV_SQRT2 = 1 / math.sqrt(2)
_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


class _NormalCDF(nn.Cell):
    """Φ, the share of a normal distribution that is below x."""

    def construct(self, x: Tensor) -> Tensor:
        return 0.5 + 0.5 * ops.erf(x * _INV_SQRT2)


LOGIT = (
    1.5957698802e00,
    7.2666169151e-02,
    -6.5189945157e-05,
    -1.1061239022e-04,
    7.9294894133e-06,
    -2.6452672951e-07,
    3.5123430308e-09,
)
"""log(Φ(x) / Φ(−x)) / x as a polynomial of x², lowest power first: where Φ differs from 0 and 1 it
is that to 2.9e-8 (least squares, weighted by Lawson's method until the largest error is least)."""


class _LogisticCDF(nn.Cell):
    """The same through the logistic function. MindSpore's Erf on CPU takes one thread, and twice as
    long as these fifteen operators from 65,536 numbers on; their rounding comes to 9e-7."""

    def construct(self, x: Tensor) -> Tensor:
        y = CAST(x, ms.float32)
        square = y * y
        logit = square * LOGIT[6] + LOGIT[5]
        logit = logit * square + LOGIT[4]
        logit = logit * square + LOGIT[3]
        logit = logit * square + LOGIT[2]
        logit = logit * square + LOGIT[1]
        logit = logit * square + LOGIT[0]
        return CAST(ops.sigmoid(y * logit), x.dtype)


class GatedGELU(nn.Cell):
    """hidden · gelu(gate), with the exact (erf) GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.cdf = shared(_LogisticCDF if on_cpu() else _NormalCDF)

    def construct(self, hidden: Tensor, gate: Tensor) -> Tensor:
        return hidden * (gate * self.cdf(gate))

    def bprop(
        self, hidden: Tensor, gate: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor]:
        cdf = self.cdf(gate)
        pdf = _INV_SQRT_2PI * ops.exp(-0.5 * gate * gate)
        return dout * gate * cdf, dout * hidden * (cdf + gate * pdf)


class GELU(nn.Cell):
    """The exact (erf) GELU, the activation of OpenCLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.cdf = shared(_LogisticCDF if on_cpu() else _NormalCDF)

    def construct(self, x: Tensor) -> Tensor:
        return x * self.cdf(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        cdf = self.cdf(x)
        pdf = _INV_SQRT_2PI * ops.exp(-0.5 * x * x)
        return (dout * (cdf + x * pdf),)


def name_parameters(network: nn.Cell) -> nn.Cell:
    """Give every parameter its path inside `network` as its name, as weight files do."""
    for name, parameter in network.parameters_and_names():
        parameter.name = name
    return network


def count_parameters(network: nn.Cell) -> int:
    """The number of scalars in all parameters of `network`."""
    return sum(math.prod(parameter.shape) for parameter in network.get_parameters())
