"""One optimizer step as one compiled graph: forward, backward, all-reduce, clip, update."""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from trainer.batches import Batch
from trainer.optimizer import FlatAdamW, flatten


class DiffusionLoss(nn.Cell):
    """Weighted mean squared error of the prediction, in float32: mean over C, H, W, then batch.

    With a text encoder `text` is token ids, without one hidden states.
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
        return ((error * error).mean((1, 2, 3)) * weights).mean()


class Gradient(nn.Cell):
    """The gradient of all trained parameters and the loss, in one flat vector."""

    def __init__(self, loss: DiffusionLoss, trained: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        self.loss = loss
        self.value_and_grad = ops.value_and_grad(loss, None, ms.ParameterTuple(trained))

    def construct(self, *batch: Tensor) -> Tensor:
        loss, gradients = self.value_and_grad(*batch)
        return ops.concat((flatten(gradients), loss.reshape(1)))


class Accumulate(nn.Cell):
    """Adds a micro-batch's vector to a buffer."""

    def __init__(self, gradient: Gradient, buffer: Parameter):
        super().__init__(auto_prefix=False)
        self.gradient = gradient
        self.buffer = buffer

    def construct(self, *batch: Tensor) -> Tensor:
        return ops.assign_add(self.buffer, self.gradient(*batch))


class Update(nn.Cell):
    """The last micro-batch of a step: adds the buffer, all-reduces once, clips and updates.

    The one vector that the processes exchange holds the gradient and, last, the loss.
    """

    def __init__(
        self,
        gradient: Gradient,
        optimizer: FlatAdamW,
        buffer: Parameter | None,
        micro_batches: int,
        world_size: int,
    ):
        super().__init__(auto_prefix=False)
        self.gradient = gradient
        self.optimizer = optimizer
        self.buffer = buffer
        self.micro_batches = micro_batches * world_size
        self.all_reduce = ops.AllReduce() if world_size > 1 else None

    def construct(self, scalars: Tensor, *batch: Tensor) -> Tensor:
        """`scalars`: learning rate, 1 − β₁ⁱ, 1 − β₂ⁱ, EMA decay. Returns (loss, gradient norm)."""
        vector = self.gradient(*batch)
        if self.buffer is not None:
            vector = vector + self.buffer
            ops.assign(self.buffer, ops.zeros_like(self.buffer))
        if self.all_reduce is not None:
            vector = self.all_reduce(vector)
        vector = vector / self.micro_batches
        norm = self.optimizer(vector[:-1], scalars[0], scalars[1], scalars[2], scalars[3])
        return ops.stack((vector[-1], norm))


class TrainStep:
    """Runs the micro-batches of one optimizer step; compiles on first use."""

    def __init__(
        self,
        loss: DiffusionLoss,
        optimizer: FlatAdamW,
        masks: Sequence[Parameter],
        accumulation: int,
        world_size: int,
    ):
        self.optimizer = optimizer
        self.masks = masks
        gradient = Gradient(loss, optimizer.trained)
        self.synced_bytes = 4 * (optimizer.size + 1)
        buffer = None
        if accumulation > 1:
            zeros = np.zeros(optimizer.size + 1, np.float32)
            buffer = Parameter(Tensor(zeros), name="accumulated", requires_grad=False)
        self.accumulate = Accumulate(gradient, buffer) if accumulation > 1 else None
        self.update = Update(gradient, optimizer, buffer, accumulation, world_size)
        self.update.set_train()

    def __call__(
        self, batches: Sequence[Batch], step: int, learning_rate: float, ema_decay: float
    ) -> Tensor:
        """Step number `step`, counted from 1. Returns (mean loss, gradient norm) of all devices."""
        for batch in batches[:-1]:
            self.accumulate(*self._inputs(batch))
        scalars = (learning_rate, *self.optimizer.corrections(step), ema_decay)
        return self.update(Tensor(scalars, ms.float32), *self._inputs(batches[-1]))

    def _inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        if batch.masks is not None:
            for mask, values in zip(self.masks, batch.masks, strict=True):
                mask.set_data(Tensor(values))
        arrays = (batch.noisy, batch.timesteps, batch.text, batch.target, batch.weights)
        return tuple(Tensor(array) for array in arrays)
