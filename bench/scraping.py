"""What it costs a run to be scraped every second: step times with and without, in turns.

    python -m bench.scraping [--rounds 6] [--seconds 20]

One run of the demo on two processes goes on all the time; periods in which its endpoint is read
every second take turns with periods in which nobody asks.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

from bench import turns


def begin(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """A run that goes on until it is told to end."""
    settings = (
        *(f"output={folder}", "registry=null", "epochs=null", "images=1600000"),
        *("validate_every=null", "samples=null", "evaluation=null", "save_every=100000"),
    )
    words = [part for setting in settings for part in ("--set", setting)]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "launcher.cli", "--devices", "2", "--metrics-port", "0"),
            *words,
            "configs/runs/emoji-ink.yaml",
        ],
        stderr=log.open("wb"),
        stdout=subprocess.DEVNULL,
        cwd=turns.ROOT,
        env={**os.environ, "PYTHONPATH": str(turns.ROOT)},
    )


def step_times(folder: Path) -> list[float]:
    """When each step was told."""
    (events,) = folder.glob("*/attempt_1/events.jsonl")
    found = map(json.loads, events.read_text().splitlines())
    return [event["time"] for event in found if event["event"] == "step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name) / "runs", Path(name) / "log"
        run = begin(folder, log)
        while not list(folder.glob("*/attempt_1/events.jsonl")) or len(step_times(folder)) < 20:
            if run.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.5)
        url = log.read_text().partition("metrics at ")[2].split()[0]
        periods: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        took = []
        for _ in range(given.rounds):
            for scraped, found in periods.items():
                begun = time.time()
                while time.time() - begun < given.seconds:
                    if scraped:
                        asked = time.monotonic()
                        urlopen(url).read()
                        took.append(time.monotonic() - asked)
                    time.sleep(1)
                found.append((begun, time.time()))
        times = step_times(folder)
        run.send_signal(signal.SIGTERM)
        run.wait()

    def seconds(first: float, last: float) -> float:
        inside = [moment for moment in times if first <= moment <= last]
        return (inside[-1] - inside[0]) / (len(inside) - 1)

    with_, without = ([seconds(*one) for one in periods[kind]] for kind in (True, False))
    figures = [turns.figure("step, scraped each second", with_, without, "s", "not scraped", 1.01)]
    turns.show(figures)
    turns.keep(figures)
    print(f"a scrape takes {1000 * statistics.median(took):.1f} ms")


if __name__ == "__main__":
    main()
