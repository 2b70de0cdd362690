"""Real msrun, real processes, a worker that trains nothing."""

from __future__ import annotations

import json
import re
import signal
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from registry.api import open_registry
from tests.launcher.launching import (
    END_SECONDS,
    START_SECONDS,
    Launch,
    end,
    member,
    of_run,
    training,
    until,
    workers,
)
from tests.launcher.namespaces import alone, run_alone


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
    assert "MS_CPU_COMM_OP_TIMEOUT=1860" in (attempt / "environment.txt").read_text()


MSRUN = "mindspore.parallel.cluster.run"


def test_rank_that_fails_before_it_met_the_others_is_named_with_its_traceback(
    start: Launch, config: Path, tmp_path: Path
) -> None:
    process = start("refuse", "--devices", "2", config)
    until(lambda: any(tmp_path.glob("runs/*/*/errors/rank_1.json")), process)
    ended = end(process, tmp_path)
    assert ended.exit_code == 1
    assert "error: rank 1 failed with RuntimeError: no memory for the table; see" in ended.err
    assert "worker_1.log" in ended.err
    assert 'raise RuntimeError("no memory for the table")' in ended.err


def test_input_to_blame_is_exit_code_2_and_never_tried_again(
    start: Launch, config: Path, tmp_path: Path
) -> None:
    process = start("blame", "--devices", "2", "--max-restarts", "3", config)
    until(lambda: any(tmp_path.glob("runs/*/*/errors/rank_1.json")), process)
    ended = end(process, tmp_path)
    assert ended.exit_code == 2
    assert "error: a.png: expected an image, found text" in ended.err
    assert "because the input is to blame" in ended.err
    assert len(list(tmp_path.glob("runs/*/attempt_*"))) == 1


@pytest.mark.parametrize(
    ("behaviour", "exit_code", "words"),
    [
        ("crash", 137, "rank 1 was killed by signal 9 (SIGKILL)"),
        ("desert", 1, "rank 1 ended with exit code 0 before the run had ended"),
        ("leave", 7, "rank 1 ended with exit code 7 after writing 'enough'"),
    ],
)
def test_rank_that_ends_without_a_word(
    start: Launch, config: Path, tmp_path: Path, behaviour: str, exit_code: int, words: str
) -> None:
    ended = end(start(behaviour, "--devices", "2", config), tmp_path)
    assert (ended.exit_code, f"error: {words}" in ended.err) == (exit_code, True), ended.err


@pytest.mark.parametrize(
    ("victim", "number", "exit_code", "words"),
    [
        (MSRUN, signal.SIGKILL, 137, "msrun was killed by signal 9 (SIGKILL)"),
        (MSRUN, signal.SIGTERM, 143, "msrun was killed by signal 15 (SIGTERM)"),
        ("MS_SCHED", signal.SIGKILL, 137, "the scheduler was killed by signal 9 (SIGKILL)"),
        ("MS_WORKER", signal.SIGSTOP, 1, "has been stopped (SIGSTOP) for 3 s"),
        (MSRUN, signal.SIGSTOP, 1, "msrun has been stopped (SIGSTOP) for 3 s"),
    ],
)
def test_signal_to_one_of_the_processes(
    start: Launch,
    config: Path,
    tmp_path: Path,
    victim: str,
    number: int,
    exit_code: int,
    words: str,
) -> None:
    process = start("wait", "--devices", "2", config)
    until(lambda: training(tmp_path), process)
    member(tmp_path, victim).send_signal(number)
    ended = end(process, tmp_path)
    assert (ended.exit_code, words in ended.err) == (exit_code, True), ended.err


