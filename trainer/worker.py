"""One rank of a run: `python -m trainer.worker ATTEMPT_DIR`, started by msrun.

ATTEMPT_DIR holds config.yaml, plan.json and data.json; events.jsonl appears there, and at the end
result.json with the artifact, stopped.json, or an error file. msrun's scheduler runs this too, up
to the point where the ranks meet. Whatever fails, if only an import, is in the error file.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from pathlib import Path

from trainer.events import Events, write_error

_PR_SET_PDEATHSIG = 1


def run(attempt: Path, rank_id: int) -> None:
    """Train as this rank of the run."""
    events = Events(attempt, rank_id)
    events.phase("starting")

    # Only now: these take seconds, and may fail.
    from trainer.config_file import load_config
    from trainer.dataset import read_scan
    from trainer.distributed import Group
    from trainer.loop import train
    from trainer.plan import read_plan

    plan = read_plan(attempt)
    config = load_config(attempt / "config.yaml")
    scan = read_scan((attempt / "data.json").read_text(encoding="utf-8"))
    train(config, plan, scan, Group(plan.device_target), attempt, events)
    events.phase("ended")


def schedule(attempt: Path) -> None:
    """Be msrun's scheduler, until the run has ended."""
    from trainer.distributed import Group
    from trainer.plan import read_plan

    Group(read_plan(attempt).device_target)


def main() -> None:
    """Entry point of a worker process; exits 1 after writing its error file."""
    attempt = Path(sys.argv[1])
    _end_with_msrun()
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        schedule(attempt)
        return
    rank_id = int(os.environ.get("RANK_ID", 0))
    with (attempt / "stacks" / f"rank_{rank_id}.txt").open("w") as stacks:
        # The launcher asks for it when this rank is silent for too long.
        faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
        try:
            run(attempt, rank_id)
        except (Exception, KeyboardInterrupt) as error:
            write_error(attempt, rank_id, error)
            raise SystemExit(1) from error


def _end_with_msrun() -> None:
    """Let the kernel kill this process when its parent is gone, however that came."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent or _launcher_is_gone():  # it went before that was asked for
        os.kill(os.getpid(), signal.SIGKILL)


def _launcher_is_gone() -> bool:
    """Has the launcher ended that says in LORA_LAUNCHER who it is: its id, and when it started?"""
    pid, _, rest = os.environ.get("LORA_LAUNCHER", "").partition(":")
    started, _, namespace = rest.partition(":")
    if not pid or namespace != os.readlink("/proc/self/ns/pid"):
        return False
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return True
    return fields[19] != started or fields[0] == "Z"


if __name__ == "__main__":
    main()
