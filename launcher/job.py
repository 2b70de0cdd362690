"""What a launch will do, decided before anything is started or written."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from cluster import msrun, ports
from cluster.devices import Machine, parse_devices
from cluster.errors import ClusterError
from cluster.msrun import Msrun
from cluster.ranktable import Server
from launcher.errors import LaunchError
from launcher.estimate import DEVICES_PER_SERVER
from launcher.hardware import machine_of, own_server, product_of, rank_table_text
from launcher.request import Request
from registry.api import open_registry
from trainer import checkpoint
from trainer.config import ClusterConfig, RunConfig
from trainer.config_file import dump_config, load_config
from trainer.dataset import Scan, dump_scan
from trainer.plan import Plan, make_plan, read_plan
from weights.files import sha256

WORKER = "trainer.worker"
PS_CONTEXT = "LORA_PS_CONTEXT"
"""Variable that tells the workers of their certificates; see trainer.distributed."""
METRICS_VARIABLE, METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR", "metrics"
"""Where, in an attempt's folder, each rank keeps what it measures; see trainer.telemetry."""
MEETING_PORT = 28118
"""Where the launchers of several nodes meet, unless --master-port says otherwise."""


@dataclass(frozen=True)
class Start:
    """What one machine starts for an attempt of a run, and how it watches it."""

    folder: Path
    """The run's, as the user would write it."""
    attempt: Path
    """Absolute; where the workers read and write."""
    device_ids: tuple[int, ...]
    msrun: Msrun
    command: tuple[str, ...]
    environment: dict[str, str]
    """Added to the launcher's own."""
    cluster: ClusterConfig

    @property
    def node_rank(self) -> int:
        """0 is the machine of rank 0 and of msrun's scheduler."""
        return self.msrun.node_rank

    @property
    def rank_ids(self) -> range:
        """The ranks on this machine."""
        first = self.node_rank * self.msrun.local_worker_num
        return range(first, first + self.msrun.local_worker_num)

    @property
    def devices_option(self) -> str:
        """What --devices takes these devices as."""
        first, last = self.device_ids[0], self.device_ids[-1]
        if self.device_ids == tuple(range(len(self.device_ids))):
            return str(len(self.device_ids))
        if last - first + 1 == len(self.device_ids):
            return f"{first}-{last}"
        return ",".join(map(str, self.device_ids))

    @property
    def log(self) -> Path:
        """What msrun says on this machine."""
        name = f"msrun_{self.node_rank}.log" if self.node_rank else "msrun.log"
        return self.attempt / "logs" / name


@dataclass(frozen=True)
class Job:
    """One attempt of a run, ready to start on its first machine."""

    config: RunConfig
    plan: Plan
    data: Scan
    machine: Machine
    start: Start
    rank_table: str | None
    """Text of the table that msrun is given, if it is given one."""
    server: Server | None
    """This machine as a part of one, if the addresses of its devices are known."""
    product: str | None
    parent: dict[str, str] | None
    """Reference and sha256 of the LoRA that it goes on from."""

    @property
    def folder(self) -> Path:
        """The run's folder, as the user would write it."""
        return self.start.folder

    @property
    def attempt(self) -> Path:
        """Where the workers read and write."""
        return self.start.attempt


