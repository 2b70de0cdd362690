"""The msrun command line and its environment, as plain values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.devices import Machine


@dataclass(frozen=True)
class Msrun:
    """One call of msrun on one of a run's machines, which all have the same number of workers."""

    worker_num: int
    """Workers on all machines together."""
    local_worker_num: int
    master_port: int
    log_dir: Path
    master_addr: str = "127.0.0.1"
    cluster_time_out: int = 300
    """Seconds until a worker that has not reached the others gives up."""
    rank_table_file: Path | None = None
    node_rank: int = 0
    bind_cores: bool = False
    bind_numa: bool = False


def command(job: Msrun, interpreter: Path, module: str, arguments: Sequence[str]) -> list[str]:
    """The command that starts `module` with `arguments` in every worker."""
    options: dict[str, object] = {
        "worker_num": job.worker_num,
        "local_worker_num": job.local_worker_num,
        "master_addr": job.master_addr,
        "master_port": job.master_port,
        "log_dir": job.log_dir,
        "join": True,
        "cluster_time_out": job.cluster_time_out,
        # A rank that does not exist: else msrun keeps one `tail -f` per worker running.
        "tail_worker_log": job.worker_num,
    }
    if job.local_worker_num < job.worker_num:
        options["node_rank"] = job.node_rank
    if job.bind_cores:
        options["bind_core"] = True
    if job.bind_numa:
        options["bind_numa"] = True
    if job.rank_table_file is not None:
        options["rank_table_file"] = job.rank_table_file
    return [
        str(interpreter),
        # What the `msrun` script calls; that script need not lie beside the interpreter.
        *("-m", "mindspore.parallel.cluster.run"),
        *(f"--{name}={value}" for name, value in options.items()),
        # msrun passes only `python`, `python3` and `pytest` through and looks for them on PATH.
        *("python3", "-m", module, *arguments),
    ]


def environment(
    job: Msrun,
    machine: Machine,
    device_ids: Sequence[int],
    interpreter: Path,
    path: str,
    patience: float,
) -> dict[str, str]:
    """What is added to the environment of msrun and its workers.

    `path` is the present PATH; `patience` the seconds that a rank waits for the others.
    """
    additions = {
        "PATH": os.pathsep.join(part for part in (str(interpreter.parent), path) if part),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(max(1, machine.cores // job.local_worker_num)),
        # Where a graph that does not compile is dumped; otherwise the working folder.
        "MS_OM_PATH": str(job.log_dir),
    }
    if machine.device_target == "Ascend":
        # Worker i opens the i-th of the ascending list.
        additions["ASCEND_RT_VISIBLE_DEVICES"] = ",".join(map(str, sorted(device_ids)))
    else:
        # Compiling and saving may keep one rank from a collective for longer than the 30 s
        # after which the others would give up.
        additions["MS_CPU_COMM_OP_TIMEOUT"] = str(round(patience))
    return additions
