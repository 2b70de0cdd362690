"""AdamW over one flat vector of all trained parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from mindspore import Parameter, Tensor, nn, ops


class FlatAdamW(nn.Cell):
    """AdamW (Loshchilov & Hutter, 2019) with bias correction, and an average of the weights.

    All trained parameters are seen as one float32 vector, in the order given, so that a
    gradient is one vector to all-reduce, its norm one sum, and the update a handful of
    operators whatever the number of tensors.

    `construct(gradient, learning_rate, correction1, correction2, ema_decay)` clips the gradient
    to `max_grad_norm`, updates the parameters in place and returns the norm before clipping.
    The scalars are shape-() float32 tensors; `corrections(step)` gives the middle two.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_grad_norm: float,
    ):
        super().__init__(auto_prefix=False)
        self.trained = tuple(parameters)
        self.beta1, self.beta2 = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm
        self.sizes = [math.prod(parameter.shape) for parameter in parameters]
        self.size = sum(self.sizes)
        zeros = np.zeros(self.size, np.float32)
        self.moment1 = Parameter(Tensor(zeros), name="moment1", requires_grad=False)
        self.moment2 = Parameter(Tensor(zeros), name="moment2", requires_grad=False)
        start = np.concatenate([parameter.asnumpy().ravel() for parameter in parameters])
        self.average = Parameter(Tensor(start), name="average", requires_grad=False)

    def vectors(self) -> dict[str, np.ndarray]:
        """All that the next update depends on: weights, average and moments, (size,) each."""
        return {
            "weights": np.concatenate([p.asnumpy().ravel() for p in self.trained]),
            "average": self.average.asnumpy().copy(),
            "moment1": self.moment1.asnumpy().copy(),
            "moment2": self.moment2.asnumpy().copy(),
        }

    def restore(self, vectors: dict[str, np.ndarray]) -> None:
        """Put back what `vectors` gave."""
        parts = np.split(vectors["weights"], np.cumsum(self.sizes)[:-1])
        for parameter, part in zip(self.trained, parts):
            parameter.set_data(Tensor(part.reshape(parameter.shape)))
        self.average.set_data(Tensor(vectors["average"]))
        self.moment1.set_data(Tensor(vectors["moment1"]))
        self.moment2.set_data(Tensor(vectors["moment2"]))

    def corrections(self, step: int) -> tuple[float, float]:
        """1 − βⁱ for the `step`-th update, counted from 1."""
        return 1 - self.beta1**step, 1 - self.beta2**step

    def construct(
        self,
        gradient: Tensor,
        learning_rate: Tensor,
        correction1: Tensor,
        correction2: Tensor,
        ema_decay: Tensor,
    ) -> Tensor:
        norm = ops.sqrt((gradient * gradient).sum())
        gradient = gradient * ops.minimum(self.max_grad_norm / (norm + 1e-6), ops.ones_like(norm))
        moment1 = self.beta1 * self.moment1 + (1 - self.beta1) * gradient
        moment2 = self.beta2 * self.moment2 + (1 - self.beta2) * gradient * gradient
        direction = (moment1 / correction1) / (ops.sqrt(moment2 / correction2) + self.eps)
        weights = flatten(self.trained)
        weights = weights - learning_rate * (direction + self.weight_decay * weights)
        ops.assign(self.moment1, moment1)
        ops.assign(self.moment2, moment2)
        ops.assign(self.average, ema_decay * self.average + (1 - ema_decay) * weights)
        start = 0
        for i in range(len(self.trained)):
            part = weights[start : start + self.sizes[i]]
            ops.assign(self.trained[i], part.reshape(self.trained[i].shape))
            start += self.sizes[i]
        return norm


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All tensors in one float32 vector."""
    return ops.concat([tensor.reshape(-1) for tensor in tensors])


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """The rate of update `step` (from 0) of `steps`: linear warm-up, then the schedule to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    left = 1 - (step - warmup) / max(1, steps - warmup)
    return (
        peak
        * {
            "constant": 1.0,
            "linear": left,
            "polynomial": left**2,
            "cosine": 0.5 * (1 - math.cos(math.pi * left)),
        }[schedule]
    )
