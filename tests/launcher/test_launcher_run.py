"""Real msrun, real processes, a worker that trains nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import launcher
from registry.api import open_registry

Launch = Callable[..., "psutil.Popen"]

# How long a run may take to start on a busy machine, and to end when it should end at once.
START_SECONDS = 200
END_SECONDS = 20

# `lora-launch` as it is installed, but for the module that it starts on each device.
_LAUNCH = """
import functools, launcher.run
launcher.run.launch = functools.partial(launcher.run.launch, worker="stand_in_worker")
from launcher.cli import main
main()
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Launch]:
    """Start `lora-launch` with the stand-in worker; nothing that it started outlives the test."""
    root, here = Path(launcher.__file__).parents[1], Path(__file__).parent
    path = os.pathsep.join([str(root), str(here), os.environ.get("PYTHONPATH", "")])
    started: list[psutil.Popen] = []

    def begin(behaviour: str, *arguments: object) -> psutil.Popen:
        process = psutil.Popen(
            [sys.executable, "-c", _LAUNCH, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "STAND_IN": behaviour},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in [*started, *of_run(tmp_path)]:
        if process.is_running():
            process.kill()


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


def training(folder: Path) -> bool:
    return any('"training"' in path.read_text() for path in folder.glob("runs/*/*/events.jsonl"))


def workers(folder: Path) -> dict[int, psutil.Process]:
    """The workers by rank id."""
    found = {}
    for process in of_run(folder):
        environment = process.environ()
        if environment.get("MS_ROLE") == "MS_WORKER":
            found[int(environment["RANK_ID"])] = process
    return found


def test_success_is_published_with_scores_and_lineage(
    start: Launch, config: Path, tmp_path: Path
) -> None:
    process = start("succeed", "--devices", "2", "--json", config)
    out, err = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 0, err
    assert of_run(tmp_path) == []

    result = json.loads(out)
    assert result["version"] == "tiny@1"
    assert result["validation_loss"] == {"base": 0.5, "lora": 0.4}
    manifest = open_registry(str(tmp_path / "registry")).resolve("tiny@1")
    assert manifest.metrics == {"validation_loss": 0.4, "validation_loss_base": 0.5}
    lineage: dict[str, Any] = manifest.metadata
    assert lineage["base"]["digest"] == "cd" * 32
    assert lineage["config"]["lora"]["rank"] == 2
    assert lineage["plan"]["devices"] == 2

    for words in (
        "4 images a step, over all 2 devices = 2 × 2 at once × 1 accumulated",
        "61,448 bytes each step",
        "step 10 of 10: loss 0.1000, 20 images/s",
        "0.5000 → 0.4000 (-20.0%)",
        "equal on all 2 ranks",
    ):
        assert words in err
    attempt = Path(result["run_folder"]) / "attempt_1"
    logs = {path.name for path in (attempt / "logs").iterdir()}
    assert logs == {"msrun.log", "scheduler.log", "worker_0.log", "worker_1.log"}
    assert "--worker_num=2" in (attempt / "command.txt").read_text()
    assert "MS_CPU_COMM_OP_TIMEOUT=300" in (attempt / "environment.txt").read_text()


def test_rank_that_fails_before_it_met_the_others_is_named(
    start: Launch, config: Path, tmp_path: Path
) -> None:
    process = start("raise", "--devices", "2", "--debug", config)
    until(lambda: any(tmp_path.glob("runs/*/*/errors/rank_1.json")), process)
    out, err = process.communicate(timeout=END_SECONDS)
    assert of_run(tmp_path) == []
    assert process.returncode == 1
    assert out == ""
    assert "error: rank 1 failed with RuntimeError: no memory for the table; see" in err
    assert "worker_1.log" in err
    assert "Traceback (most recent call last): ..." in err
    assert not (tmp_path / "registry").exists()


def test_killed_worker_is_named_with_its_signal(
    start: Launch, config: Path, tmp_path: Path
) -> None:
    process = start("wait", "--devices", "2", config)
    until(lambda: training(tmp_path), process)
    workers(tmp_path)[1].kill()
    _, err = process.communicate(timeout=END_SECONDS)
    assert of_run(tmp_path) == []
    assert process.returncode == 1
    assert "error: rank 1 was killed by signal 9 (SIGKILL)" in err


def test_a_signal_lets_the_workers_save_and_says_how_to_go_on(
    start: Launch, config: Path, tmp_path: Path
) -> None:
    process = start("save", "--devices", "2", config)
    until(lambda: training(tmp_path), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=END_SECONDS)
    assert of_run(tmp_path) == []
    assert process.returncode == 143
    assert "interrupted by SIGTERM; saved after step 4 of 10; go on with: lora-launch" in err
    assert "--devices 0,1 --resume " in err


def test_workers_that_somebody_else_ends_are_no_failure(
    start: Launch, config: Path, tmp_path: Path
) -> None:
    process = start("save", "--devices", "2", config)
    until(lambda: training(tmp_path), process)
    for worker in workers(tmp_path).values():
        worker.terminate()
    _, err = process.communicate(timeout=END_SECONDS)
    assert of_run(tmp_path) == []
    assert process.returncode == 75
    assert "error: a worker was asked to end; saved after step 4 of 10" in err


def test_signal_ends_launcher_and_workers(start: Launch, config: Path, tmp_path: Path) -> None:
    process = start("wait", "--devices", "2", config)
    until(lambda: training(tmp_path), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=END_SECONDS)
    assert of_run(tmp_path) == []
    assert process.returncode == 143
    assert "error: interrupted by SIGTERM; nothing was published" in err
