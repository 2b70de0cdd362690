"""Recomputation: a block keeps its inputs alone, and its forward pass runs again in the backward.

`Cell.recompute` of MindSpore 2.10 costs the same time, but on CPU the memory stays as it was.
"""

from __future__ import annotations

from mindspore import ParameterTuple, Tensor, nn, ops

_CONCAT = ops.Concat(0)


class Recomputed(nn.Cell):
    """A block of two inputs, (x, context) → y; its parameters keep their names.

    Which of them are trained must be settled before. The graph compiler gives no gradient to the
    parameters inside of a backward pass of one's own, so they go in as one more input: a vector
    that the forward pass does not look at.
    """

    def __init__(self, block: nn.Cell):
        super().__init__(auto_prefix=False)
        self.trained = ParameterTuple([p for p in block.get_parameters() if p.requires_grad])
        self.has_trained = len(self.trained) > 0
        self.block = _Trained(block, self.trained) if self.has_trained else _Frozen(block)

    def construct(self, x: Tensor, context: Tensor) -> Tensor:
        if self.has_trained:
            vector = _CONCAT([parameter.reshape(-1) for parameter in self.trained])
            return self.block(x, context, vector)
        return self.block(x, context)


class _Trained(nn.Cell):
    def __init__(self, block: nn.Cell, trained: ParameterTuple):
        super().__init__(auto_prefix=False)
        self.block = block
        gradient = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)
        self.gradient = gradient(block, trained)

    def construct(self, x: Tensor, context: Tensor, trained: Tensor) -> Tensor:
        return self.block(x, context)

    def bprop(
        self, x: Tensor, context: Tensor, trained: Tensor, out: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Only after dout, or the compiler would find these values in the forward pass.
        inputs, parameters = self.gradient(ops.depend(x, dout), context, dout)
        vector = _CONCAT([gradient.reshape(-1) for gradient in parameters])
        return inputs[0], inputs[1], vector


class _Frozen(nn.Cell):
    def __init__(self, block: nn.Cell):
        super().__init__(auto_prefix=False)
        self.block = block
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)(block)

    def construct(self, x: Tensor, context: Tensor) -> Tensor:
        return self.block(x, context)

    def bprop(self, x: Tensor, context: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self.gradient(ops.depend(x, dout), context, dout)
        return inputs[0], inputs[1]
