"""Scaled dot-product attention by heads (Vaswani et al., 2017), and what computes it where.

It carries a backward pass of its own: MindSpore's built-in one is several times slower on CPU.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops.primitive import constexpr

from diffusion.layers import CAST, CONCAT, RESHAPE, TRANSPOSE, on_cpu, shared

_SLICE, _GATHER, _JOIN = ops.Slice(), ops.Gather(), ops.Concat(0)
# Primitives: the functions around them do not compile within the backward pass of a backward pass.
_ONES, _SOFTMAX, _LAST_SUM = ops.OnesLike(), ops.Softmax(-1), ops.ReduceSum(keep_dims=True)


class ScaledDotProduct(nn.Cell):
    """softmax(q kᵀ / √d) v on (batch·heads, tokens, d); `causal` hides later tokens.

    With `upcast` the probabilities, and the gradients of q and k, are computed in float32, where
    the scores do not overflow.

    The backward pass asks for the probabilities again, which the compiler on CPU takes from the
    forward pass where it finds them, and uses dS = P · (dP − Σ out·dout) / √d, with the sum as one
    more column of the product that gives dP.
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
        with_sum = CONCAT((dout, -_LAST_SUM(out * dout, -1))) * self.scale
        with_one = CONCAT((v, _ONES(v[:, :, :1])))
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


_SLICE_OF_SCORES = 2**22  # 16 MB


@constexpr
def slices(rows: int, tokens: int, context: int) -> int:
    """In how many equal parts the heads of a batch, `rows`, attend one after the other: on CPU a
    matrix of scores that fits the cache is up to a quarter faster, forward and back."""
    parts = [n for n in range(1, rows + 1) if rows % n == 0]
    small = [n for n in parts if rows // n * tokens * context <= _SLICE_OF_SCORES]
    return small[0] if small else rows


class MultiHead(nn.Cell):
    """Splits (batch, tokens, heads·d) into heads, attends, and joins them again."""

    def __init__(self, width: int, heads: int, causal: bool = False, upcast: bool = False):
        super().__init__()
        self.width = width
        self.heads = heads
        self.head_width = width // heads
        self.attend = shared(ScaledDotProduct, self.head_width, causal, upcast)
        self.exchange = shared(_GatheredExchange if on_cpu() else Exchange)
        self.in_slices = on_cpu()

    def split(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        x = self.exchange(RESHAPE(x, (batch, tokens, self.heads, self.head_width)))
        return RESHAPE(x, (-1, tokens, self.head_width))

    def attend_in_slices(self, q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
        cut = ops.Split(0, count)
        qs, ks, vs = cut(q), cut(k), cut(v)
        outs = ()
        for i in range(count):
            outs = outs + (self.attend(qs[i], ks[i], vs[i]),)
        return _JOIN(outs)

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, tokens, width = q.shape
        q, k, v = self.split(q), self.split(k), self.split(v)
        count = slices(q.shape[0], tokens, k.shape[1]) if self.in_slices else 1
        if count == 1:
            out = self.attend(q, k, v)
        else:
            out = self.attend_in_slices(q, k, v, count)
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
