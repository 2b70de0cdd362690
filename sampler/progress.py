"""Progress of pictures on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_SECONDS = 15.0


@contextmanager
def shown(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """What it yields is told how many more are done; shows them a second and the time left."""
    begun = said = time.monotonic()
    done = first = 0

    def speed() -> float | None:
        """Done per second, after the first: that one waits for loading and compiling."""
        return (done - first) / max(1e-3, time.monotonic() - begun) if done > first else None

    def rate() -> str:
        found = speed()
        return f"{found:.2f} a second" if found else ""

    def count(more: int) -> None:
        nonlocal done, first, begun
        done += more
        if first == 0:
            first, begun = done, time.monotonic()

    if total == 0:
        yield lambda count: None
        return
    if not sys.stderr.isatty():

        def line(more: int) -> None:
            nonlocal said
            count(more)
            now = time.monotonic()
            if done >= total or now - said >= _LINE_SECONDS:
                said = now
                found = speed()
                left = f"{(total - done) / found:.0f} s left" if found and done < total else ""
                words = ", ".join(
                    text for text in (f"{done} of {total} {what}", rate(), left) if text
                )
                print(words, file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeLeft(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total, rate="")

        def advance(more: int) -> None:
            count(more)
            progress.update(task, completed=done, rate=rate())

        yield advance
