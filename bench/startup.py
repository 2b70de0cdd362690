"""How long it takes until all ranks have met: lora-launch beside bare msrun, in one run.

`python -m bench.startup` prints a table. Both start the same worker on 2 and on 8 CPU processes, in
turns; the clock stops when every rank has taken part in five all-reduces.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import tempfile
import time
from pathlib import Path

from bench import turns
from bench.failures import LONGEST, Event, Started, wait


def seconds(bare: bool, workers: int, folder: Path) -> float:
    """From the command to the last rank's fifth all-reduce."""
    begun = time.monotonic()
    started = Started(bare, Event("none"), folder, workers=workers)
    met = wait(lambda: started.at_work(workers), LONGEST)
    found = time.monotonic() - begun
    started.processes[0].send_signal(signal.SIGINT)
    started.processes[0].wait(LONGEST)
    started.end()
    if not met:
        raise SystemExit(f"{workers} workers had not met after {LONGEST} s")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    figures = []
    with tempfile.TemporaryDirectory() as name:
        for workers in (2, 8):
            found: dict[bool, list[float]] = {True: [], False: []}
            for number in range(rounds):
                for bare in found:
                    folder = Path(name) / f"{workers}-{number}-{bare}"
                    found[bare].append(seconds(bare, workers, folder))
            what = f"until {workers} workers have met"
            goal = 1 + 1 / statistics.median(found[True])  # a second more
            figures.append(turns.figure(what, found[False], found[True], "s", "bare msrun", goal))
    turns.show(figures)
    turns.keep(figures)


if __name__ == "__main__":
    main()
