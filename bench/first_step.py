"""From `lora-launch` to the first step of the demo, with empty and with full caches.

    python -m bench.first_step [--devices 1]

The clock starts with the command and stops at the first step in events.jsonl. Full caches hold the
latents, the embeddings of captions and the compiled step.
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


def seconds(folder: Path, number: int, devices: int) -> float:
    """Of a run of two steps."""
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
    found = map(json.loads, events.read_text().splitlines())
    return float(next(event["time"] for event in found if event["event"] == "step") - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    found: dict[str, list[float]] = {"empty": [], "full": []}
    for number in range(given.rounds):
        with tempfile.TemporaryDirectory() as name:
            for place, times in enumerate(found.values()):
                times.append(seconds(Path(name), 2 * number + place, given.devices))
    figures = [
        turns.Figure(
            f"first step, {kind} caches, {given.devices} device(s)",
            statistics.median(times),
            GOALS[kind],
            "s",
            "the goal",
            1.0,
        )
        for kind, times in found.items()
    ]
    turns.show(figures)
    turns.keep(figures)


if __name__ == "__main__":
    main()
