"""Run a job's processes to their end: watch, report, and leave nothing behind."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from launcher.errors import Interrupted, RunFailed, Stopped
from launcher.events import RankError, first_error, new_events
from launcher.job import Job
from launcher.processes import RunProcesses
from launcher.progress import Progress

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 30.0
"""For the step under way and its checkpoint; a second signal cuts it short."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def supervise(job: Job, progress: Progress) -> None:
    """Start the job and return when msrun has ended well and the result is there.

    Raises RunFailed with the rank that failed first, Interrupted after a signal, or Stopped if a
    worker was asked to end by somebody else. In every case no process of the run is left.
    """
    logs = job.attempt / "logs"
    with _received_signals() as signals:
        processes = RunProcesses(job.command, job.environment, logs / "msrun.log")
        try:
            _watch(job, processes, progress, signals)
        finally:
            remaining = processes.kill_all()
            if remaining:
                progress.note(f"processes that the kernel did not end: {remaining}")


def _watch(job: Job, processes: RunProcesses, progress: Progress, signals: list[int]) -> None:
    events, offset = job.attempt / "events.jsonl", 0
    while True:
        # Asked first, so that everything written before the end is seen below.
        msrun_exit = processes.msrun_exit()
        found, offset = new_events(events, offset)
        for event in found:
            progress.show(event)
        if signals:
            _stop(processes, progress, signals)
            if (job.attempt / "result.json").is_file():
                return  # the signal came after the last step: what is done is published
            raise Interrupted(signals[0], saved_text(job))
        if failure := _failure(job.attempt, processes, msrun_exit):
            raise failure
        if msrun_exit == 0:
            if saved := saved_text(job):
                raise Stopped(f"a worker was asked to end; {saved}")
            return
        time.sleep(_POLL_SECONDS)


def _failure(attempt: Path, processes: RunProcesses, msrun_exit: int | None) -> RunFailed | None:
    """What has gone wrong, if anything has; the first cause, as far as it can be told."""
    logs = attempt / "logs"
    bad_exit = processes.bad_exit()
    # After that: a rank writes its error file before it ends.
    if error := first_error(attempt / "errors"):
        return rank_failure(error, logs / f"worker_{error.rank_id}.log")
    if bad_exit:
        member, code = bad_exit
        file = "scheduler.log" if member.rank_id is None else f"worker_{member.rank_id}.log"
        return RunFailed(exit_text(member.name, code, logs / file))
    if msrun_exit:
        return RunFailed(exit_text("msrun", msrun_exit, logs / "msrun.log"))
    ended = (attempt / "result.json").is_file() or (attempt / "stopped.json").is_file()
    if msrun_exit == 0 and not ended:
        return RunFailed(f"training ended without a result; see {logs}")
    return None


def saved_text(job: Job) -> str | None:
    """Where the run stopped and how it goes on; None if it did not stop with a checkpoint."""
    try:
        stopped = json.loads((job.attempt / "stopped.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return (
        f"saved after step {stopped['step']} of {stopped['steps']}; go on with: lora-launch "
        f"--devices {','.join(map(str, job.device_ids))} --resume {job.folder}"
    )


def rank_failure(error: RankError, log: Path) -> RunFailed:
    """The failure of a rank that could say what stopped it."""
    if error.user:
        return RunFailed(error.message, user=True)
    message = f"rank {error.rank_id} failed with {error.type}: {error.message}; see {log}"
    return RunFailed(message, traceback=error.traceback)


def exit_text(name: str, code: int, log: Path) -> str:
    """A process that ended without a word of its own, with the last line of its log."""
    if code < 0:
        number = signal.Signals(-code)
        ended = f"{name} was killed by signal {number.value} ({number.name})"
        if number == signal.SIGKILL:
            ended += ", as the kernel does when memory runs out"
        return f"{ended}; see {log}"
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        lines = []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    said = f" after writing {last!r}" if last else ""
    return f"{name} ended with exit code {code}{said}; see {log}"


def _stop(processes: RunProcesses, progress: Progress, signals: list[int]) -> None:
    """Let the workers end by themselves for a moment; a second signal cuts it short."""
    progress.note(f"{signal.Signals(signals[0]).name} received, ending the workers")
    processes.terminate_workers()
    deadline = time.monotonic() + _GRACE_SECONDS
    while processes.workers_running() and len(signals) == 1 and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


@contextmanager
def _received_signals() -> Iterator[list[int]]:
    """Collect the signals that would end this process, instead of ending."""
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, receive) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
