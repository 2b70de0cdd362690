"""Optimizers over one flat vector of all trained parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from trainer.config import OptimizerConfig

_SLICE, _RESHAPE, _SUM = ops.Slice(), ops.Reshape(), ops.ReduceSum()
_STACK = ops.Stack(0)
_DIVIDE = ops.RealDiv()  # on CPU `/` keeps tables of all elements
_EACH = ops.HyperMap()  # a loop takes a hundredth of a second to compile, for each time around


def _put(parameter: Parameter, value: Tensor) -> Tensor:
    return ops.assign(parameter, value)


class Optimizer(nn.Cell):
    """What AdamW and Prodigy share: the flat view of the parameters, clipping, their average.

    All trained parameters are seen as one float32 vector, in the order given, so that a gradient
    is one vector to all-reduce, its norm one sum, and the update a handful of operators whatever
    the number of tensors. It is cut into parameters again by few operators if those of one shape
    lie side by side.

    `construct(gradient, learning_rate, ema_decay)` updates the parameters in place and returns
    (norm of the gradient before clipping, 1 or 0, learning rate in effect). A gradient that is
    not finite changes nothing, and the second number is then 0.
    """

    def __init__(self, parameters: Sequence[Parameter], options: OptimizerConfig):
        super().__init__(auto_prefix=False)
        # A tuple of its own kind, so that the parameters count as those of this cell: a compiled
        # graph that is read from disk finds by their names only the parameters of its cell.
        self.trained = ParameterTuple(parameters)
        self.sizes = [math.prod(parameter.shape) for parameter in parameters]
        self.size = sum(self.sizes)
        runs = [(shape, len(list(run))) for shape, run in groupby(p.shape for p in parameters)]
        self.stacks = tuple((count, *shape) for shape, count in runs)
        self.unstack = [ops.Unstack(0, count) for _, count in runs]
        self.betas = options.betas
        self.eps = options.eps
        self.weight_decay = options.weight_decay
        self.max_grad_norm = options.max_grad_norm
        self.average = _state("average", self.weights())
        self.moment1 = _state("moment1", np.zeros(self.size))
        self.moment2 = _state("moment2", np.zeros(self.size))
        # The moments of a constant gradient of 1, by which Adam corrects the bias of the others.
        self.corrections = _state("corrections", np.zeros(2))

    def weights(self) -> np.ndarray:
        """The trained parameters, (size,) float32."""
        return np.concatenate([parameter.asnumpy().ravel() for parameter in self.trained])

    def set_weights(self, weights: np.ndarray) -> None:
        """Put `weights` (size,) into the parameters."""
        for parameter, part in zip(self.trained, self.split(weights), strict=True):
            parameter.set_data(Tensor(part))

    def split(self, vector: np.ndarray) -> list[np.ndarray]:
        """A flat vector as arrays in the shapes of the parameters."""
        parts = np.split(vector, np.cumsum(self.sizes)[:-1])
        return [part.reshape(p.shape) for p, part in zip(self.trained, parts, strict=True)]

    def states(self) -> tuple[Parameter, ...]:
        """Everything beside the weights that the next update depends on."""
        return (self.average, self.moment1, self.moment2, self.corrections)

    def vectors(self) -> dict[str, np.ndarray]:
        """Weights and state, by name."""
        states = {state.name: state.asnumpy().copy() for state in self.states()}
        return {"weights": self.weights(), **states}

    def restore(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Put back what `vectors` gave."""
        self.set_weights(vectors["weights"])
        for state in self.states():
            state.set_data(Tensor(vectors[state.name]))

    def clipped(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient, zero where it is not finite, and clipped; its norm; 1 if it is finite."""
        norm = ops.sqrt(_SUM(gradient * gradient))
        keep = ops.isfinite(norm).astype(gradient.dtype)
        finite = ops.select(ops.isfinite(gradient), gradient, ops.zeros_like(gradient))
        clip = ops.minimum(self.max_grad_norm / (norm + 1e-6), ops.ones_like(norm))
        clip = ops.select(ops.isfinite(clip), clip, ops.zeros_like(clip))
        return finite * clip, norm, keep

    def corrected(self, share1: Tensor, share2: Tensor) -> tuple[Tensor, Tensor]:
        """1 − β₁ⁱ and 1 − β₂ⁱ after i updates, kept in float32 without cancellation."""
        correction1 = (1 - share1) * self.corrections[0] + share1
        correction2 = (1 - share2) * self.corrections[1] + share2
        ops.assign(self.corrections, ops.stack((correction1, correction2)))
        return correction1, correction2

    def read(self) -> Tensor:
        """The weights as one vector."""
        parts, first = (), 0
        for stack in self.stacks:
            parts += (_RESHAPE(_STACK(self.trained[first : first + stack[0]]), (-1,)),)
            first += stack[0]
        return ops.concat(parts)

    def write(self, weights: Tensor, share: Tensor) -> None:
        """Store the new weights, and `share` of them in their average."""
        ops.assign(self.average, (1 - share) * self.average + share * weights)
        values, start = (), 0
        for stack, unstack in zip(self.stacks, self.unstack):
            size = math.prod(stack)
            values += unstack(_RESHAPE(_SLICE(weights, (start,), (size,)), stack))
            start += size
        _EACH(_put, self.trained, values)


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter, 2019) with bias correction.

    `rates` (size,) multiplies the learning rate of each scalar, None is one rate for all.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        options: OptimizerConfig,
        rates: np.ndarray | None = None,
    ):
        super().__init__(parameters, options)
        self.rates = None if rates is None else _state("rates", rates)

    def construct(self, gradient: Tensor, learning_rate: Tensor, ema_decay: Tensor) -> Tensor:
        gradient, norm, keep = self.clipped(gradient)
        share1, share2 = keep * (1 - self.betas[0]), keep * (1 - self.betas[1])
        moment1 = (1 - share1) * self.moment1 + share1 * gradient
        moment2 = (1 - share2) * self.moment2 + share2 * gradient * gradient
        correction1, correction2 = self.corrected(share1, share2)
        # The first updates may all have been left out: then there is nothing to divide by.
        none = 1 - keep
        direction = _DIVIDE(moment1, correction1 + none)
        size = ops.sqrt(_DIVIDE(moment2, correction2 + none)) + self.eps
        direction = _DIVIDE(direction, size)
        weights = self.read()
        change = keep * learning_rate * (direction + self.weight_decay * weights)
        if self.rates is not None:
            change = change * self.rates
        weights = weights - change
        ops.assign(self.moment1, moment1)
        ops.assign(self.moment2, moment2)
        self.write(weights, keep * (1 - ema_decay))
        return ops.stack((norm, keep, learning_rate))


class Prodigy(Optimizer):
    """Prodigy (Mishchenko & Defazio, 2023): AdamW that estimates its own learning rate d.

    As the authors' `prodigyopt` with `use_bias_correction` and `safeguard_warmup`; the learning
    rate given is a factor of d.
    """

    FIRST = 1e-6
    """d before anything is known."""

    def __init__(self, parameters: Sequence[Parameter], options: OptimizerConfig):
        super().__init__(parameters, options)
        self.beta3 = math.sqrt(self.betas[1])
        self.start = _state("start", self.weights())
        self.gradients = _state("gradients", np.zeros(self.size))
        self.estimate = _state("estimate", np.array([self.FIRST, 0.0]))

    def states(self) -> tuple[Parameter, ...]:
        return (*super().states(), self.start, self.gradients, self.estimate)

    def construct(self, gradient: Tensor, learning_rate: Tensor, ema_decay: Tensor) -> Tensor:
        gradient, norm, keep = self.clipped(gradient)
        share1, share2 = keep * (1 - self.betas[0]), keep * (1 - self.betas[1])
        share3 = keep * (1 - self.beta3)
        correction1, correction2 = self.corrected(share1, share2)
        d, weights = self.estimate[0], self.read()
        rate = keep * d * learning_rate * ops.sqrt(correction2) / (correction1 + 1 - keep)
        relative = d / self.FIRST
        along = _SUM(gradient * (self.start - weights))
        numerator = (1 - share3) * self.estimate[1] + relative * rate * along
        gradients = (1 - share3) * self.gradients + keep * relative * d * gradient
        denominator = _SUM(ops.abs(gradients))
        found = numerator / ops.maximum(denominator, 1e-30 * ops.ones_like(denominator))
        new_d = ops.maximum(d, found)
        moment1 = (1 - share1) * self.moment1 + share1 * d * gradient
        moment2 = (1 - share2) * self.moment2 + share2 * d * d * gradient * gradient
        direction = _DIVIDE(moment1, ops.sqrt(moment2) + new_d * self.eps)
        weights = weights - rate * (direction + self.weight_decay * weights)
        ops.assign(self.moment1, moment1)
        ops.assign(self.moment2, moment2)
        ops.assign(self.gradients, gradients)
        ops.assign(self.estimate, ops.stack((new_d, numerator)))
        self.write(weights, keep * (1 - ema_decay))
        return ops.stack((norm, keep, rate))


def make_optimizer(
    trained: Mapping[str, Sequence[Parameter]], options: OptimizerConfig
) -> Optimizer:
    """The optimizer that the config asks for, over the parameters of each network."""
    parameters = [parameter for found in trained.values() for parameter in found]
    if options.name == "prodigy":
        return Prodigy(parameters, options)
    text = (options.text_encoder_learning_rate or options.peak) / options.peak
    factors = [
        (text if network == "text_encoder" else 1.0)
        * (options.lora_plus_ratio if parameter.name.endswith(".lora_up.weight") else 1.0)
        for network, found in trained.items()
        for parameter in found
    ]
    rates = np.repeat(factors, [parameter.size for parameter in parameters])
    return AdamW(parameters, options, rates if len(set(factors)) > 1 else None)


def _row(tensor: Tensor) -> Tensor:
    return _RESHAPE(tensor, (-1,))


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All tensors in one float32 vector."""
    return ops.concat(_EACH(_row, tensors))


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


def _state(name: str, values: np.ndarray) -> Parameter:
    return Parameter(Tensor(values.astype(np.float32)), name=name, requires_grad=False)
