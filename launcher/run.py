"""The whole of a launch, from the request to the published version."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.host import is_private
from cluster.msrun import Msrun
from cluster.ranktable import server_of
from launcher import estimate
from launcher.channel import Message
from launcher.errors import Failure, Interrupted, LaunchError, RunFailed, Stopped
from launcher.evaluation import scores_of
from launcher.events import record, trained_seconds
from launcher.hardware import machine_of, own_server, product_of, whole_table
from launcher.job import (
    WORKER,
    Job,
    attempts,
    config_path,
    devices_of,
    make_start,
    meeting_port,
    prepare,
    with_rank_table,
    write,
)
from launcher.lock import locked
from launcher.observe import Observer, observed
from launcher.others import Alone, Ended, Follower, Leader, Others, hello
from launcher.processes import end_leftovers
from launcher.progress import Lines, shown_progress
from launcher.publish import Result, finish, publish, read_result, unfinished
from launcher.request import Request
from launcher.restarts import Failed, decide
from launcher.supervise import received_signals, saved_text, supervise
from launcher.words import dry_run_json, dry_run_text, plan_text, published_text, result_text
from trainer.config import RunConfig
from trainer.config_file import dump_config, load_config
from trainer.plan import read_plan

_PORTS = 3
"""So often another port is tried when somebody takes the one that was free."""
_CLOCK_SECONDS = 2.0
"""By which the clocks of two nodes may differ without a word."""
_VISIBLE_SECONDS = 60.0
"""For what node 0 has written to be seen by the others, on shared storage that is slow."""


def launch(request: Request, *, as_json: bool = False, worker: str = WORKER) -> None:
    """Run what is requested; the module `worker` is started on each device.

    The plan, progress and summary go to stderr, the result to stdout. Raises the rooms' own
    errors for bad input, RunFailed, Stopped and Interrupted.
    """
    if request.dry_run:
        job = prepare(request, datetime.now(timezone.utc), worker)
        _tell(plan_text(job))
        found = (
            estimate.estimates(
                job.config, job.plan, request.product or job.product, request.nodes.nnodes
            )
            if request.estimate
            else None
        )
        print(
            json.dumps(dry_run_json(job, found), indent=2) if as_json else dry_run_text(job, found)
        )
        return
    if killed := end_leftovers():
        _tell(f"ended {len(killed)} processes that a lora-launch which was killed had left behind")
    if request.nodes.node_rank:
        _follow(request, worker)
    elif request.resume is not None and attempts(request.resume):
        with locked(request.resume):
            _lead(request, worker, as_json)
    else:
        _lead(request, worker, as_json)


def _lead(request: Request, worker: str, as_json: bool) -> None:
    """Run all attempts as the machine that decides, and publish."""
    late = unfinished(request.resume) if request.resume else None
    if request.resume is not None and late is not None:
        _finish_late(request, request.resume, late, as_json)
        return
    job = prepare(request, datetime.now(timezone.utc), worker)
    _tell(plan_text(job))
    address = job.start.msrun.master_addr
    if not (job.config.cluster.tls or is_private(address)):
        _tell(
            f"warning: {address} is a public address, and who reaches it can take part in the run; "
            "use one of a private network, or --set cluster.tls=true"
        )
    with observed(request.scraping, _tell) as observer, _others(request, job) as others:
        with received_signals() as signals:
            job = _trained(request, job, worker, signals, others, observer)
        result = read_result(job.attempt)
        _tell(result_text(job, result))
        observer.enters("publishing")
        reference = publish(job, result, signals)
        if reference:
            observer.published((job.attempt / result.artifact).stat().st_size)
        observer.enters("ended")
    _tell(published_text(job, scores_of(job.attempt), reference))
    if as_json:
        print(json.dumps(_result_json(job, result, reference), indent=2))
    else:
        print(reference or job.attempt / result.artifact)


def _finish_late(request: Request, folder: Path, attempt: Path, as_json: bool) -> None:
    """Score and publish what was trained before."""
    wanted = load_config(config_path(request), request.overrides).evaluation is not None
    with received_signals() as signals:
        reference = finish(folder, attempt, signals, wanted)
    if reference is None:
        _tell("the LoRA was trained before, and is scored now")
    else:
        _tell(f"the LoRA was trained before, and is published now: {reference}")
    found = reference or str(attempt)
    print(json.dumps({"reference": reference}, indent=2) if as_json else found)


def _trained(
    request: Request,
    job: Job,
    worker: str,
    signals: Sequence[int],
    others: Others,
    observer: Observer,
) -> Job:
    """The attempt that ended well, after those that did not. Raises what `supervise` does."""
    if request.resume is None:
        job = _begin(job, signals, others)
        with locked(job.folder):
            return _attempts(request, job, worker, signals, others, observer)
    job = _begin(job, signals, others)
    return _attempts(request, job, worker, signals, others, observer)


def _attempts(
    request: Request,
    job: Job,
    worker: str,
    signals: Sequence[int],
    others: Others,
    observer: Observer,
) -> Job:
    failed: list[Failed] = []
    again = replace(
        request,
        config=None,
        overrides=(),
        devices=job.start.devices_option,
        resume=job.folder,
    )
    ports = 0
    while True:
        try:
            try:
                with shown_progress(job.plan, job.start) as shown:
                    progress = observer.watched(shown, job.config.name, job.plan, job.start)
                    supervise(job.start, progress, signals, others)
            finally:
                shutil.rmtree(job.attempt / "tls", ignore_errors=True)
            return job
        except (RunFailed, Stopped) as ended:
            failure = ended.failure if isinstance(ended, RunFailed) else Failure(str(ended), 75)
            record(job.attempt, "failure", **failure.as_dict())
            if failure.port_taken and request.master_port is None and ports < _PORTS:
                ports += 1
                _tell(f"warning: {failure.text}; trying another one")
                pause = 0.0
            else:
                failed.append(Failed(failure, trained_seconds(job.attempt)))
                decision = decide(failed, request.max_restarts)
                if decision.pause is None:
                    if decision.reason:
                        _tell(decision.reason)
                    raise
                pause = decision.pause
                _tell(f"warning: {failure.text}\nstarting again in {pause:g} s")
            _wait(pause, signals, job)
            job = prepare(again, datetime.now(timezone.utc), worker)
            _tell(f"{job.attempt.name} goes on from step {job.plan.start_step:,}")
            job = _begin(job, signals, others)


def _begin(job: Job, signals: Sequence[int], others: Others) -> Job:
    """Wait for the other nodes, write what the workers read, and let all nodes start.

    The job, with the rank table of all nodes if they need one.
    """
    if isinstance(others, Leader):
        hellos = others.gather(_patience(job.config, signals))
        while others.ahead:
            rank, ahead = others.ahead.popitem()
            if abs(ahead) > _CLOCK_SECONDS:
                _tell(
                    f"warning: the clock of node {rank} ({others.host(rank)}) is {ahead:+.1f} s "
                    "from this machine's, and their logs do not fit together; let NTP set both"
                )
        if job.rank_table is None:
            job = _with_table(job, [hello["server"] for hello in hellos])
    write(job)
    run = job.start.msrun
    order = {
        "folder": str(job.folder.absolute()),
        "attempt": str(job.attempt),
        "master_addr": run.master_addr,
        "master_port": run.master_port,
        "rank_table": job.rank_table is not None,
    }
    others.tell({"start": order})
    return job


def _with_table(job: Job, servers: Sequence[dict[str, Any] | None]) -> Job:
    """The job with the table of all nodes' devices."""
    table = whole_table(
        [None if server is None else server_of(server) for server in servers], job.product
    )
    return job if table is None else with_rank_table(job, table)


