"""What the workers write while they run: events, a line each, and one file per error."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RankError:
    """The file `errors/rank_<id>.json` of a rank that failed."""

    rank_id: int
    type: str
    message: str
    user: bool
    """The input is to blame; the message is one sentence for the user."""
    traceback: str


def new_events(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The events from `offset` bytes on, and the offset to read from next time.

    A last line that is still being written is left for the next time; so is a missing file.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    complete = data[: data.rfind(b"\n") + 1]
    return [json.loads(line) for line in complete.splitlines()], offset + len(complete)


def record(attempt: Path, event: str, **values: Any) -> None:
    """Add what the launcher has seen to the events of an attempt."""
    line = json.dumps({"event": event, **values, "time": time.time()})
    with contextlib.suppress(OSError), (attempt / "events.jsonl").open("a") as file:
        file.write(line + "\n")


def trained_seconds(attempt: Path) -> float:
    """Seconds from the first step of an attempt to its last."""
    events, _ = new_events(attempt / "events.jsonl", 0)
    times = [event["time"] for event in events if event["event"] == "step"]
    return times[-1] - times[0] if times else 0.0


def first_error(folder: Path) -> RankError | None:
    """The oldest error file: a rank that fails takes the others with it."""
    paths = sorted(folder.glob("rank_*.json"), key=lambda path: path.stat().st_mtime_ns)
    return RankError(**json.loads(paths[0].read_text(encoding="utf-8"))) if paths else None
