"""What a launch will do, decided before anything is started or written."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from cluster import msrun, ports, ranktable
from cluster.devices import Machine, host_address, parse_devices, this_machine
from cluster.msrun import Msrun
from launcher.errors import LaunchError
from registry.api import open_registry
from trainer import checkpoint
from trainer.config import RunConfig
from trainer.config_file import dump_config, load_config
from trainer.dataset import Scan, dump_scan
from trainer.plan import Plan, make_plan

WORKER = "trainer.worker"
_HCCN_CONF = Path("/etc/hccn.conf")


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    config: Path | None
    """None if a run is resumed as it was."""
    overrides: Sequence[str] = ()
    devices: str | None = None
    device_target: str | None = None
    master_port: int | None = None
    resume: Path | None = None
    """The folder of the run to go on with."""
    accept_changes: bool = False
    dry_run: bool = False
    """Nothing will be started: weights and images need not be at hand."""


@dataclass(frozen=True)
class Job:
    """One run, ready to start."""

    config: RunConfig
    plan: Plan
    data: Scan
    machine: Machine
    device_ids: tuple[int, ...]
    folder: Path
    """The run's folder, as the user would write it."""
    attempt: Path
    """Absolute; where the workers read and write."""
    msrun: Msrun
    command: tuple[str, ...]
    environment: dict[str, str]
    """Added to the launcher's own."""
    rank_table: str | None
    """Text of the table that msrun is given, if it is given one."""


def prepare(request: Request, now: datetime, worker: str = WORKER) -> Job:
    """Check everything that can be checked before training, and decide the rest.

    Raises one of the rooms' own errors, each with one sentence for the user.
    """
    config = load_config(_config_path(request), request.overrides)
    machine = this_machine(request.device_target)
    device_ids = parse_devices(request.devices or _devices_before(request), machine)
    plan, data = make_plan(config, len(device_ids), machine.device_target, request.dry_run)
    if request.resume is not None:
        plan = _resumed(plan, config, request.resume, request.accept_changes)
    plan = replace(plan, lora_start=_lora_start(config))
    _check_output(config)
    _check_registry(config)

    address = Msrun.master_addr
    if request.master_port is None:
        port = ports.choose_port(address)
    else:
        ports.check_port(request.master_port, address)
        port = request.master_port

    if request.resume is None:
        folder = _new_folder(Path(config.output), f"{config.name}-{now:%Y%m%d-%H%M%S}")
    else:
        folder = request.resume
    attempt = folder.absolute() / f"attempt_{len(_attempts(folder)) + 1}"
    table = _rank_table(machine, device_ids)
    run = Msrun(
        worker_num=len(device_ids),
        local_worker_num=len(device_ids),
        master_port=port,
        log_dir=attempt / "logs",
        rank_table_file=attempt / "rank_table.json" if table else None,
    )
    interpreter = Path(sys.executable)
    return Job(
        config=config,
        plan=plan,
        data=data,
        machine=machine,
        device_ids=device_ids,
        folder=folder,
        attempt=attempt,
        msrun=run,
        command=tuple(msrun.command(run, interpreter, worker, [str(attempt)])),
        environment=msrun.environment(
            run, machine, device_ids, interpreter, os.environ.get("PATH", "")
        ),
        rank_table=table,
    )


def write(job: Job) -> None:
    """Make the run's folder with all that its workers read, or leave nothing.

    Raises LaunchError if the folder cannot be written.
    """
    files = {
        "config.yaml": dump_config(job.config),
        "plan.json": json.dumps(job.plan.as_dict(), indent=2) + "\n",
        "data.json": dump_scan(job.data),
        "command.txt": shlex.join(job.command) + "\n",
        "environment.txt": "".join(f"{k}={v}\n" for k, v in job.environment.items()),
    }
    if job.rank_table is not None:
        files["rank_table.json"] = job.rank_table
    made: Path | None = None
    try:
        if not job.folder.exists():
            job.folder.mkdir(parents=True)
            made = job.folder
        job.attempt.mkdir()
        made = made or job.attempt
        for name in ("logs", "errors", "beats", "stacks"):
            (job.attempt / name).mkdir()
        for name, text in files.items():
            (job.attempt / name).write_text(text, encoding="utf-8")
    except OSError as error:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        raise LaunchError(
            f"{job.folder}: cannot make the run's folder: {error.strerror}; check `output`, its "
            "permissions and the free space"
        ) from error


def _attempts(folder: Path) -> list[Path]:
    """The attempts of a run, the first one first."""
    found = [path for path in folder.glob("attempt_*") if path.name[8:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[8:]))