def _follow(request: Request, worker: str) -> None:
    """Do what node 0 decides, until it says that the run has ended."""
    config = load_config(config_path(request), request.overrides)
    machine = machine_of(request)
    device_ids = devices_of(request, machine)
    product = product_of(request, machine, device_ids)
    server = own_server(request, machine, device_ids, product)
    nodes = request.nodes
    assert nodes.master_addr is not None
    own = hello(
        nodes.node_rank,
        nodes.nnodes,
        device_target=machine.device_target,
        device_ids=list(device_ids),
        server=server and asdict(server),
    )
    with observed(request.scraping, _tell) as observer, received_signals() as signals:
        _tell(f"node {nodes.node_rank} of {nodes.nnodes}: going to node 0 at {nodes.master_addr}")
        patience = _patience(config, signals)
        others = Follower(
            nodes.master_addr, meeting_port(request), _key(config), own, lambda: patience([0])
        )
        while True:
            message = others.order(lambda: _check(signals))
            if "end" in message:
                break
            order = message["start"]
            attempt = Path(order["attempt"])
            start = make_start(
                config,
                machine,
                device_ids,
                Path(order["folder"]),
                Msrun(
                    worker_num=len(device_ids) * nodes.nnodes,
                    local_worker_num=len(device_ids),
                    master_addr=order["master_addr"],
                    master_port=order["master_port"],
                    log_dir=attempt / "logs",
                    rank_table_file=attempt / "rank_table.json" if order["rank_table"] else None,
                    node_rank=nodes.node_rank,
                    bind_cores=config.cluster.bind_cores,
                    bind_numa=config.cluster.bind_numa,
                ),
                worker,
            )
            _until_visible(attempt, signals)
            _tell(f"{attempt.name} begins; node 0 shows its progress")
            with locked(start.folder, nodes.node_rank):
                try:
                    plan = read_plan(attempt)
                    progress = observer.watched(Lines(plan), config.name, plan, start)
                    supervise(start, progress, signals, others)
                except (Ended, RunFailed, Stopped) as ended:
                    # Node 0 knows, and says what comes next.
                    _tell(f"{attempt.name} has ended: {ended or 'node 0 wants it to'}")
    end = message["end"]
    others.close()
    if end["exit_code"]:
        raise RunFailed(Failure(f"node 0: {end['text']}", end["exit_code"]))
    _tell(f"node 0: {end['text']}")


