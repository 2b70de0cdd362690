"""Random faults at random moments into real runs: `python bench/faults.py --faults 100`.

Short runs of `lora-launch` on two CPU workers, which restart by themselves, are hit a few times
each. Every run must end well with the very LoRA of a run that nothing happened to, and leave no
process behind. Prints a line for each run, and what all of them came to.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    *("epochs=null", "images=480", "validate_every=null", "data.validation=null", "samples=null"),
    *("registry=null", "save_every=3", "cluster.step_seconds=8", "cluster.start_seconds=60"),
    *("cluster.grace_seconds=20",),
)
_PTRACE_ATTACH, _PTRACE_DETACH = 16, 17


class Run:
    """One launch and the processes that belong to it."""

    def __init__(self, folder: Path):
        self.folder = folder
        command = [sys.executable, "-m", "launcher.cli", "--devices", "2", "--max-restarts", "99"]
        for setting in (*SETTINGS, f"output={folder}", f"cache={folder.parent / 'cache'}"):
            command += ["--set", setting]
        self.log = folder.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "configs/runs/emoji-ink.yaml"],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
            )

    def members(self) -> dict[str, list[psutil.Process]]:
        """Workers, scheduler and msrun that run now."""
        found: dict[str, list[psutil.Process]] = {"worker": [], "scheduler": [], "msrun": []}
        for process in psutil.process_iter():
            try:
                command, role = process.cmdline(), process.environ().get("MS_ROLE")
            except psutil.Error:
                continue
            if not any(str(self.folder) in part for part in command):
                continue
            if "mindspore.parallel.cluster.run" in command:
                found["msrun"].append(process)
            elif role in ("MS_WORKER", "MS_SCHED"):
                found["worker" if role == "MS_WORKER" else "scheduler"].append(process)
        return found

    def left(self) -> list[psutil.Process]:
        """All that still runs, once the launcher has ended."""
        return [process for found in self.members().values() for process in found]

    def attempts(self) -> list[Path]:
        return sorted(self.folder.glob("*/attempt_*"), key=lambda p: int(p.name[8:]))

    def digest(self) -> str:
        """sha256 of the LoRA."""
        (lora,) = self.folder.glob("*/attempt_*/lora.safetensors")
        return hashlib.sha256(lora.read_bytes()).hexdigest()


def send(kind: str, number: signal.Signals) -> Callable[[Run, random.Random], bool]:
    def fault(run: Run, draw: random.Random) -> bool:
        found = run.members()[kind]
        if not found:
            return False
        try:
            draw.choice(found).send_signal(number)
        except psutil.NoSuchProcess:
            return False
        return True

    return fault


def hang(run: Run, draw: random.Random) -> bool:
    """Hold a worker's main thread as a debugger does; its other threads go on."""
    found = run.members()["worker"]
    if not found:
        return False
    victim = draw.choice(found)

    def hold() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.ptrace(_PTRACE_ATTACH, victim.pid, 0, 0) == 0:
            while victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.5)

    threading.Thread(target=hold, daemon=True).start()
    return True


def steal_port(run: Run, draw: random.Random) -> bool:
    """End the attempt under way, and take the port of the next one before its scheduler does."""
    before = len(run.attempts())
    if not send("worker", signal.SIGKILL)(run, draw):
        return False
    deadline = time.monotonic() + 30
    while len(run.attempts()) == before:
        if time.monotonic() > deadline or run.process.poll() is not None:
            return False
        time.sleep(0.002)
    command = (run.attempts()[-1] / "command.txt").read_text()
    port = int(re.findall(r"master_port=(\d+)", command)[0])
    try:
        thief = socket.create_server(("127.0.0.1", port))
    except OSError:
        return False
    threading.Timer(20, thief.close).start()
    return True


FAULTS: dict[str, Callable[[Run, random.Random], bool]] = {
    "SIGKILL of a worker": send("worker", signal.SIGKILL),
    "SIGTERM of a worker": send("worker", signal.SIGTERM),
    "SIGSTOP of a worker": send("worker", signal.SIGSTOP),
    "exception in a worker": send("worker", signal.SIGINT),
    "SIGKILL of the scheduler": send("scheduler", signal.SIGKILL),
    "SIGKILL of msrun": send("msrun", signal.SIGKILL),
    "hang of a worker": hang,
    "port stolen": steal_port,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--each", type=int, default=5, help="faults into one run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    counts: Counter[str] = Counter()
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        reference = Run(Path(name) / "reference")
        assert reference.process.wait() == 0, reference.log.read_text()
        expected = reference.digest()
        number = 0
        while sum(counts.values()) < options.faults:
            number += 1
            run = Run(Path(name) / f"run{number}")
            begun = time.monotonic()
            wanted = min(options.each, options.faults - sum(counts.values()))
            done: list[str] = []
            seen = 0
            while run.process.poll() is None and len(done) < wanted:
                # One fault for each attempt, so that each meets a run at work.
                if len(run.attempts()) == seen:
                    time.sleep(0.05)
                    continue
                seen = len(run.attempts())
                time.sleep(draw.uniform(0, 18))
                kind = draw.choice(list(FAULTS))
                if run.process.poll() is None and FAULTS[kind](run, draw):
                    done.append(kind)
                    if kind == "port stolen":
                        seen = len(run.attempts())
            code = run.process.wait()
            counts.update(done)
            left = run.left()
            right = code == 0 and run.digest() == expected and not left
            failures += not right
            report = {
                "run": number,
                "faults": done,
                "attempts": len(run.attempts()),
                "seconds": round(time.monotonic() - begun),
                "exit_code": code,
                "same_lora": code == 0 and run.digest() == expected,
                "processes_left": len(left),
            }
            print(json.dumps(report), flush=True)
            if not right:
                print(run.log.read_text(), file=sys.stderr, flush=True)
    for kind, count in sorted(counts.items()):
        print(f"{count:4}  {kind}")
    print(
        f"{sum(counts.values()):4}  faults in {number} runs, {failures} runs that did not end right"
    )
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    main()
