"""What a rank tells the outside: a line of JSON per event, and one file per error."""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weights.files import atomic_path

_BEAT_BYTES = 160
"""Of one write, which a reader sees whole."""


class Events:
    """What a rank tells of itself while it runs.

    Rank 0 appends events to `events.jsonl` in the attempt's folder. Every rank keeps one line in
    `beats/rank_<id>`, written anew at every sign of life, by which the launcher of its node tells a
    rank that is at work from one that hangs.
    """

    def __init__(self, attempt: Path, rank_id: int):
        self.path = attempt / "events.jsonl" if rank_id == 0 else None
        (attempt / "beats").mkdir(exist_ok=True)
        self._beats = os.open(attempt / "beats" / f"rank_{rank_id}", os.O_WRONLY | os.O_CREAT)
        self._beat: dict[str, Any] = {
            "pid": os.getpid(),
            "phase": "starting",
            "mark": 0,
            "own": None,
        }

    def emit(self, event: str, **values: Any) -> None:
        """One line with the event's name, its values and the time in Unix seconds."""
        self.beat()
        if self.path is not None:
            line = json.dumps({"event": event, **values, "time": time.time()})
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def beat(self, **values: Any) -> None:
        """A sign of life. `mark` counts the places in the loop, so that the rank that is behind can
        be told; `own` is the seconds of its last step until it waited for the others."""
        self._beat |= values
        line = json.dumps({**self._beat, "time": time.monotonic()})
        with contextlib.suppress(OSError):  # a full disk
            os.pwrite(self._beats, line.ljust(_BEAT_BYTES).encode(), 0)

    def phase(self, name: str) -> None:
        """The run enters a phase ("loading base", "training", …)."""
        self.beat(phase=name)
        self.emit("phase", phase=name)

    def cache(self, kind: str) -> Callable[[int, int], None]:
        """What reports how many of the missing images or captions are cached by now."""
        started = time.monotonic()

        def report(done: int, total: int) -> None:
            seconds = time.monotonic() - started
            self.emit("cache", kind=kind, done=done, total=total, seconds=seconds)

        return report


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_error(attempt: Path, rank_id: int, error: BaseException) -> None:
    """`errors/rank_<id>.json`: what stopped this rank, and whether the user can mend it.

    Every error of bad input here is a ValueError of this project's own, with one sentence.
    """
    user = type(error).__module__.split(".")[0] in ("trainer", "diffusion", "weights")
    report = {
        "rank_id": rank_id,
        "type": type(error).__name__,
        "message": str(error),
        "user": user,
        "traceback": "".join(traceback.format_exception(error)),
    }
    write_json(attempt / "errors" / f"rank_{rank_id}.json", report)
