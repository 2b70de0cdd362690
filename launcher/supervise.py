"""Run an attempt's processes on this machine to their end: watch, report, leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType

from cluster import ports
from launcher import failures
from launcher.errors import Failure, Interrupted, RunFailed, Stopped
from launcher.events import first_error, new_events, record
from launcher.job import Start
from launcher.others import Ended, Others
from launcher.processes import RunProcesses, is_running
from launcher.progress import Progress
from launcher.watchdog import ENDED, Sign, Stragglers, hang, rank_of_process, read_signs

_POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0
"""So often signs of life are looked at, and told to node 0."""
_STOPPED_SECONDS = 3.0
"""The framework would end a run with a stopped process after 30 s; who stops one by hand to look
at it uses a debugger, which is another state."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def supervise(start: Start, progress: Progress, signals: Sequence[int], others: Others) -> None:
    """Run the attempt and return when it has ended well and, on node 0, its result is there.

    `signals` grows with each signal that this process receives. Raises RunFailed with the rank
    that failed first, Interrupted after a signal, Stopped if a worker was asked to end by somebody
    else, and Ended if node 0 wants it to. In every case no process of the attempt is left here.
    """
    processes = RunProcesses(start.command, start.environment, start.log)
    try:
        _Attempt(start, processes, progress, signals, others).watch()
    except RunFailed as failed:
        if start.node_rank == 0 and (start.attempt / "result.json").is_file():
            # All ranks had done their work, and agreed on it.
            progress.note(f"warning: {failed.failure.text}; this was after the end of training")
            return
        if start.node_rank == 0:
            others.tell({"abort": True})
        else:
            others.tell({"failure": failed.failure.as_dict()})
        failure = others.first_cause(failed.failure)
        if failure is failed.failure and _port_was_taken(start, processes):
            failure = failures.of_port(start.msrun.master_port)
        raise RunFailed(failure) from None
    finally:
        remaining = processes.kill_all()
        if remaining:
            progress.note(f"processes that the kernel did not end: {remaining}")


