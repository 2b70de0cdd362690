from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from launcher.cli import main
from launcher.status import (
    course_of,
    read_attempts,
    read_events,
    read_status,
    smoothed,
    status_text,
)
from tests.launcher.launching import Launch, end, training, until

PLAN = {
    "name": "tiny",
    "devices": 2,
    "steps": 10,
    "global_batch": 4,
    "start_step": 0,
    "epoch_samples": 4,
}
RESULT = {"steps": 10, "published_step": 4, "rank_digests": ["ab", "ab"]}


def step(number: int, **values: Any) -> dict[str, Any]:
    return {
        "event": "step",
        "step": number,
        "steps": 10,
        "images": 4 * number,
        "loss": 1 / number,
        "learning_rate": 1e-3,
        "gradient_norm": 0.5,
        "images_per_second": 20.0,
        "time": 1000.0 + number,
        **values,
    }


def write_attempt(
    run: Path, number: int, events: list[dict[str, Any]], start_step: int = 0, **files: Any
) -> Path:
    """An attempt's folder; `files` are JSON files by the stems of their names."""
    attempt = run / f"attempt_{number}"
    for name in ("beats", "logs"):
        (attempt / name).mkdir(parents=True)
    (attempt / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (attempt / "plan.json").write_text(json.dumps({**PLAN, "start_step": start_step}))
    for name, value in files.items():
        (attempt / f"{name}.json").write_text(json.dumps(value))
    return attempt


def write_beat(attempt: Path, rank_id: int, seconds_ago: float = 1.0) -> None:
    beat = {"pid": 1, "phase": "training", "mark": 3, "own": None}
    beat["time"] = time.monotonic() - seconds_ago
    path = attempt / "beats" / f"rank_{rank_id}"
    path.write_text(json.dumps(beat).ljust(160))
    os.utime(path, (time.time() - seconds_ago,) * 2)


@contextmanager
def held(run: Path, host: str = "") -> Iterator[None]:
    """As if a launcher were at work."""
    with (run / "node_0.lock").open("w") as file:
        file.write(f"process {os.getpid()} on {host or socket.gethostname()}\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_command(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_run_that_is_at_work(run: Path) -> None:
    events = [
        {"event": "phase", "phase": "training", "time": 1000.0},
        {"event": "validation", "step": 0, "loss": 2.0, "time": 1000.0},
        *map(step, range(1, 6)),
        {"event": "validation", "step": 2, "loss": 0.5, "time": 1002.5},
        {"event": "validation", "step": 4, "loss": 0.75, "time": 1004.5},
        {"event": "checkpoint", "step": 4, "bytes": 2_000_000, "seconds": 1.0, "time": 1004.0},
        {"event": "warning", "text": "the disk is nearly full", "time": 1004.0},
    ]
    attempt = write_attempt(run, 1, events)
    write_beat(attempt, 0)
    with held(run):
        found = read_status(run)
    assert (found.state, found.detail, found.step, found.steps) == ("running", "training", 5, 10)
    assert found.seconds_left == 1.0
    assert found.validation == {
        "step": 4,
        "loss": 0.75,
        "best_step": 2,
        "best": 0.5,
        "base": 2.0,
    }
    assert found.ranks[0].phase == "training"
    assert found.ranks[0].age_seconds == pytest.approx(1.0, abs=0.5)
    assert (found.ranks[1].phase, found.ranks[1].age_seconds) == ("not started", None)
    text = status_text(found, 1014.0)
    for words in (
        "tiny: running, training",
        "5 of 10",
        "0.7500 at step 4, best 0.5000 at step 2, 2.0000 before training",
        "20 images/s",
        "step 4, 10 s ago, 2.0 MB",
        "warning: the disk is nearly full",
    ):
        assert words in text


def test_age_of_a_sign_is_not_told_where_its_clock_is_another(run: Path) -> None:
    attempt = write_attempt(run, 1, [])
    write_beat(attempt, 0)
    os.utime(attempt / "beats" / "rank_0", (time.time() - 500,) * 2)
    assert read_status(run).ranks[0].age_seconds is None


def test_states(run: Path) -> None:
    failure = {"event": "failure", "text": "rank 1 was killed", "exit_code": 137, "time": 1.0}
    attempt = write_attempt(run, 1, [step(1)])
    with held(run):
        assert read_status(run).state == "running"
    found = read_status(run)
    assert (found.state, found.detail[:20]) == ("interrupted", "ended without a word")

    with (attempt / "events.jsonl").open("a") as file:
        file.write(json.dumps(failure) + "\n")
    assert (read_status(run).state, read_status(run).detail) == ("failed", "rank 1 was killed")
    with held(run):
        found = read_status(run)
    assert (found.state, found.detail) == ("waiting", "starts again after: rank 1 was killed")

    attempt = write_attempt(run, 2, [step(2)], 1, stopped={"step": 2, "steps": 10})
    found = read_status(run)
    assert (found.state, found.detail[:26]) == ("interrupted", "saved after step 2 of 10; ")
    assert found.warnings == ("rank 1 was killed",)

    (attempt / "stopped.json").unlink()
    (attempt / "result.json").write_text(json.dumps(RESULT))
    assert read_status(run).state == "finished"
    (attempt / "push.json").write_text("{}")
    found = read_status(run)
    assert (found.state, found.detail[:35]) == ("waiting", "trained, and still to be published;")
    with held(run):
        assert read_status(run).detail == "trained, is being published"
    (attempt / "published.json").write_text(json.dumps({"reference": "tiny@1"}))
    assert read_status(run).detail == "published as tiny@1"
    (attempt / "result.json").write_text(json.dumps({**RESULT, "rank_digests": ["ab", "cd"]}))
    assert read_status(run).state == "failed"


def test_launcher_that_has_let_go_of_the_lock_and_still_publishes(run: Path) -> None:
    write_attempt(run, 1, [step(1)], result=RESULT, push={})
    sleeper = subprocess.Popen([sys.executable, "-c", "input()", "lora-launch"], stdin=-1)
    try:
        (run / "node_0.lock").write_text(f"process {sleeper.pid} on {socket.gethostname()}\n")
        deadline = time.monotonic() + 20
        while read_status(run).state != "running":  # until it is that program
            assert time.monotonic() < deadline
        (run / "node_0.lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        os.utime(run / "node_0.lock", (1.0, 1.0))  # a process id that was given out again
        assert read_status(run).state == "waiting"
    finally:
        sleeper.communicate(b"\n")


def test_run_on_another_machine_is_judged_by_its_last_sign(run: Path) -> None:
    attempt = write_attempt(run, 1, [step(1)])
    (run / "node_0.lock").write_text("process 1 on another-machine\n")
    assert read_status(run).state == "running"
    os.utime(attempt / "events.jsonl", (1.0, 1.0))
    assert read_status(run).state == "interrupted"


def test_live_run_with_the_stand_in(start: Launch, config: Path, tmp_path: Path) -> None:
    process = start("save", "--devices", "2", config)
    until(lambda: training(tmp_path), process)
    (folder,) = (tmp_path / "runs").iterdir()
    values = json.loads(run_command("status", "--json", folder).stdout)
    assert (values["state"], values["phase"]) == ("running", "training")
    assert [rank["phase"] for rank in values["ranks"]] == ["training"] * 2
    assert all(0 <= rank["age_seconds"] < 30 for rank in values["ranks"])
    assert "Start worker process" in run_command("logs", folder).stdout
    process.send_signal(signal.SIGTERM)
    end(process, tmp_path)
    found = read_status(folder)
    assert (found.state, found.detail[:24]) == ("interrupted", "saved after step 4 of 10")


def test_steps_that_were_done_again_count_once(run: Path) -> None:
    write_attempt(run, 1, [*map(step, range(1, 8)), {"event": "validation", "step": 6, "loss": 1}])
    write_attempt(run, 2, [], 4)  # ended before its first step
    assert [event["step"] for event in course_of(read_attempts(run)).steps] == [*range(1, 8)]
    write_attempt(run, 3, [step(5, loss=9.0), step(6)], 4)
    course = course_of(read_attempts(run))
    assert [event["step"] for event in course.steps] == [*range(1, 7)]
    assert course.steps[4]["loss"] == 9.0
    assert course.validations == []


def test_lines_that_are_no_events(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "step"}\nnonsense\n[1]\n\xff\xfe\n\n{"event": "st')
    assert read_events(path) == ([{"event": "step"}], 3)
    assert read_events(tmp_path / "none") == ([], 0)


def test_smoothing_is_a_mean_without_bias() -> None:
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    found = smoothed([math.nan, 1.0, math.nan, 1.0])
    assert math.isnan(found[0])
    assert found[1:] == pytest.approx([1.0] * 3)


def test_loss_that_is_no_number(run: Path) -> None:
    write_attempt(run, 1, [step(1), step(2, loss=math.nan, images_per_second=0.0)])
    result = run_command("status", run)
    assert result.exit_code == 0
    assert "loss        not a number; 1.0000 on average before" in result.stdout
    assert "NaN" not in run_command("status", "--json", run).stdout


def test_folder_of_an_older_version(run: Path) -> None:
    (run / "attempt_1").mkdir()
    values = json.loads(run_command("status", "--json", run).stdout)
    assert (values["name"], values["state"], values["step"]) == ("run", "interrupted", 0)
    assert run_command("status", run).exit_code == 0


@pytest.mark.parametrize("command", ["status", "logs", "report"])
def test_bad_folders(run: Path, command: str) -> None:
    write_attempt(run, 1, [])
    (run / "file").touch()
    for path, words in (
        (run / "nowhere", "expected the folder of a run, found nothing"),
        (run / "file", "expected the folder of a run, found a file"),
        (run / "attempt_1", "found one of its attempts; name the folder above it"),
        (run / "attempt_1" / "logs", "found no attempt in it"),
    ):
        result = run_command(command, path)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {path}: ")
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["status", "logs", "report"])
def test_help_has_an_example(command: str) -> None:
    text = run_command(command, "--help").stdout
    assert f"lora-launch {command} " in text.partition("Example:")[2]
    assert f"{command} " in run_command("--help").stdout


def test_logs_of_the_newest_attempt(run: Path) -> None:
    write_attempt(run, 1, [])
    logs = write_attempt(run, 2, []) / "logs"
    for name in ("worker_10", "worker_2", "scheduler", "msrun"):
        (logs / f"{name}.log").write_text(f"{name} says\n")
    lines = run_command("logs", run).stdout.splitlines()
    assert [line for line in lines if line.startswith("==>")] == [
        f"==> attempt_2/{name}.log <==" for name in ("msrun", "scheduler", "worker_2", "worker_10")
    ]
    assert run_command("logs", run, "--rank", 10).stdout == "worker_10 says\n"
    result = run_command("logs", run, "--rank", 3)
    assert result.exit_code == 2
    assert "expected a log of rank 3, found those of rank 2, 10" in result.stderr


def test_logs_are_followed_into_the_next_attempt_until_the_run_ends(run: Path) -> None:
    log = write_attempt(run, 1, []) / "logs" / "worker_0.log"
    log.write_text("one\n")
    command = [sys.executable, "-m", "launcher.cli", "logs", "-f", "--rank", "0", str(run)]
    read: list[str] = []

    def until(text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in "".join(read):
            assert time.monotonic() < deadline, read
            time.sleep(0.05)

    with held(run):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        reader = threading.Thread(target=lambda: read.extend(process.stdout))
        reader.start()
        until("one\n")
        with log.open("a") as file:
            file.write("two\n")
        until("two\n")
        second = write_attempt(run, 2, []) / "logs" / "worker_0.log"
        second.write_text("three\n")
        until("three\n")
        assert process.poll() is None
    reader.join(timeout=60)
    assert process.wait(60) == 0
    assert "".join(read) == "one\ntwo\n\n==> attempt_2/worker_0.log <==\nthree\n"


def test_status_does_without_what_is_slow_to_import(run: Path) -> None:
    write_attempt(run, 1, [step(1)])
    script = (
        "import sys; from click.testing import CliRunner; from launcher.cli import main\n"
        "assert CliRunner().invoke(main, sys.argv[1:]).exit_code == 0\n"
        "print(*sys.modules)"
    )
    command = [sys.executable, "-c", script, "status", str(run)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"mindspore", "pydantic", "rich", "boto3", "numpy", "PIL"} & set(loaded)