def prepare(request: Request, now: datetime, worker: str = WORKER) -> Job:
    """Check everything that can be checked before training, and decide the rest.

    Raises one of the rooms' own errors, each with one sentence for the user.
    """
    config = load_config(config_path(request), request.overrides)
    machine = machine_of(request)
    device_ids = devices_of(request, machine)
    product = product_of(request, machine, device_ids)
    devices = len(device_ids) * request.nodes.nnodes
    plan, data = make_plan(config, devices, machine.device_target, request.dry_run)
    if request.resume is not None:
        plan = _resumed(plan, config, request.resume, request.accept_changes)
    start_file, parent = _lora_start(config)
    plan = replace(plan, lora_start=start_file, product=product)
    if product == "910A" and plan.precision != "fp32":
        raise LaunchError(
            "precision: expected fp32 on a 910A, which has no bfloat16 and whose float16 does not "
            f"become infinite where it overflows, found {plan.precision}; use --set precision=fp32"
        )
    _check_output(config)
    _check_registry(config)
    _check_evaluation(config)

    if request.resume is None:
        folder = _new_folder(Path(config.output), f"{config.name}-{now:%Y%m%d-%H%M%S}")
    else:
        folder = request.resume
    attempt = folder.absolute() / f"attempt_{len(attempts(folder)) + 1}"
    server = own_server(request, machine, device_ids, product)
    table = rank_table_text(request, device_ids, product, server)
    address = request.nodes.master_addr or Msrun.master_addr
    start = make_start(
        config,
        machine,
        device_ids,
        folder,
        Msrun(
            worker_num=devices,
            local_worker_num=len(device_ids),
            master_addr=address,
            master_port=_port(request, address),
            log_dir=attempt / "logs",
            rank_table_file=attempt / "rank_table.json" if table else None,
            node_rank=request.nodes.node_rank,
            bind_cores=config.cluster.bind_cores,
            bind_numa=config.cluster.bind_numa,
        ),
        worker,
    )
    return Job(config, plan, data, machine, start, table, server, product, parent)


def with_rank_table(job: Job, table: str) -> Job:
    """The job with a table that was not known before all nodes were there."""
    start = job.start
    file = start.attempt / "rank_table.json"
    run = replace(start.msrun, rank_table_file=file)
    option = f"--rank_table_file={file}"
    place = start.command.index(f"--master_port={run.master_port}")
    command = (*start.command[:place], option, *start.command[place:])
    return replace(job, start=replace(start, msrun=run, command=command), rank_table=table)


def make_start(
    config: RunConfig,
    machine: Machine,
    device_ids: tuple[int, ...],
    folder: Path,
    run: Msrun,
    worker: str,
) -> Start:
    """What this machine starts: the module `worker` on each of its devices."""
    attempt = run.log_dir.parent
    interpreter = Path(sys.executable)
    limits = config.cluster
    # A rank that waits for one that hangs must not give up before the launcher has said which.
    patience = max(limits.start_seconds, limits.step_seconds, limits.checkpoint_seconds) + 60
    environment = msrun.environment(
        run, machine, device_ids, interpreter, os.environ.get("PATH", ""), patience
    )
    environment[METRICS_VARIABLE] = str(attempt / METRICS_FOLDER)
    if limits.tls:
        environment[PS_CONTEXT] = str(attempt / "tls" / "ps_context.json")
    return Start(
        folder=folder,
        attempt=attempt,
        device_ids=device_ids,
        msrun=run,
        command=tuple(msrun.command(run, interpreter, worker, [str(attempt)])),
        environment=environment,
        cluster=limits,
    )


def _port(request: Request, address: str) -> int:
    """The scheduler's port. With several nodes the one that is named is where they meet."""
    if request.nodes.nnodes > 1:
        meeting = meeting_port(request)
        # A dry run need not be on a machine of the run.
        return meeting + 1 if request.dry_run else ports.next_port(meeting, address)
    if request.master_port is None:
        return ports.choose_port(address)
    ports.check_port(request.master_port, address)
    return request.master_port


def meeting_port(request: Request) -> int:
    """Where the launchers of several nodes meet."""
    return request.master_port or request.nodes.master_port or MEETING_PORT