def test_nothing_outlives_a_launcher_that_is_killed(
    start: Launch, config: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # Any other launch on this machine would end what this one leaves behind.
    if not alone():
        run_alone(request.node, tmp_path / "alone")
        return
    process = start("spawn", "--devices", "2", config)
    until(lambda: any(tmp_path.glob("runs/*/*/child")), process)
    (path,) = tmp_path.glob("runs/*/*/child")
    until(lambda: path.read_text() != "", process)
    child = psutil.Process(int(path.read_text()))
    of_it = of_run(tmp_path)
    process.kill()
    process.wait()
    psutil.wait_procs(of_it, timeout=END_SECONDS)
    assert of_run(tmp_path) == []
    # The kernel ends msrun, its scheduler and the workers; what a worker has started in a session
    # of its own stays, and the next launch ends it.
    assert child.is_running()
    following = start("refuse", "--devices", "2", config)
    _, err = following.communicate(timeout=START_SECONDS)
    words = "ended 1 processes that a lora-launch which was killed had left behind"
    assert words in err, (child, err)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_rank_that_hangs_is_named_with_the_place_where_it_is(
    start: Launch, config: Path, tmp_path: Path
) -> None:
    process = start("hang", "--devices", "2", "--set", "cluster.step_seconds=1", config)
    ended = end(process, tmp_path)
    assert ended.exit_code == 1
    assert "error: rank 1 has shown no sign of life for" in ended.err
    assert "while training (limit: cluster.step_seconds), in " in ended.err
    (stacks,) = tmp_path.glob("runs/*/*/stacks/rank_1.txt")
    assert "in read_slowly" in stacks.read_text()


def test_run_that_failed_goes_on_by_itself(start: Launch, config: Path, tmp_path: Path) -> None:
    process = start("crash,leave,succeed", "--devices", "2", "--max-restarts", "2", config)
    out, err = process.communicate(timeout=START_SECONDS)
    assert of_run(tmp_path) == []
    assert (process.returncode, out) == (0, "tiny@1\n"), err
    assert "starting again in 1 s" in err
    assert "starting again in 2 s" in err
    attempts = sorted(tmp_path.glob("runs/*/attempt_*"))
    assert [path.name for path in attempts] == ["attempt_1", "attempt_2", "attempt_3"]
    failures = [
        [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()][-1]
        for path in attempts[:2]
    ]
    assert [(f["event"], f["exit_code"]) for f in failures] == [("failure", 137), ("failure", 7)]
    ports = [
        re.findall(r"master_port=(\d+)", (path / "command.txt").read_text())[0] for path in attempts
    ]
    assert len(set(ports)) == 3


@pytest.mark.parametrize(
    ("behaviour", "restarts", "attempts", "reason"),
    [
        ("crash", "1", 2, "started again once already, which is what --max-restarts allows"),
        ("refuse", "9", 2, "not started again, because it is the same error as before"),
    ],
)
def test_run_that_fails_again(
    start: Launch,
    config: Path,
    tmp_path: Path,
    behaviour: str,
    restarts: str,
    attempts: int,
    reason: str,
) -> None:
    process = start(behaviour, "--devices", "2", "--max-restarts", restarts, config)
    _, err = process.communicate(timeout=START_SECONDS)
    assert process.returncode in (1, 137)
    assert reason in err
    assert len(list(tmp_path.glob("runs/*/attempt_*"))) == attempts


def test_port_that_is_stolen_is_replaced(start: Launch, config: Path, tmp_path: Path) -> None:
    process = start("succeed", "--devices", "2", config)
    commands: list[Path] = []

    def decided() -> bool:
        commands.extend(tmp_path.glob("runs/*/attempt_1/command.txt"))
        return bool(commands)

    until(decided, process)
    port = re.findall(r"master_port=(\d+)", commands[0].read_text())[0]
    with socket.create_server(("127.0.0.1", int(port))):
        out, err = process.communicate(timeout=START_SECONDS)
    assert (process.returncode, out) == (0, "tiny@1\n"), err
    assert f"port {port} was taken by another process before msrun's scheduler had it" in err
    assert "trying another one" in err


def test_second_launcher_on_a_run_is_refused(start: Launch, config: Path, tmp_path: Path) -> None:
    first = start("wait", "--devices", "2", config)
    until(lambda: training(tmp_path), first)
    (folder,) = tmp_path.glob("runs/tiny-*")
    second = start("wait", "--devices", "2", "--resume", folder)
    _, err = second.communicate(timeout=END_SECONDS)
    assert second.returncode == 2
    assert f"{folder}: process {first.pid} on " in err
    assert "is at work on this run; wait for it, or end it" in err
    assert first.poll() is None
    assert len(list(folder.glob("attempt_*"))) == 1


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_lets_the_workers_save_and_says_how_to_go_on(
    start: Launch, config: Path, tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    process = start("save", "--devices", "2", config)
    until(lambda: training(tmp_path), process)
    process.send_signal(number)
    ended = end(process, tmp_path)
    assert ended.exit_code == exit_code
    saved = f"interrupted by {number.name}; saved after step 4 of 10; go on with: lora-launch"
    assert saved in ended.err
    assert "--devices 2 --resume " in ended.err


def test_a_second_signal_ends_at_once(start: Launch, config: Path, tmp_path: Path) -> None:
    process = start("stubborn", "--devices", "2", "--set", "cluster.grace_seconds=900", config)
    until(lambda: training(tmp_path), process)
    lines: list[str] = []
    process.send_signal(signal.SIGTERM)
    while "once more ends them now" not in "".join(lines):
        lines.append(process.stderr.readline())
    process.send_signal(signal.SIGTERM)
    ended = end(process, tmp_path)
    assert ended.exit_code == 143
    assert "error: interrupted by SIGTERM; nothing was published" in ended.err


def test_the_grace_period_ends(start: Launch, config: Path, tmp_path: Path) -> None:
    process = start("stubborn", "--devices", "2", "--set", "cluster.grace_seconds=0.5", config)
    until(lambda: training(tmp_path), process)
    process.send_signal(signal.SIGTERM)
    assert end(process, tmp_path).exit_code == 143


def test_workers_that_somebody_else_ends_are_no_failure(
    start: Launch, config: Path, tmp_path: Path
) -> None:
    process = start("save", "--devices", "2", config)
    until(lambda: training(tmp_path), process)
    for worker in workers(tmp_path).values():
        worker.terminate()
    ended = end(process, tmp_path)
    assert ended.exit_code == 75
    assert "error: a worker was asked to end; saved after step 4 of 10" in ended.err


def test_workers_meet_over_an_encrypted_channel(
    start: Launch, config: Path, tmp_path: Path
) -> None:
    process = start("succeed", "--devices", "2", "--set", "cluster.tls=true", config)
    out, err = process.communicate(timeout=START_SECONDS)
    assert (process.returncode, out) == (0, "tiny@1\n"), err
    (attempt,) = tmp_path.glob("runs/*/attempt_1")
    assert "LORA_PS_CONTEXT=" in (attempt / "environment.txt").read_text()
    # The keys are of use to nobody once the run has ended.
    assert not (attempt / "tls").exists()
