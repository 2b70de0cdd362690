"""One optimizer step as two compiled graphs: the gradient, then all-reduce, clip and update.

The second graph is small. It is one of its own so that a rank can tell how long its own work took,
which nobody can once it waits for the others, and so that accumulation is nothing special.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from diffusion.layers import Network
from trainer.batches import Batch
from trainer.optimizer import Optimizer, flatten

_MEAN, _SLICE = ops.ReduceMean(), ops.Slice()  # slices in brackets take seconds to compile
_DIVIDE = ops.RealDiv()  # on CPU `/` keeps tables of all elements
FIRST_SCALE = 65536.0
GROW_AFTER = 2000
"""The loss scale doubles after so many steps without overflow, and halves at each overflow."""


class DiffusionLoss(Network):
    """Weighted squared error of each sample's prediction (batch,), in float32: mean over C, H, W.

    With a text encoder `text` is token ids, without one hidden states; `weights` has the shape of
    `target`, so that a sample, a timestep and a part of the picture can each count differently.
    """

    def __init__(self, unet: nn.Cell, text_encoder: nn.Cell | None):
        super().__init__(auto_prefix=False)
        self.unet = unet
        self.text_encoder = text_encoder

    def construct(
        self, noisy: Tensor, timesteps: Tensor, text: Tensor, target: Tensor, weights: Tensor
    ) -> Tensor:
        if self.text_encoder is not None:
            text = self.text_encoder(text)
        error = self.unet(noisy, timesteps, text) - target
        return _MEAN(error * error * weights, (1, 2, 3))


class _Scaled(nn.Cell):
    """The mean loss times the loss scale."""

    def __init__(self, loss: DiffusionLoss):
        super().__init__(auto_prefix=False)
        self.loss = loss

    def construct(self, scale: Tensor, *batch: Tensor) -> Tensor:
        return _MEAN(self.loss(*batch), ()) * scale


class Gradient(nn.Cell):
    """The gradient of all trained parameters and the loss, both scaled, and `stop` (1,), in one
    flat vector: all that the processes exchange."""

    def __init__(self, loss: DiffusionLoss, trained: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.scaled = _Scaled(loss)  # kept, so that `set_train` reaches the networks
        self.value_and_grad = ops.value_and_grad(self.scaled, None, ms.ParameterTuple(trained))

    def construct(self, scale: Tensor, stop: Tensor, *batch: Tensor) -> Tensor:
        loss, gradients = self.value_and_grad(scale, *batch)
        return ops.concat((flatten(gradients), loss.reshape(1), stop))


class Accumulate(Network):
    """Adds a micro-batch's vector to a buffer, and gives the buffer."""

    def __init__(self, gradient: Gradient, buffer: Parameter, scaling: Parameter):
        super().__init__(auto_prefix=False)
        self.gradient = gradient
        self.buffer = buffer
        self.scaling = scaling

    def construct(self, stop: Tensor, *batch: Tensor) -> Tensor:
        return ops.assign_add(self.buffer, self.gradient(self.scaling[0], stop, *batch))


