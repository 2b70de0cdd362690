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
    begun = time.monotonic()
    done = 0

    def rate() -> str:
        return f"{done / max(1e-3, time.monotonic() - begun):.2f} a second"

    if total == 0:
        yield lambda count: None
        return
    if not sys.stderr.isatty():
        said = begun

        def line(count: int) -> None:
            nonlocal done, said
            done += count
            now = time.monotonic()
            if done >= total or now - said >= _LINE_SECONDS:
                said = now
                left = (now - begun) / max(1, done) * (total - done)
                words = f", {left:.0f} s left" if done < total else ""
                print(f"{done} of {total} {what}, {rate()}{words}", file=sys.stderr, flush=True)

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

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress.update(task, completed=done, rate=rate())

        yield advance