def _devices_before(request: Request) -> str | None:
    """How many devices the run had that is resumed: on as many it ends with the same bits."""
    attempts = _attempts(request.resume) if request.resume is not None else []
    plan = attempts[-1] / "plan.json" if attempts else None
    if plan is None or not plan.is_file():
        return None
    return str(json.loads(plan.read_text(encoding="utf-8"))["devices"])


def _config_path(request: Request) -> Path:
    """The config that was named, or that of the run to go on with."""
    if request.config is not None:
        return request.config
    if request.resume is None:
        raise LaunchError("no config is named; give one, or --resume and the folder of a run")
    attempts = _attempts(request.resume)
    if not attempts:
        raise LaunchError(
            f"{request.resume}: expected the folder of a run, found no attempt in it; name one "
            "of the folders that lora-launch makes"
        )
    return attempts[-1] / "config.yaml"


def _resumed(plan: Plan, config: RunConfig, folder: Path, accept_changes: bool) -> Plan:
    """The plan of what is left of a run.

    Raises LaunchError if nothing is, there is no checkpoint, or the run would become another one.
    """
    if any((attempt / "result.json").is_file() for attempt in _attempts(folder)):
        raise LaunchError(f"{folder}: this run has ended; start a new one")
    found = checkpoint.newest(folder / "checkpoints")
    if found is None:
        raise LaunchError(
            f"{folder}: expected a checkpoint in checkpoints/, found none that is complete; start "
            "the run anew, with a smaller save_every if need be"
        )
    path, state = found
    changes = checkpoint.changes(state, config, plan.base_digest, plan.data_digest)
    if changes and not accept_changes:
        raise LaunchError(
            f"{folder}: this would not be the same run: {'; '.join(changes)}; undo it, or go on "
            "with --accept-changes"
        )
    if state.images != state.step * plan.global_batch:
        raise LaunchError(
            f"{folder}: its checkpoint counts {state.images} samples in {state.step} steps, which "
            f"no run of global_batch {plan.global_batch} does; set it as it was"
        )
    if state.step >= plan.steps:
        raise LaunchError(
            f"{folder}: its {state.step} steps are done and {plan.steps} are planned; ask for "
            "more images or epochs, with --accept-changes"
        )
    return replace(plan, start_step=state.step, resume_from=str(path.absolute()))


def _lora_start(config: RunConfig) -> str | None:
    """The file of the LoRA to go on from, fetched from the registry if it is a version there.

    Raises LaunchError or RegistryError.
    """
    start = config.lora.start
    if start is None or config.train != "lora":
        return None
    if Path(start).is_file():
        return str(Path(start).absolute())
    if config.registry is None:
        raise LaunchError(
            f"lora.start: there is no file {start}, and `registry` is null; correct the path, or "
            "name the registry that has it"
        )
    file, _ = open_registry(config.registry).fetch(start)
    return str(file.absolute())


def _check_output(config: RunConfig) -> None:
    problem = _write_problem(Path(config.output))
    if problem:
        raise LaunchError(f"output: {problem}; name a folder that can be written")


def _check_registry(config: RunConfig) -> None:
    """Find out before hours of training, not after, that the LoRA cannot be published."""
    if config.registry is None:
        return
    if config.train != "lora":
        raise LaunchError(
            "registry: expected null with `train: all`, because the registry keeps LoRAs and not "
            "whole models; use --set registry=null"
        )
    registry = open_registry(config.registry)
    folder = Path(registry.location)
    problem = _write_problem(folder)
    if problem:
        raise LaunchError(f"registry: {problem}; name a folder that can be written")
    registry.check_push(config.name)


def _write_problem(folder: Path) -> str | None:
    """Why a folder, there or still to be made, cannot be written to; None if it can."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        return f"{folder}: expected a folder, found that {existing} is a file"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{folder}: expected a folder to write to, found no permission in {existing}"
    return None


def _new_folder(output: Path, name: str) -> Path:
    """A path in `output` that is not taken."""
    folder, number = output / name, 1
    while folder.exists():
        number += 1
        folder = output / f"{name}-{number}"
    return folder


def _rank_table(machine: Machine, device_ids: Sequence[int]) -> str | None:
    """The table of several NPUs whose addresses are known.

    Without one, HCCL finds the topology of a single server by itself.
    """
    if machine.device_target != "Ascend" or len(device_ids) == 1 or not _HCCN_CONF.is_file():
        return None
    addresses = ranktable.device_addresses(_HCCN_CONF.read_text(encoding="utf-8"))
    if not set(device_ids) <= set(addresses):
        return None
    return ranktable.dump(ranktable.rank_table(host_address(), device_ids, addresses))
