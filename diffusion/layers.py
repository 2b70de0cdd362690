"""The layers that every network here is made of, with parameters named as in PyTorch files.

A layer computes in the dtype of its input, whatever its weights are stored in; normalisation
computes in float32. Every output has the dtype of the input.

Attention and GELU carry backward passes of their own: MindSpore's built-in ones are several times
slower on CPU and keep the attention matrix alive between the two passes.
"""

from __future__ import annotations

import math
from functools import cache

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, Normal, Uniform, initializer
from mindspore.ops.primitive import constexpr

from diffusion import winograd


@cache
def shared(kind: type[nn.Cell], *arguments: object) -> nn.Cell:
    """The one cell of this kind and these arguments; it must have no parameters.

    MindSpore reads the source of each cell that it meets, and what it comes to, once for each.
    """
    return kind(*arguments)


# Primitives, because methods of tensors take longer to compile. Functions of this module have no
# branches: of those, MindSpore loses parts when a second gradient is compiled in one process.
RESHAPE, CAST, TRANSPOSE = ops.Reshape(), ops.Cast(), ops.Transpose()
_MATMUL, _BIAS_ADD = ops.MatMul(transpose_b=True), ops.BiasAdd()
_PRODUCT, _SLICE, _GATHER = ops.MatMul(), ops.Slice(), ops.Gather()
_ROWS = ops.BatchMatMul(transpose_a=True, transpose_b=True)
_COLUMNS, _JOIN = ops.BatchMatMul(transpose_b=True), ops.Concat(0)
_SUM, _TILE = ops.ReduceSum(), ops.Tile()