def write(job: Job) -> None:
    """Make the attempt's folder with all that its workers read, or leave nothing.

    Raises LaunchError if the folder cannot be written.
    """
    start = job.start
    files = {
        "config.yaml": dump_config(job.config),
        "plan.json": json.dumps(job.plan.as_dict(), indent=2) + "\n",
        "data.json": dump_scan(job.data),
        "command.txt": shlex.join(start.command) + "\n",
        "environment.txt": "".join(f"{k}={v}\n" for k, v in start.environment.items()),
    }
    if job.rank_table is not None:
        files["rank_table.json"] = job.rank_table
    made: Path | None = None
    try:
        if not job.folder.exists():
            job.folder.mkdir(parents=True)
            made = job.folder
        part = job.attempt.with_name(f".{job.attempt.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        made = made or part
        for name in ("logs", "errors", "beats", "stacks", METRICS_FOLDER):
            (part / name).mkdir()
        for name, text in files.items():
            (part / name).write_text(text, encoding="utf-8")
        part.rename(job.attempt)
        if job.config.cluster.tls:
            from cluster import tls  # cryptography takes long to load

            made = made if made == job.folder else job.attempt
            tls.make(job.attempt / "tls", datetime.now(timezone.utc))
    except (OSError, ClusterError) as error:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        if isinstance(error, ClusterError):
            raise
        raise LaunchError(
            f"{job.folder}: cannot make the run's folder: {error.strerror}; check `output`, its "
            "permissions and the free space"
        ) from error


def attempts(folder: Path) -> list[Path]:
    """The attempts of a run, the first one first."""
    found = [path for path in folder.glob("attempt_*") if path.name[8:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[8:]))


def devices_of(request: Request, machine: Machine) -> tuple[int, ...]:
    """The devices of this machine that are asked for, else as many as the job's engine gives, or
    as the run had that is resumed. Raises ClusterError."""
    told = request.nodes.workers_per_node
    text = request.devices or (str(told) if told else None) or _devices_before(request)
    if text is None and machine.assumed and request.product != "A3":
        text = str(DEVICES_PER_SERVER)
    return parse_devices(text, machine)


def _devices_before(request: Request) -> str | None:
    """How many devices the run had that is resumed: on as many it ends with the same bits."""
    before = attempts(request.resume) if request.resume is not None else []
    if not before:
        return None
    devices = read_plan(before[-1]).devices
    # On other numbers of nodes it is for the plan to say whether that can be.
    return str(max(1, devices // request.nodes.nnodes))


def config_path(request: Request) -> Path:
    """The config that was named, or that of the run to go on with."""
    if request.config is not None:
        return request.config
    if request.resume is None:
        raise LaunchError("no config is named; give one, or --resume and the folder of a run")
    before = attempts(request.resume)
    if not before:
        raise LaunchError(
            f"{request.resume}: expected the folder of a run, found no attempt in it; name one "
            "of the folders that lora-launch makes"
        )
    return before[-1] / "config.yaml"


def _resumed(plan: Plan, config: RunConfig, folder: Path, accept_changes: bool) -> Plan:
    """The plan of what is left of a run: all of it, if there is no checkpoint yet.

    Raises LaunchError if nothing is, or the run would become another one.
    """
    if any((attempt / "result.json").is_file() for attempt in attempts(folder)):
        raise LaunchError(f"{folder}: this run has ended; start a new one")
    found = checkpoint.newest(folder / "checkpoints")
    if found is None:
        return plan
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


def _lora_start(config: RunConfig) -> tuple[str | None, dict[str, str] | None]:
    """The file of the LoRA to go on from, fetched from the registry if it is a version there, and
    what to say of it.

    Raises LaunchError or RegistryError.
    """
    start = config.lora.start
    if start is None or config.train != "lora":
        return None, None
    if Path(start).is_file():
        return str(Path(start).absolute()), {"reference": start, "sha256": sha256(start)}
    if config.registry is None:
        raise LaunchError(
            f"lora.start: there is no file {start}, and `registry` is null; correct the path, or "
            "name the registry that has it"
        )
    file, manifest = open_registry(config.registry).fetch(start)
    parent = {"reference": manifest.reference, "sha256": manifest.files[0].sha256}
    return str(file.absolute()), parent


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
    problem = None if "://" in config.registry else _write_problem(Path(registry.location))
    if problem:
        raise LaunchError(f"registry: {problem}; name a folder that can be written")
    registry.check_push(config.name)


def _check_evaluation(config: RunConfig) -> None:
    """Find out before hours of training that files are missing with which it is to be scored."""
    wanted = config.evaluation
    if wanted is None or config.train != "lora":
        return
    for key in ("prompts", "inception", "clip"):
        path = getattr(wanted, key)
        if path is not None and not Path(path).is_file():
            raise LaunchError(f"evaluation.{key}: there is no file {path}; correct the path")
    if wanted.real is not None and not Path(wanted.real).is_dir():
        raise LaunchError(f"evaluation.real: there is no folder {wanted.real}; correct the path")


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
