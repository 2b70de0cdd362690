"""The processes of one run: msrun, its scheduler and workers, and all that these start."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_KILL_SECONDS = 10.0
_MSRUN_SECONDS = 2.0
"""It looks at its workers every second."""
_LAUNCHER = "LORA_LAUNCHER"
"""Variable that all processes of a run inherit: the launcher's id and the time it started."""
_LIBC = ctypes.CDLL(None, use_errno=True)
_NAMED_BY_MSRUN = re.compile(
    r"Worker process (?P<pid>\d+) exit with exception\. Error code: (?P<code>-?\d+)"
)


@dataclass(frozen=True)
class Member:
    """The scheduler or a worker."""

    process: psutil.Process
    rank_id: int | None
    """None for the scheduler."""

    @property
    def name(self) -> str:
        return "the scheduler" if self.rank_id is None else f"rank {self.rank_id}"


@dataclass(frozen=True)
class Exit:
    """How the scheduler or a worker has ended."""

    pid: int
    rank_id: int | None
    """None for the scheduler, and for a worker that was gone before it was seen."""
    code: int
    """Negative for a signal."""
    scheduler: bool = False


class RunProcesses:
    """msrun and its descendants, started on construction.

    msrun notices a dead worker late and then waits for its scheduler, and it leaves both behind
    when it is itself ended; therefore the processes are watched and ended one by one from here.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path):
        """Start `command` with `environment` added to this process's own; msrun writes to `log`.

        Raises OSError if the log cannot be written or the command not started.
        """
        _become_subreaper()
        self._launcher = psutil.Process()
        self._others = set(self._launcher.children(recursive=True))
        self._log = log
        self._members: dict[psutil.Process, Member] = {}
        self._stopped: dict[psutil.Process, float] = {}
        self._unseen: dict[psutil.Process, float] = {}
        """Ended before it could be told what they were, and since when that is known."""
        # A scheduler of the machine may have set this for the launcher. A worker between fork and
        # exec shows msrun's environment, and must not be taken for what msrun's parent was.
        inherited = {key: value for key, value in os.environ.items() if key != "MS_ROLE"}
        with log.open("wb") as output:
            self._msrun = subprocess.Popen(
                command,
                env={**inherited, **environment, _LAUNCHER: _identity(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Nothing can be tidied up by a launcher that is killed: then the kernel kills
                # msrun, and with it the workers, which ask for the same.
                preexec_fn=end_with_parent,
            )

    def msrun_exit(self) -> int | None:
        """msrun's exit code, negative for a signal; None while it runs."""
        return self._msrun.poll()

    def bad_exit(self) -> Exit | None:
        """The worker, else the scheduler, that ended first with a code other than 0."""
        self._find_members()
        ended = [member for member in self._members.values() if not _runs(member.process)]
        ended.sort(key=lambda member: (member.rank_id is None, member.rank_id))
        codes = [(member, _zombie_code(member.process)) for member in ended]
        # Read after the codes: msrun ends the other workers only after it has named the first.
        output = self._log.read_text(encoding="utf-8", errors="replace")
        if named := _NAMED_BY_MSRUN.search(output):
            pid, code = int(named["pid"]), int(named["code"])
            known = [member for member in ended if member.process.pid == pid]
            return Exit(pid, known[0].rank_id if known else None, code)
        for member, found in codes:
            if found:
                return Exit(member.process.pid, member.rank_id, found, member.rank_id is None)
        for process, since in self._unseen.items():
            # Of a worker msrun would have said so by now.
            left = _zombie_code(process)
            if left and time.monotonic() - since > _MSRUN_SECONDS:
                return Exit(process.pid, None, left, scheduler=True)
        return None

    def stopped(self, seconds: float) -> str | None:
        """Name of a process that has been stopped (SIGSTOP) for so long; None if none has."""
        self._find_members()
        processes = {member.process: member.name for member in self._members.values()}
        with contextlib.suppress(psutil.NoSuchProcess):
            processes[psutil.Process(self._msrun.pid)] = "msrun"
        now = time.monotonic()
        self._stopped = {
            process: self._stopped.get(process, now)
            for process in processes
            if _status(process) == psutil.STATUS_STOPPED
        }
        for process, since in self._stopped.items():
            if now - since >= seconds:
                return processes[process]
        return None

    def dump_stacks(self) -> None:
        """Ask every worker to write down where it is; see trainer.worker."""
        for member in self._workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.process.send_signal(signal.SIGUSR1)

    def workers_running(self) -> bool:
        """Is a worker still at work?"""
        self._find_members()
        return any(_runs(member.process) for member in self._workers())

    def terminate_workers(self) -> None:
        """Ask every worker to end."""
        self._find_members()
        for member in self._workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.process.send_signal(signal.SIGTERM)

    def kill_all(self) -> list[int]:
        """End every process of the run at once; returns the ids of those that remain.

        That a process remains means that the kernel holds it, for example in a driver.
        """
        deadline = time.monotonic() + _KILL_SECONDS
        while (left := self._descendants()) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            # Orphans become children of this process when their parent is gone: look again soon.
            psutil.wait_procs(left, timeout=0.5)
        return [process.pid for process in left]

    def _workers(self) -> list[Member]:
        return [member for member in self._members.values() if member.rank_id is not None]

    def _descendants(self) -> list[psutil.Process]:
        return [p for p in self._launcher.children(recursive=True) if p not in self._others]

    def _find_members(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._msrun.pid).children():
                if process in self._members:
                    continue
                if member := _member(process):
                    self._members[process] = member
                elif _status(process) == psutil.STATUS_ZOMBIE:
                    self._unseen.setdefault(process, time.monotonic())