class Affine(nn.Cell):
    """What a linear layer and one with an adapter have in common."""

    def affine(self, x: Tensor) -> Tensor:
        """x Wᵀ + b over the last axis of (rows, in) or (batch, rows, in), in the dtype of x."""
        y = _MATMUL(RESHAPE(x, (-1, self.in_features)), CAST(self.weight, x.dtype))
        if self.bias is not None:
            y = _BIAS_ADD(y, CAST(self.bias, x.dtype))
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
        if self.by_products and height * width >= channels:
            weight = RESHAPE(CAST(self.weight, x.dtype), (1, self.out_channels, channels))
            y = _ROWS(RESHAPE(x, (batch, channels, -1)), _JOIN((weight,) * batch))
            y = RESHAPE(y, (-1, self.out_channels))
            if self.bias is not None:
                y = _BIAS_ADD(y, CAST(self.bias, x.dtype))
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
                y = _BIAS_ADD(y, CAST(self.bias, x.dtype))
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
        # A product for each image; a Transpose takes as long on CPU, and see _GatheredExchange.
        self.by_products = kernel == 1 and on_cpu()
        self.conv = ops.Conv2D(out_channels, kernel, pad_mode="pad", pad=padding, stride=stride)
        self.bias_add = ops.BiasAdd()
        self.winograd = shared(winograd.Winograd)

    def construct(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return self.convolve(x, size)


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
        return RESHAPE(_BIAS_ADD(normalised * scale, bias), x.shape)


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
_ONES = ops.OnesLike()
_BATCH_NORM = ops.BatchNorm(is_training=False, epsilon=_EPS)


def channel_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(batch, channels, height, width), (channels,), (channels,), all float32 → x · scale + shift.

    As an inferring BatchNorm. On CPU a product whose factors differ in shape keeps two index tables
    of 16 bytes for each element, for as long as the graph lives: at the size of Stable Diffusion
    tens of gigabytes.
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
    BatchNorm wants running statistics of a parameter's kind elsewhere, so it is for CPU alone.
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


# Primitives: the functions around them do not compile within the backward pass of a backward pass.
_SOFTMAX, _CONCAT, _LAST_SUM = ops.Softmax(-1), ops.Concat(-1), ops.ReduceSum(keep_dims=True)


class ScaledDotProduct(nn.Cell):
    """softmax(q kᵀ / √d) v on (batch·heads, tokens, d); `causal` hides later tokens.

    With `upcast` the probabilities, and the gradients of q and k, are computed in float32, where
    the scores do not overflow.

    The backward pass computes the probabilities again instead of keeping them, and uses
    dS = P · (dP − Σ out·dout), with the sum as one more column of the product that gives dP.
    """

    def __init__(self, head_width: int, causal: bool = False, upcast: bool = False):
        super().__init__()
        self.scale = 1 / math.sqrt(head_width)
        self.causal = causal
        self.upcast = upcast
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.product = ops.BatchMatMul()
        self.product_transposed = ops.BatchMatMul(transpose_a=True)

    def probabilities(self, q: Tensor, k: Tensor) -> Tensor:
        if self.upcast:
            q, k = CAST(q, ms.float32), CAST(k, ms.float32)
        scores = self.scores(q * self.scale, k)
        if self.causal:
            tokens = q.shape[1]
            hidden = np.triu(np.full((1, tokens, tokens), -1e4, np.float32), 1)
            scores = scores + Tensor(hidden, scores.dtype)
        return _SOFTMAX(scores)

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.product(CAST(self.probabilities(q, k), v.dtype), v)

    def bprop(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = v.dtype
        p = self.probabilities(q, k)
        dv = self.product_transposed(CAST(p, dtype), dout)
        if p.dtype != dtype:
            q, k = CAST(q, p.dtype), CAST(k, p.dtype)
            v, dout = CAST(v, p.dtype), CAST(dout, p.dtype)
            out = self.product(p, v)
        with_sum = _CONCAT((dout, -_LAST_SUM(out * dout, -1))) * self.scale
        with_one = _CONCAT((v, _ONES(v[:, :, :1])))
        ds = p * self.scores(with_sum, with_one)
        dq, dk = self.product(ds, k), self.product_transposed(ds, q)
        return CAST(dq, dtype), CAST(dk, dtype), dv


class Exchange(nn.Cell):
    """(batch, n, m, width) → (batch, m, n, width)."""

    def construct(self, x: Tensor) -> Tensor:
        return TRANSPOSE(x, (0, 2, 1, 3))


@constexpr
def _exchanged(batch: int, n: int, m: int) -> Tensor:
    """(batch · n · m,) int32: in which order Exchange takes the rows."""
    rows = np.arange(batch * n * m, dtype=np.int32).reshape(batch, n, m)
    return Tensor(rows.transpose(0, 2, 1).ravel())


class _GatheredExchange(nn.Cell):
    """The same by rows. On CPU a Transpose goes element by element, four times as slow, and keeps a
    table of all elements for as long as the graph lives."""

    def exchange(self, x: Tensor) -> Tensor:
        batch, n, m, width = x.shape
        rows = _GATHER(RESHAPE(x, (-1, width)), _exchanged(batch, n, m), 0)
        return RESHAPE(rows, (batch, m, n, width))

    def construct(self, x: Tensor) -> Tensor:
        return self.exchange(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        return (self.exchange(dout),)


class MultiHead(nn.Cell):
    """Splits (batch, tokens, heads·d) into heads, attends, and joins them again."""

    def __init__(self, width: int, heads: int, causal: bool = False, upcast: bool = False):
        super().__init__()
        self.width = width
        self.heads = heads
        self.head_width = width // heads
        self.attend = shared(ScaledDotProduct, self.head_width, causal, upcast)
        self.exchange = shared(_GatheredExchange if on_cpu() else Exchange)

    def split(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        x = self.exchange(RESHAPE(x, (batch, tokens, self.heads, self.head_width)))
        return RESHAPE(x, (-1, tokens, self.head_width))

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, tokens, width = q.shape
        out = self.attend(self.split(q), self.split(k), self.split(v))
        out = self.exchange(RESHAPE(out, (batch, self.heads, tokens, self.head_width)))
        return RESHAPE(out, (batch, tokens, width))


class FlashAttention(nn.Cell):
    """MultiHead as one fused operator, which never holds the matrix of all scores (Dao et al.,
    2022); in float16 and bfloat16, on Atlas A2 devices and newer.

    It wants heads whose width is a multiple of 16, and gets them: zeros change neither the scores
    nor the other columns.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.head_width = width // heads
        self.scale = 1 / math.sqrt(self.head_width)
        self.pad = ops.Pad(((0, 0), (0, 0), (0, 0), (0, -self.head_width % 16)))

    def split(self, x: Tensor) -> Tensor:
        """(batch, tokens, heads·d) → (batch, tokens, heads, d and zeros)."""
        return self.pad(RESHAPE(x, (x.shape[0], x.shape[1], self.heads, self.head_width)))

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, tokens, width = q.shape
        out = ops.flash_attention_score(
            self.split(q),
            self.split(k),
            self.split(v),
            self.heads,
            scalar_value=self.scale,
            input_layout="BSND",
        )
        out = _SLICE(out, (0, 0, 0, 0), (batch, tokens, self.heads, self.head_width))
        return RESHAPE(out, (batch, tokens, width))


def upsample_nearest(x: Tensor) -> Tensor:
    """(batch, channels, h, w) → (batch, channels, 2h, 2w) by repetition.

    Columns by a product with a matrix of ones and zeros, rows by joining: BroadcastTo, and the sum
    that is its backward pass, take longer on CPU.
    """
    batch, channels, height, width = x.shape
    twice = Tensor(np.repeat(np.eye(width, dtype=np.float32), 2, 1), x.dtype)
    rows = _PRODUCT(RESHAPE(x, (-1, width)), twice)
    rows = RESHAPE(rows, (-1, 2 * width))
    return RESHAPE(_CONCAT((rows, rows)), (batch, channels, 2 * height, 2 * width))


def name_parameters(network: nn.Cell) -> nn.Cell:
    """Give every parameter its path inside `network` as its name, as weight files do."""
    for name, parameter in network.parameters_and_names():
        parameter.name = name
    return network


def count_parameters(network: nn.Cell) -> int:
    """The number of scalars in all parameters of `network`."""
    return sum(math.prod(parameter.shape) for parameter in network.get_parameters())


__all__ = [
    "AddToChannels",
    "Conv2d",
    "Convolving",
    "Embedding",
    "FlashAttention",
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
