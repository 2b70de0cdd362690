"""Real launches for tests: `lora-launch` with the stand-in worker, and what is left of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

Launch = Callable[..., "psutil.Popen"]

# How long a run may take to start on a busy machine, and to end when it should end at once.
START_SECONDS = 200
END_SECONDS = 20

# `lora-launch` as it is installed, but for the module that it starts on each device.
LAUNCH = """
import functools, launcher.run
launcher.run.launch = functools.partial(launcher.run.launch, worker="stand_in_worker")
from launcher.cli import main
main()
"""


def of_run(folder: Path) -> list[psutil.Process]:
    """The processes, of whatever parent, whose command names a run in `folder`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder / "runs") in part for part in process.info["cmdline"] or ()):
            found.append(process)
    return found


def until(condition: Callable[[], bool], process: psutil.Popen) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.05)


def training(folder: Path, ranks: int = 2) -> bool:
    """Do all ranks of a run train?"""
    beats = [path.read_text() for path in folder.glob("runs/*/*/beats/*")]
    return sum('"training"' in text for text in beats) == ranks


def workers(folder: Path) -> dict[int, psutil.Process]:
    """The workers by rank id."""
    found = {}
    for process in of_run(folder):
        environment = process.environ()
        if environment.get("MS_ROLE") == "MS_WORKER":
            found[int(environment["RANK_ID"])] = process
    return found


@dataclass(frozen=True)
class Ended:
    """How a launch ended, with nothing of it left running."""

    exit_code: int
    err: str
    seconds: float
    """Since the moment from which `end` was called."""


def end(process: psutil.Popen, folder: Path) -> Ended:
    begun = time.monotonic()
    out, err = process.communicate(timeout=END_SECONDS)
    assert of_run(folder) == []
    assert out == ""
    assert not (folder / "registry").exists()
    return Ended(process.returncode, err, time.monotonic() - begun)


def member(folder: Path, text: str) -> psutil.Process:
    """The process of a run whose command or role has this in it."""
    for process in of_run(folder):
        if text in (*process.cmdline(), process.environ().get("MS_ROLE")):
            return process
    raise AssertionError(f"no {text} among {of_run(folder)}")
