"""What a rank tells the outside: a line of JSON per event, and one file per error."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weights.files import atomic_path


class Events:
    """Appends events to `events.jsonl` in the attempt's folder, on rank 0 only."""

    def __init__(self, attempt: Path, rank_id: int):
        self.path = attempt / "events.jsonl" if rank_id == 0 else None

    def emit(self, event: str, **values: Any) -> None:
        """One line with the event's name, its values and the time in Unix seconds."""
        if self.path is not None:
            line = json.dumps({"event": event, **values, "time": time.time()})
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def phase(self, name: str) -> None:
        """The run enters a phase ("loading base", "training", …)."""
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
