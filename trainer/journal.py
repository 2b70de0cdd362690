"""What the steps came to: reported to the outside, counted, and looked at for trouble."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from mindspore import Tensor

from diffusion.images import DataError
from trainer.events import Events
from trainer.plan import Plan
from trainer.step import outcome
from trainer.telemetry import peak_memory

MOST_SKIPPED = 20
"""So many steps in a row without a finite gradient end the run."""


class DivergedError(DataError):
    """The loss is no longer a number, or the processes no longer hold the same weights."""


class Journal:
    """Takes each step's result when the next one is under way, so that the device never waits.

    Every process sees the same results in the same order, so all of them stop at the same step.
    """

    def __init__(self, plan: Plan, events: Events, seconds_before: float):
        self.plan = plan
        self.events = events
        self.seconds = seconds_before
        """Of training, over all attempts; without compiling, validating, drawing and saving."""
        self.skipped = 0
        """Steps that changed nothing because the gradient was not finite."""
        self.stop = False
        """A process was asked to stop; all of them do, after the same step."""
        self._skipped_in_a_row = 0
        self._pending: deque[tuple[int, Tensor]] = deque()
        self._counted = 0
        self._before = seconds_before
        self._since = time.monotonic()

    def add(self, number: int, result: Tensor, compiled: bool = False) -> None:
        """Step `number`, from 0, is under way; one that compiled first does not count for speed."""
        self._pending.append((number, result))
        self._counted += not compiled

    def settle(self, left: int) -> None:
        """Wait until no more than `left` steps are under way, and report the others.

        Raises DivergedError after too many steps without a finite gradient.
        """
        while len(self._pending) > left:
            self._report(*self._pending.popleft())

    @property
    def images_per_second(self) -> float:
        """Speed of this attempt's steps, but for those that compiled first."""
        elapsed = self.seconds - self._before
        done = self._counted - len(self._pending)
        return done * self.plan.global_batch / elapsed if elapsed > 0 else 0.0

    @contextmanager
    def apart(self, phase: str) -> Iterator[None]:
        """Do something between two steps, whose time is not that of training."""
        self.settle(0)
        self._tick()
        self.events.phase(phase)
        try:
            yield
        finally:
            self._since = time.monotonic()
        self.events.phase("training")

    def _tick(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._since
        self._since = now

    def _report(self, number: int, result: Tensor) -> None:
        found = outcome(result)
        self._tick()
        self.stop |= found.stop
        self._skipped_in_a_row = 0 if found.applied else self._skipped_in_a_row + 1
        self.skipped += not found.applied
        self.events.emit(
            "step",
            step=number + 1,
            steps=self.plan.steps,
            images=(number + 1) * self.plan.global_batch,
            loss=found.loss,
            gradient_norm=found.gradient_norm,
            learning_rate=found.learning_rate,
            loss_scale=found.loss_scale,
            skipped=not found.applied,
            images_per_second=self.images_per_second,
            memory_bytes=peak_memory(),
        )
        if self._skipped_in_a_row >= MOST_SKIPPED:
            raise DivergedError(
                f"loss or gradient were not finite for {self._skipped_in_a_row} steps in a row, up "
                f"to step {number + 1}; the last checkpoint is from before; use a smaller "
                "optimizer.learning_rate, or precision fp32"
            )