def _member(process: psutil.Process) -> Member | None:
    """Scheduler or worker, by the variables that msrun sets; None for its other children."""
    try:
        environment = process.environ()
    except psutil.Error:
        return None
    role = environment.get("MS_ROLE")
    if role == "MS_SCHED":
        return Member(process, None)
    return Member(process, int(environment["RANK_ID"])) if role == "MS_WORKER" else None


def _zombie_code(process: psutil.Process) -> int | None:
    """Exit code of an ended process that its parent has not collected; negative for a signal."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None
    if not process.is_running():  # the id belongs to another process by now
        return None
    return os.waitstatus_to_exitcode(int(fields[49]))  # field 52 of proc(5)


def end_leftovers() -> list[int]:
    """Kill what launchers that are gone have left behind; the ids of what was killed.

    That is what the kernel could not kill with them: processes that workers had started.
    """
    killed = []
    for process in psutil.process_iter():
        try:
            identity = process.environ().get(_LAUNCHER)
            if identity is None or not _left_behind(identity):
                continue
            process.kill()
        except psutil.Error:  # another user's, or gone
            continue
        killed.append(process.pid)
    return killed


def _identity(pid: int) -> str:
    """Tells a process from every other one, also from one that gets its id later, or has it in
    another container. Raises OSError if there is none."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    # Field 22 of proc(5): the start in clock ticks, which setting the clock does not change.
    return f"{pid}:{fields[19]}:{_namespace()}"


def _namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def _left_behind(identity: str) -> bool:
    """Was this the launcher of a process that is in this namespace, and is it gone?"""
    pid, _, rest = identity.partition(":")
    if not pid.isdecimal() or not rest.endswith(f":{_namespace()}"):
        return False
    try:
        return _identity(int(pid)) != identity
    except FileNotFoundError:
        return True
    except OSError:
        return False


def is_running(pid: int) -> bool:
    """Is there such a process, that has not ended?"""
    try:
        return _runs(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def _runs(process: psutil.Process) -> bool:
    return process.is_running() and _status(process) not in (None, psutil.STATUS_ZOMBIE)


def _status(process: psutil.Process) -> str | None:
    """None if it is gone."""
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return None


def end_with_parent() -> None:
    """Between fork and exec: be killed by the kernel when the launcher is gone."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _become_subreaper() -> None:
    """Let orphaned descendants become children of this process, so that they can be found."""
    if _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")