class Update(Network):
    """The end of a step: one all-reduce, clipping, and the optimizer.

    `Accumulate` has gathered in `buffer` the one vector that the processes exchange. Whether the
    gradient overflowed is seen in its sum: infinity and NaN survive that.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        buffer: Parameter,
        scaling: Parameter,
        micro_batches: int,
        world_size: int,
    ):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.buffer = buffer
        self.scaling = scaling
        self.micro_batches = micro_batches * world_size
        self.all_reduce = ops.AllReduce() if world_size > 1 else None

    def construct(self, scalars: Tensor) -> Tensor:
        """`scalars`: learning rate, EMA decay, growth of the loss scale; see Outcome."""
        scale, size = self.scaling[0], self.optimizer.size
        vector = self.buffer
        if self.all_reduce is not None:
            vector = self.all_reduce(vector)
        gradient, loss = _SLICE(vector, (0,), (size,)), vector[size]
        count = self.micro_batches * scale
        norm, applied, rate = self.optimizer(_DIVIDE(gradient, count), scalars[0], scalars[1])
        # Overflow: half the scale, and count anew; long enough without: double, and count anew.
        good = applied * (self.scaling[1] + 1)
        grown = (good >= GROW_AFTER).astype(good.dtype)
        factor = (1 + grown) * (0.5 + 0.5 * applied)
        new_scale = scale + scalars[2] * (scale * factor - scale)
        ops.assign(self.scaling, ops.stack((new_scale, good * (1 - grown))))
        found = ops.stack((loss / count, norm, applied, rate, scale, vector[size + 1]))
        ops.assign(self.buffer, ops.depend(ops.zeros_like(self.buffer), found))
        return found


@dataclass(frozen=True)
class Outcome:
    """What one step came to, on all devices together."""

    loss: float
    gradient_norm: float
    applied: bool
    """False if loss or gradient were not finite: then nothing was changed."""
    learning_rate: float
    """In effect; with Prodigy the one that it found."""
    loss_scale: float
    stop: bool
    """A process was asked to stop."""


class TrainStep:
    """Runs the micro-batches of one optimizer step; compiles for each shape on first use."""

    def __init__(
        self,
        loss: DiffusionLoss,
        optimizer: Optimizer,
        masks: Sequence[Parameter],
        accumulation: int,
        world_size: int,
        scaled: bool = False,
    ):
        self.optimizer = optimizer
        self.masks = masks
        self.synced_bytes = 4 * (optimizer.size + 2)
        self.scaled = scaled
        first = FIRST_SCALE if scaled else 1.0
        self.scaling = Parameter(
            Tensor([first, 0.0], ms.float32), name="scaling", requires_grad=False
        )
        zeros = np.zeros(optimizer.size + 2, np.float32)
        buffer = Parameter(Tensor(zeros), name="accumulated", requires_grad=False)
        gradient = Gradient(loss, optimizer.trained)
        self._accumulate = Accumulate(gradient, buffer, self.scaling)
        self._accumulate.set_train()
        self._update = Update(optimizer, buffer, self.scaling, accumulation, world_size)
        self._update.set_train()

    def __call__(
        self,
        batches: Sequence[Batch],
        learning_rate: float,
        ema_decay: float = 0.0,
        stop: bool = False,
    ) -> Tensor:
        """Starts a whole step; `outcome` waits for it."""
        self.accumulate(batches, stop)
        return self.update(learning_rate, ema_decay)

    def accumulate(self, batches: Sequence[Batch], stop: bool = False) -> Tensor:
        """Starts this rank's own part of a step: the gradient of each micro-batch."""
        asked = Tensor([float(stop)], ms.float32)
        for batch in batches:
            gathered = self._accumulate(asked, *self._inputs(batch))
        return gathered

    def update(self, learning_rate: float, ema_decay: float = 0.0) -> Tensor:
        """Starts the part that the processes do together; `outcome` waits for it."""
        scalars = (learning_rate, ema_decay, float(self.scaled))
        return self._update(Tensor(scalars, ms.float32))

    def vectors(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on, by name, float32."""
        return {**self.optimizer.vectors(), "scaling": self.scaling.asnumpy().copy()}

    def restore(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Put back what `vectors` gave."""
        self.optimizer.restore(vectors)
        self.scaling.set_data(Tensor(vectors["scaling"]))

    def _inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        if batch.masks is not None:
            for mask, values in zip(self.masks, batch.masks, strict=True):
                mask.set_data(Tensor(values))
        arrays = (batch.noisy, batch.timesteps, batch.text, batch.target, batch.weights)
        return tuple(Tensor(array) for array in arrays)


def outcome(values: Tensor) -> Outcome:
    """What a step returned, once it is done."""
    loss, norm, applied, rate, scale, stop = (float(value) for value in values.asnumpy())
    return Outcome(loss, norm, applied == 1, rate, scale, stop > 0)
