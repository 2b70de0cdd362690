"""Progress of a run on stderr: a view that stays on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from launcher.job import Start
from launcher.words import cache_text, remark, step_text
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


@contextmanager
def shown_progress(plan: Plan, start: Start) -> Iterator[Progress]:
    """The form of progress that suits stderr, on show until the block ends."""
    if sys.stderr.isatty():
        from launcher.screen import Screen

        screen = Screen(plan, start)
        with screen.live:
            yield screen
    else:
        yield Lines(plan)
