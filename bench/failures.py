"""What happens when something goes wrong: lora-launch beside bare msrun, in one run.

`python bench/failures.py` prints a table: the exit code, the seconds from the event to the end, and
how many processes are left two seconds later. Both start the same worker on two CPU processes; as
root also on two nodes, which are network namespaces.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.ports import choose_port

ROOT = Path(__file__).resolve().parents[1]
MSRUN = "mindspore.parallel.cluster.run"
LAUNCH = """
import functools, launcher.run
launcher.run.launch = functools.partial(launcher.run.launch, worker="looping_worker")
from launcher.cli import main
main()
"""
LONGEST = 150
"""Seconds after which what has not ended is given up."""


@dataclass(frozen=True)
class Event:
    """Something that goes wrong."""

    name: str
    fault: str = ""
    """What rank 1 does by itself."""
    victim: str = ""
    """Whom a signal is sent to: "worker", "scheduler", "msrun" or "" for what was started."""
    number: int = 0
    port_taken: bool = False
    nodes: int = 1
    node: int = 0
    """Which node it happens on."""


EVENTS = [
    Event("SIGKILL of a worker", victim="worker", number=signal.SIGKILL),
    Event("exception in a worker", fault="raise"),
    Event("ImportError before the ranks meet", fault="import"),
    Event("SIGSTOP of a worker", victim="worker", number=signal.SIGSTOP),
    Event("rank 1 sleeps in Python", fault="sleep"),
    Event("rank 1 exits with 0 early", fault="exit"),
    Event("SIGKILL of the scheduler", victim="scheduler", number=signal.SIGKILL),
    Event("SIGKILL of msrun", victim="msrun", number=signal.SIGKILL),
    Event("SIGTERM of what was started", number=signal.SIGTERM),
    Event("SIGKILL of what was started", number=signal.SIGKILL),
    Event("SIGINT of what was started", number=signal.SIGINT),
    Event("port taken", port_taken=True),
    Event("SIGKILL of a worker of node 1", victim="worker", number=signal.SIGKILL, nodes=2, node=1),
    Event("SIGINT of node 1", number=signal.SIGINT, nodes=2, node=1),
]


class Started:
    """What was started on one node or two, by bare msrun or by lora-launch."""

    def __init__(
        self, bare: bool, event: Event, folder: Path, spaces: Sequence[str] = (), workers: int = 2
    ):
        """`workers` are those of each node."""
        self.folder = folder
        ready = folder / "ready"
        ready.mkdir(parents=True)
        self.ready = ready
        port = choose_port("127.0.0.1")
        self.thief = socket.create_server(("127.0.0.1", port)) if event.port_taken else None
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'bench'}",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FAULT": event.fault,
            "READY": str(ready),
        }
        address = "10.98.0.1" if event.nodes == 2 else "127.0.0.1"
        self.processes = []
        for node in range(event.nodes):
            if bare:
                command = [
                    *(sys.executable, "-m", MSRUN, f"--worker_num={workers * event.nodes}"),
                    f"--local_worker_num={workers}",
                    *(f"--master_addr={address}", f"--master_port={port}"),
                    *(f"--node_rank={node}", f"--log_dir={folder / f'logs{node}'}", "--join=True"),
                    *("--cluster_time_out=40", "python", "-m", "looping_worker", "bare"),
                    str(folder),
                ]
            else:
                command = [
                    *(sys.executable, "-c", LAUNCH, "--devices", str(workers)),
                    *("--set", f"output={folder}"),
                    *("--set", f"cache={folder}/cache", "--set", "registry=null"),
                    *("--set", "cluster.step_seconds=10", "--set", "cluster.grace_seconds=5"),
                ]
                if event.nodes == 2:
                    command += ["--nnodes", "2", "--node-rank", str(node)]
                    command += ["--master-addr", address]
                elif event.port_taken:
                    command += ["--master-port", str(port)]
                command.append("configs/runs/emoji-ink.yaml")
            if event.nodes == 2:
                script = f'hostname node{node} && exec "$@"'
                inside = ["unshare", "-u", "sh", "-c", script, "-"]
                command = ["ip", "netns", "exec", spaces[node], *inside, *command]
            with (folder / f"out{node}").open("w") as out:
                self.processes.append(
                    psutil.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
                )

    def members(self, node: int | None = None) -> dict[str, list[psutil.Process]]:
        """What runs now, by what it is."""
        found: dict[str, list[psutil.Process]] = {}
        for process in psutil.process_iter():
            try:
                command, environment = process.cmdline(), process.environ()
            except psutil.Error:
                continue
            if not any(str(self.folder) in part for part in command):
                continue
            role = environment.get("MS_ROLE")
            kind = {"MS_WORKER": "worker", "MS_SCHED": "scheduler"}.get(role or "", "other")
            if MSRUN in command:
                kind = "msrun"
            elif "tail" in command[0]:
                kind = "tail"
            elsewhere = node is not None and int(environment.get("RANK_ID", 0)) // 2 != node
            if role == "MS_WORKER" and elsewhere:
                continue
            found.setdefault(kind, []).append(process)
        return found

    def at_work(self, ranks: int) -> bool:
        return len(list(self.ready.iterdir())) == ranks

    def end(self) -> int:
        """Kill what is left; how many processes that was."""
        left = [p for found in self.members().values() for p in found]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.thief:
            self.thief.close()
        return len(left)


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def happen(event: Event, bare: bool, folder: Path, spaces: Sequence[str]) -> str:
    """One row's cell: `exit codes, seconds, processes left`."""
    begun = time.monotonic()
    started = Started(bare, event, folder, spaces)
    ended = lambda: all(p.poll() is not None for p in started.processes)  # noqa: E731
    if event.fault in ("", "raise", "exit", "sleep") and not event.port_taken:
        assert wait(lambda: started.at_work(2 * event.nodes), LONGEST), started.folder
        begun = time.monotonic()
        if event.victim:
            victim = started.members(event.node)[event.victim][-1]
            victim.send_signal(event.number)
        elif event.number:
            started.processes[event.node].send_signal(event.number)
        else:
            begun += 45 * 0.025  # rank 1 goes on for some more rounds
    finished = wait(ended, LONGEST)
    seconds = time.monotonic() - begun
    codes = "/".join(str(p.poll()) for p in started.processes)
    time.sleep(2)
    left = started.end()
    for process in started.processes:
        process.wait()
    return f"{codes}, {seconds:.1f} s, {left} left" if finished else f"not after {LONGEST} s"


