"""`lora-launch submit`: a run as a job of Kubernetes or Slurm, written or sent."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath

from cluster import kubernetes, names, slurm
from cluster.kubernetes import PRODUCTS, KubernetesJob
from cluster.slurm import SlurmJob
from launcher.errors import LaunchError
from trainer.config import RunConfig
from trainer.config_file import dump_config, load_config

_SECONDS = 120
_USER_AND_PASSWORD = re.compile(r"://[^/\s@]*:[^/\s@]*@")


@dataclass(frozen=True)
class SubmitRequest:
    """What the user asked for."""

    config: Path
    to: str
    """"kubernetes" or "slurm"."""
    overrides: Sequence[str] = ()
    nodes: int = 1
    devices_per_node: int = 8
    folder: Path = Path("submitted")
    kind: str = "ascendjob"
    """"ascendjob" or "volcano"."""
    product: str = "A2"
    image: str | None = None
    namespace: str = "default"
    volumes: Sequence[str] = ()
    """CLAIM:PATH."""
    secrets: Sequence[str] = ()
    partition: str | None = None


@dataclass(frozen=True)
class Submission:
    """A job, its files' text and how it is sent."""

    job: str
    files: Mapping[Path, str]
    command: Sequence[str]
    notes: Sequence[str]
    """What the user had better look at, a sentence each."""
    stdin: str | None = None


def plan_submission(request: SubmitRequest, now: datetime) -> Submission:
    """Decide everything, write nothing. Raises ConfigError, ClusterError or LaunchError."""
    config = load_config(request.config, request.overrides)
    job = names.job_name(config.name, f"{now:%Y%m%d-%H%M%S}")
    text = dump_config(config)
    if _USER_AND_PASSWORD.search(text):
        raise LaunchError(
            f"{request.config}: expected no passwords, found an address with one; put it into a "
            "Secret or the environment and take it out"
        )
    if request.to == "slurm":
        return _for_slurm(request, config, text, job)
    return _for_kubernetes(request, config, text, job)


def write(submission: Submission) -> None:
    """Write the files, each whole or not at all. Raises LaunchError."""
    for path, text in submission.files.items():
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise LaunchError(
                f"{path}: cannot write: {error.strerror}; name another folder with --out"
            ) from error


def send(submission: Submission) -> str:
    """Hand the job over; returns the answer. Raises LaunchError if that fails."""
    program = submission.command[0]
    shown = " ".join(submission.command)
    try:
        done = subprocess.run(
            submission.command,
            input=submission.stdin,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except FileNotFoundError as error:
        raise LaunchError(
            f"{program}: expected it on PATH, found none; install it, or leave --apply out and "
            "send the file from where it is"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"{shown}: expected an answer within {_SECONDS} s, found none; see whether the job "
            "was taken before sending it again"
        ) from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or "nothing"
        raise LaunchError(
            f"{shown}: expected exit code 0, found {done.returncode} and: {said}; the files are "
            "written, correct the cause and send them"
        )
    return done.stdout.strip()


def _for_kubernetes(request: SubmitRequest, config: RunConfig, text: str, job: str) -> Submission:
    if request.image is None:
        raise LaunchError(
            "--image: expected the image that has lora-launch in it, found none; name one"
        )
    product = PRODUCTS[request.product]
    if request.devices_per_node > product.most_devices:
        raise LaunchError(
            f"--devices-per-node {request.devices_per_node}: a server of {request.product} has "
            f"{product.most_devices} devices; use at most so many"
        )
    volumes = [names.volume(volume) for volume in request.volumes]
    if not _on_a_volume(config.output, volumes):
        raise LaunchError(
            f"output: expected a folder on a volume, where checkpoints outlive the pod, found "
            f"{config.output}; add --volume CLAIM:/data and --set output=/data/runs"
        )
    described = KubernetesJob(
        name=job,
        namespace=names.checked("namespace", request.namespace),
        image=names.checked("image", request.image),
        nodes=request.nodes,
        devices_per_node=request.devices_per_node,
        product=product,
        config=text,
        runs=str(PurePosixPath(config.output) / job),
        volumes=volumes,
        secrets=[names.checked("secret", secret) for secret in request.secrets],
    )
    kinds = {"ascendjob": kubernetes.ascend_job, "volcano": kubernetes.volcano_job}
    manifest = kubernetes.dump(kinds[request.kind](described))
    notes = [
        f"{key}: {path} is on no volume, so the image has to hold it"
        for key, path in _inputs(config).items()
        if not _on_a_volume(path, volumes)
    ]
    if config.registry is not None and not _on_a_volume(config.registry, volumes):
        notes.append(f"registry: {config.registry} is on no volume, the LoRA ends with the pod")
    path = request.folder / f"{job}.yaml"
    return Submission(job, {path: manifest}, ("kubectl", "apply", "-f", "-"), notes, manifest)


def _for_slurm(request: SubmitRequest, config: RunConfig, text: str, job: str) -> Submission:
    folder = request.folder.absolute()
    partition = request.partition
    described = SlurmJob(
        name=job,
        nodes=request.nodes,
        folder=os.getcwd(),
        config=str(folder / f"{job}.config.yaml"),
        output=str(Path(config.output).absolute()),
        log=str(folder / f"{job}-%j.log"),
        launch=[
            *(_lora_launch(), "--devices", str(request.devices_per_node)),
            *("--max-restarts", "3"),
        ],
        partition=None if partition is None else names.checked("partition", partition),
    )
    script = request.folder / f"{job}.sbatch"
    files = {request.folder / f"{job}.config.yaml": text, script: slurm.script(described)}
    return Submission(job, files, ("sbatch", "--parsable", str(script)), ())


def _lora_launch() -> str:
    """This program, as the other nodes can start it too."""
    beside = Path(sys.executable).with_name("lora-launch")
    return str(beside) if beside.is_file() else shutil.which("lora-launch") or "lora-launch"


def _inputs(config: RunConfig) -> dict[str, str]:
    """What a run reads, by key."""
    found = {"base.weights": config.base.weights}
    found |= {f"data.train.{n}.folder": one.folder for n, one in enumerate(config.data.train)}
    if config.data.validation is not None:
        found["data.validation"] = config.data.validation
    return found


def _on_a_volume(path: str, volumes: Sequence[tuple[str, str]]) -> bool:
    place = PurePosixPath(path)
    return "://" in path or any(place.is_relative_to(mounted) for _, mounted in volumes)
