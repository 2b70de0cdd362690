"""Progress of a run on stderr: one bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from launcher.words import clock, step_text
from trainer.plan import Plan

_LINE_SECONDS = 15.0
_LINE_SHARE = 0.1


class Progress(Protocol):
    """Where a run's events are shown."""

    def show(self, event: Mapping[str, Any]) -> None:
        """Show one line of events.jsonl."""

    def note(self, text: str) -> None:
        """Show a sentence."""


class Lines:
    """A line for each phase and validation, and for every tenth of the work or 15 seconds."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._done = 0
        self._time = time.monotonic()

    def show(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "phase":
            self._done = 0
            self.note(event["phase"])
        elif text := remark(event):
            self.note(text)
        elif event["event"] == "cache" and self._due(event["done"], event["total"]):
            self.note(f"{event['done']:,} of {event['total']:,} {cache_text(event)}")
        elif event["event"] == "step" and self._due(event["step"], event["steps"]):
            self.note(
                f"step {event['step']} of {event['steps']}: "
                + step_text(event, self._plan.global_batch)
            )

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _due(self, done: int, total: int) -> bool:
        due = (
            done == total
            or done - self._done >= _LINE_SHARE * total
            or time.monotonic() - self._time >= _LINE_SECONDS
        )
        if due:
            self._done, self._time = done, time.monotonic()
        return due


class Bar:
    """One bar with the phase, loss, speed and time left; validation losses above it."""

    def __init__(self, plan: Plan):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._plan = plan
        self._step = plan.start_step
        self.rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._task = self.rich.add_task(
            "starting", total=plan.steps, completed=plan.start_step, text=""
        )

    def show(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "phase":
            self.rich.update(
                self._task,
                description=event["phase"],
                total=self._plan.steps,
                completed=self._step,
            )
        elif text := remark(event):
            self.note(text)
        elif event["event"] == "cache":
            self.rich.update(
                self._task,
                total=event["total"],
                completed=event["done"],
                text=cache_text(event),
            )
        elif event["event"] == "step":
            self._step = event["step"]
            text = step_text(event, self._plan.global_batch)
            self.rich.update(self._task, completed=event["step"], text=text)

    def note(self, text: str) -> None:
        self.rich.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def shown_progress(plan: Plan) -> Iterator[Progress]:
    """The form of progress that suits stderr, on show until the block ends."""
    if sys.stderr.isatty():
        bar = Bar(plan)
        with bar.rich:
            yield bar
    else:
        yield Lines(plan)


def cache_text(event: Mapping[str, Any]) -> str:
    """`images cached, 12.3 a second, 1:02 left`."""
    speed = event["done"] / max(event["seconds"], 1e-9)
    left = clock((event["total"] - event["done"]) / speed)
    return f"{event['kind']} cached, {speed:.3g} a second, {left} left"


def remark(event: Mapping[str, Any]) -> str | None:
    """What is said once about an event, such as `validation loss 0.1234 at step 0`."""
    if event["event"] == "validation":
        quarters = ", ".join(f"{part:.4f}" for part in event["quarters"])
        return (
            f"validation loss {event['loss']:.4f} at step {event['step']} "
            f"(by quarter of the timesteps: {quarters})"
        )
    if event["event"] == "warning":
        return f"warning: {event['text']}"
    return None