@contextmanager
def _others(request: Request, job: Job) -> Iterator[Others]:
    """The other nodes; at the end they hear how it went."""
    run = job.start.msrun
    if request.nodes.nnodes == 1:
        yield Alone()
        return
    own = hello(
        0,
        request.nodes.nnodes,
        device_target=job.machine.device_target,
        device_ids=list(job.start.device_ids),
        server=job.server and asdict(job.server),
    )
    leader = Leader(
        run.master_addr, meeting_port(request), _key(job.config), request.nodes.nnodes, own
    )
    end: Message = {"exit_code": 0, "text": "the run has ended well"}
    try:
        yield leader
    except BaseException as error:
        failure = error.failure if isinstance(error, RunFailed) else None
        code = failure.exit_code if failure else getattr(error, "exit_code", 1)
        end = {"exit_code": code, "text": str(error)}
        raise
    finally:
        leader.tell({"end": end})
        leader.close()


def _key(config: RunConfig) -> bytes:
    """What the nodes of a run have in common."""
    return hashlib.sha256(f"{version('ascend-lora')}\n{dump_config(config)}".encode()).digest()


def _patience(config: RunConfig, signals: Sequence[int]) -> Callable[[Sequence[int]], None]:
    """Is called again and again with the nodes that are waited for; raises when it is too long."""
    began = said = time.monotonic()

    def wait(missing: Sequence[int]) -> None:
        nonlocal said
        _check(signals)
        now = time.monotonic()
        names = f"node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        if now - began > config.cluster.start_seconds:
            raise LaunchError(
                f"expected {names} within {config.cluster.start_seconds:g} s, found nobody; start "
                "lora-launch there, or see whether --master-addr and --master-port are the same "
                "and can be reached"
            )
        if now - said >= 10:
            said = now
            _tell(f"waiting for {names}, {now - began:.0f} s")
        time.sleep(0.2)

    return wait


def _until_visible(attempt: Path, signals: Sequence[int]) -> None:
    """Wait for what node 0 has written."""
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not (attempt / "plan.json").is_file():
        _check(signals)
        if time.monotonic() > deadline:
            raise LaunchError(
                f"{attempt}: expected the folder that node 0 has written, found nothing in "
                f"{_VISIBLE_SECONDS:g} s; let `output` and `cache` be on storage that all nodes "
                "have at the same path"
            )
        time.sleep(0.2)


def _wait(seconds: float, signals: Sequence[int], job: Job) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if signals:
            raise Interrupted(signals[0], saved_text(job.start))
        time.sleep(0.1)


def _check(signals: Sequence[int]) -> None:
    if signals:
        raise Interrupted(signals[0])


def _result_json(job: Job, result: Result, reference: str | None) -> dict[str, Any]:
    return {
        "version": reference,
        "run_folder": str(job.folder),
        "artifact": str(job.attempt / result.artifact),
        "validation_loss": result.validation_loss,
        "scores": (scores_of(job.attempt) or {}).get("scores"),
    }


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
