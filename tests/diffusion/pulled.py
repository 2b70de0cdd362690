"""A gradient by the input, of anything."""

from __future__ import annotations

from mindspore import Tensor, nn, ops


class Pulled(nn.Cell):
    """A function's output and the gradient of its product with `weights`, by its input."""

    def __init__(self, function: nn.Cell):
        super().__init__()
        self.function = function
        self.gradient = ops.GradOperation(sens_param=True)

    def construct(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(x), self.gradient(self.function)(x, weights)