@contextlib.contextmanager
def two_nodes() -> Iterator[list[str]]:
    """Two network namespaces that reach each other; none where that cannot be."""
    names, links = [f"bench{os.getpid()}{x}" for x in "ab"], [f"b{os.getpid()}{x}" for x in "ab"]
    commands = [["ip", "netns", "add", name] for name in names]
    commands.append(["ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1]])
    for number, (name, link) in enumerate(zip(names, links, strict=True)):
        commands.append(["ip", "link", "set", link, "netns", name])
        address = f"10.98.0.{number + 1}/24"
        commands.append(["ip", "-n", name, "addr", "add", address, "dev", link])
        commands += [["ip", "-n", name, "link", "set", device, "up"] for device in (link, "lo")]
    able = shutil.which("ip") is not None and all(
        subprocess.run(command, capture_output=True).returncode == 0 for command in commands
    )
    try:
        yield names if able else []
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def main() -> None:
    print("| event | bare msrun: exit, time, left | lora-launch: exit, time, left |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name, two_nodes() as spaces:
        for number, event in enumerate(EVENTS):
            if event.nodes == 2 and not spaces:
                continue
            cells = [
                happen(event, bare, Path(name) / f"{number}{bare}", spaces)
                for bare in (True, False)
            ]
            print(f"| {event.name} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