class _Attempt:
    """What is known of an attempt while it runs."""

    def __init__(
        self,
        start: Start,
        processes: RunProcesses,
        progress: Progress,
        signals: Sequence[int],
        others: Others,
    ):
        self.start = start
        self.processes = processes
        self.progress = progress
        self.signals = signals
        self.others = others
        self.stop_heard: int | None = None
        """The signal that another node received."""
        self._began = self._looked = time.monotonic()
        self._offset = 0
        self._elsewhere: dict[int, tuple[Sign, float]] = {}
        self._early: set[int] = set()
        """Ranks that were found to have ended before the run had, the last time."""
        self._stragglers = Stragglers(start.cluster.straggler_factor)

    def watch(self) -> None:
        """Until the attempt has ended; raises what `supervise` does."""
        while True:
            # Asked first, so that everything written before the end is seen below.
            msrun_exit = self.processes.msrun_exit()
            self._show()
            self._hear(0.0)
            if self.signals or self.stop_heard:
                self._stop()
            if failure := self._failure(msrun_exit):
                raise RunFailed(failure)
            if msrun_exit == 0:
                if saved := saved_text(self.start):
                    raise Stopped(f"a worker was asked to end; {saved}")
                return
            if time.monotonic() - self._looked >= _LOOK_SECONDS:
                self._look()
            self._hear(_POLL_SECONDS)

    def _show(self) -> None:
        """Show what rank 0 has written, if it is on this machine."""
        if self.start.node_rank == 0:
            path = self.start.attempt / "events.jsonl"
            found, self._offset = new_events(path, self._offset)
            for event in found:
                self.progress.show(event)

    def _hear(self, seconds: float) -> None:
        """Take what the other nodes say, the first of it within `seconds`."""
        while said := self.others.message(seconds):
            seconds = 0.0
            node_rank, message = said
            if message is None:
                raise RunFailed(failures.of_node(node_rank, self.others.host(node_rank)))
            if "failure" in message:
                raise RunFailed(Failure(**message["failure"]))
            if "end" in message or "abort" in message:
                raise Ended
            if "stop" in message:
                self.stop_heard = message["stop"]
            if "dump" in message:
                self.processes.dump_stacks()
            for rank_id, values in message.get("signs", {}).items():
                self._elsewhere[int(rank_id)] = Sign(**values), time.monotonic()

    def _look(self) -> None:
        """See to it that every rank makes progress; raises RunFailed if one does not."""
        now = self._looked = time.monotonic()
        if name := self.processes.stopped(_STOPPED_SECONDS):
            raise RunFailed(failures.of_stopped(name, _STOPPED_SECONDS))
        beats = self.start.attempt / "beats"
        signs = read_signs(beats, self.start.rank_ids, self._began, now)
        early = {
            rank_id
            for rank_id, sign in signs.items()
            if sign.phase != ENDED and sign.pid is not None and not is_running(sign.pid)
        }
        if early & self._early:  # what ended otherwise has been named in the meantime
            rank_id = min(early)
            log = self.start.attempt / "logs" / f"worker_{rank_id}.log"
            raise RunFailed(failures.of_early_end(rank_id, log))
        self._early = early
        if self.start.node_rank:
            own = {str(rank_id): asdict(sign) for rank_id, sign in signs.items()}
            self.others.tell({"signs": own})
            return
        for rank_id, (sign, heard) in self._elsewhere.items():
            signs[rank_id] = replace(sign, age=sign.age + now - heard)
        for text in self._stragglers.found(signs):
            record(self.start.attempt, "straggler", text=text)
            self.progress.note(f"warning: {text}")
        if found := hang(signs, self.start.cluster):
            self.others.tell({"dump": True})
            self.processes.dump_stacks()
            deadline = now + _LOOK_SECONDS
            while time.monotonic() < deadline:  # for the stacks to be written
                self._hear(_POLL_SECONDS)
            raise RunFailed(failures.of_hang(found, self.start.attempt))

    def _failure(self, msrun_exit: int | None) -> Failure | None:
        """What has gone wrong here; the first cause, as far as it can be told."""
        logs = self.start.attempt / "logs"
        if msrun_exit is not None and msrun_exit < 0:
            # Its workers were killed with it.
            return failures.of_exit("msrun", msrun_exit, self.start.log)
        bad_exit = self.processes.bad_exit()
        # After that: a rank writes its error file before it ends.
        if error := first_error(self.start.attempt / "errors"):
            return failures.of_rank(error, logs / f"worker_{error.rank_id}.log")
        if bad_exit and bad_exit.scheduler:
            return failures.of_exit("the scheduler", bad_exit.code, logs / "scheduler.log")
        if bad_exit:
            rank_id = bad_exit.rank_id
            if rank_id is None:
                beats = self.start.attempt / "beats"
                rank_id = rank_of_process(beats, self.start.rank_ids, bad_exit.pid)
            if rank_id is None:
                name = f"the worker with process id {bad_exit.pid}"
                return failures.of_exit(name, bad_exit.code, self.start.log)
            log = logs / f"worker_{rank_id}.log"
            return failures.of_exit(f"rank {rank_id}", bad_exit.code, log)
        if msrun_exit:
            return failures.of_exit("msrun", msrun_exit, self.start.log)
        if msrun_exit == 0 and self.start.node_rank == 0 and not _has_ended(self.start.attempt):
            return Failure(f"training ended without a result; see {logs}")
        return None

    def _stop(self) -> None:
        """Let the workers save and end by themselves; a second signal cuts it short.

        Returns if the signal came after the last step: what is done is published.
        """
        number = self.signals[0] if self.signals else self.stop_heard
        assert number is not None
        grace = self.start.cluster.grace_seconds
        self.progress.note(
            f"{signal.Signals(number).name} received: the workers save and end, within "
            f"{grace:g} s; once more ends them now"
        )
        if self.signals:
            self.others.tell({"stop": number})
        self.processes.terminate_workers()
        deadline = time.monotonic() + grace
        while self.processes.workers_running() and time.monotonic() < deadline:
            if len(self.signals) > 1:
                break
            time.sleep(_POLL_SECONDS)
        self._show()
        if not (self.start.attempt / "result.json").is_file():
            raise Interrupted(number, saved_text(self.start))
        if self.processes.msrun_exit() is None:
            self.processes.kill_all()


def saved_text(start: Start) -> str | None:
    """Where the run stopped and how it goes on; None if it did not stop with a checkpoint."""
    try:
        stopped = json.loads((start.attempt / "stopped.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if start.msrun.local_worker_num < start.msrun.worker_num:
        command = f"the same command on each node and --resume {start.folder}"
    else:
        command = f"lora-launch --devices {start.devices_option} --resume {start.folder}"
    return f"saved after step {stopped['step']} of {stopped['steps']}; go on with: {command}"


@contextmanager
def received_signals() -> Iterator[list[int]]:
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


def _has_ended(attempt: Path) -> bool:
    return (attempt / "result.json").is_file() or (attempt / "stopped.json").is_file()


def _port_was_taken(start: Start, processes: RunProcesses) -> bool:
    """Has somebody else the scheduler's port, now that no process of the attempt is left?"""
    if start.node_rank:
        return False
    processes.kill_all()
    with contextlib.suppress(OSError):
        return ports.is_taken(start.msrun.master_port, start.msrun.master_addr)
    return False
