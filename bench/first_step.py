"""From `lora-launch` to the first step of the demo, with empty and with full caches.

    python -m bench.first_step [--devices 1]

The clock starts with the command and stops at the first step in events.jsonl. Full caches hold the
latents, the embeddings of captions and the compiled step. What each phase of it takes is told too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import turns

GOALS = {"empty": 30.0, "full": 10.0}


def phases(folder: Path, number: int, devices: int) -> dict[str, float]:
    """Seconds of each phase of a run of two steps, until its first step is done."""
    runs = folder / f"runs{number}"
    settings = (
        *(f"output={runs}", f"cache={folder / 'cache'}", "registry=null", "epochs=null"),
        *("images=32", "validate_every=null", "data.validation=null", "samples=null"),
        "evaluation=null",
    )
    words = [part for setting in settings for part in ("--set", setting)]
    launch = [sys.executable, "-m", "launcher.cli", "--devices", str(devices), *words]
    begun = time.time()
    subprocess.run(
        [*launch, "configs/runs/emoji-ink.yaml"],
        check=True,
        cwd=turns.ROOT,
        env={**os.environ, "PYTHONPATH": str(turns.ROOT)},
        capture_output=True,
    )
    (events,) = runs.glob("*/attempt_1/events.jsonl")
    seconds, phase, since = {}, "until a rank is there", begun
    for event in map(json.loads, events.read_text().splitlines()):
        if event["event"] in ("phase", "step"):
            seconds[phase] = event["time"] - since
            phase, since = event.get("phase", ""), event["time"]
        if event["event"] == "step":
            break
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"empty": [], "full": []}
    for number in range(given.rounds):
        with tempfile.TemporaryDirectory() as name:
            for place, runs in enumerate(found.values()):
                runs.append(phases(Path(name), 2 * number + place, given.devices))
    figures = [
        turns.Figure(
            f"first step, {kind} caches, {given.devices} device(s)",
            statistics.median(sum(run.values()) for run in runs),
            GOALS[kind],
            "s",
            "the goal",
            1.0,
        )
        for kind, runs in found.items()
    ]
    for kind, runs in found.items():
        seconds = [sum(run.values()) for run in runs]
        compiling = [run["compiling"] for run in runs]
        name = f"compiling, {kind} caches, {given.devices} device(s)"
        figures.append(turns.figure(name, compiling, seconds, "s", "all until the first step"))
    print("| s, with caches that are | empty | full |\n|---|---|---|")
    for phase in found["empty"][0]:
        medians = (statistics.median(run[phase] for run in runs) for runs in found.values())
        print(f"| {phase} | {' | '.join(f'{seconds:.1f}' for seconds in medians)} |")
    turns.show(figures)
    turns.keep(figures)


if __name__ == "__main__":
    main()
