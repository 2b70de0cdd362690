"""What ends an attempt, in a sentence. Pure functions, but for the logs that they read."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from launcher.errors import Failure
from launcher.events import RankError
from launcher.watchdog import Hang


def of_rank(error: RankError, log: Path) -> Failure:
    """A rank that could say what stopped it."""
    if error.user:
        return Failure(error.message, 2, error.traceback)
    text = f"rank {error.rank_id} failed with {error.type}: {error.message}; see {log}"
    return Failure(text, 1, error.traceback)


def of_exit(name: str, code: int, log: Path) -> Failure:
    """A process that ended without a word of its own, with the last line of its log."""
    if code < 0:
        number = signal.Signals(-code)
        ended = f"{name} was killed by signal {number.value} ({number.name})"
        if number == signal.SIGKILL:
            ended += ", as the kernel does when memory runs out"
        return Failure(f"{ended}; see {log}", 128 + number, killed=True)
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        lines = []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    said = f" after writing {last!r}" if last else ""
    return Failure(f"{name} ended with exit code {code}{said}; see {log}", code)


def of_early_end(rank_id: int, log: Path) -> Failure:
    """A rank that has left the others in the lurch without an error."""
    text = f"rank {rank_id} ended with exit code 0 before the run had ended; see {log}"
    return Failure(text, killed=True)


def of_hang(hang: Hang, attempt: Path) -> Failure:
    """Ranks that hang, with the place where the first of them is."""
    folder = attempt / "stacks"
    place = innermost(folder / f"rank_{hang.rank_ids[0]}.txt")
    at = f", in {place}" if place else ""
    text = f"{hang}{at}; the stacks of all ranks are in {folder}"
    return Failure(text, killed=True)


def of_stopped(name: str, seconds: float) -> Failure:
    """A process that somebody has stopped."""
    return Failure(
        f"{name} has been stopped (SIGSTOP) for {seconds:g} s, and the others cannot go on without "
        "it; to look at a worker use a debugger, or py-spy",
        killed=True,
    )


def of_node(node_rank: int, host: str) -> Failure:
    """A machine from which nothing comes any more."""
    return Failure(
        f"node {node_rank} ({host}) is gone: its lora-launch has ended or the network is cut; see "
        "what it said",
        killed=True,
    )


def of_port(port: int) -> Failure:
    """The scheduler's port was free when it was chosen."""
    return Failure(
        f"port {port} was taken by another process before msrun's scheduler had it; start again, "
        "or name another one with --master-port",
        port_taken=True,
    )


def innermost(stacks: Path) -> str | None:
    """`file:line (function)` of the main thread, as faulthandler has written it down."""
    try:
        text = stacks.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    main = text.rpartition("Current thread")[2] if "Current thread" in text else ""
    found = re.search(r'File "([^"]+)", line (\d+) in (\S+)', main)
    return f"{found[1]}:{found[2]} ({found[3]})" if found else None
