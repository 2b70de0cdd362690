"""From the workers' result to a published version."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import Failure, RunFailed
from launcher.job import Job
from registry.api import open_registry


@dataclass(frozen=True)
class Result:
    """`result.json`, the last thing that the workers write."""

    artifact: str
    validation_loss: dict[str, float] | None
    published_step: int
    """The step whose weights are published: the best by validation loss."""
    images: int
    steps: int
    skipped_steps: int
    """Steps that changed nothing because the gradient was not finite."""
    trained_parameters: int
    synced_bytes: int
    """Bytes that one device puts into the all-reduce of one step."""
    rank_digests: tuple[str, ...]
    """sha256 of the trained weights on each rank."""
    base_digest: str
    data_digest: str
    seconds: dict[str, float]
    """"total", and of that "training": the steps, but for those that compiled first."""
    images_per_second: float
    """Of those steps."""
    peak_memory_bytes: int
    """Resident memory of rank 0 at its highest."""
    versions: dict[str, str]


def read_result(attempt: Path) -> Result:
    """The result of a run that ended well.

    Raises RunFailed if the ranks do not hold the same weights: then no rank's can be trusted.
    """
    values = json.loads((attempt / "result.json").read_text(encoding="utf-8"))
    result = Result(**{**values, "rank_digests": tuple(values["rank_digests"])})
    if len(set(result.rank_digests)) != 1:
        digests = ", ".join(
            f"rank {rank_id} {digest[:12]}…" for rank_id, digest in enumerate(result.rank_digests)
        )
        raise RunFailed(
            Failure(
                f"the ranks ended with different weights ({digests}), so nothing is published; the "
                f"LoRA of rank 0 is {attempt / result.artifact}"
            )
        )
    return result


def publish(job: Job, result: Result) -> str | None:
    """Push the LoRA and return its `name@version`; None if the config names no registry."""
    if job.config.registry is None:
        return None
    losses = result.validation_loss
    metrics = (
        {"validation_loss": losses["lora"], "validation_loss_base": losses["base"]}
        if losses
        else {}
    )
    manifest = open_registry(job.config.registry).push(
        job.config.name,
        job.attempt / result.artifact,
        metrics=metrics,
        metadata=lineage(job, result, _git_commit()),
    )
    return manifest.reference


def lineage(job: Job, result: Result, commit: str | None) -> dict[str, Any]:
    """Where the LoRA comes from: base, data, config, plan and software."""
    return {
        "base": {
            **job.config.base.model_dump(mode="json"),
            "model": job.plan.model,
            "digest": result.base_digest,
        },
        "data": {"digest": result.data_digest, "examples": job.plan.examples},
        "config": job.config.model_dump(mode="json"),
        "plan": job.plan.as_dict(),
        "seconds": result.seconds,
        "versions": result.versions,
        **({"git_commit": commit} if commit else {}),
    }


def _git_commit() -> str | None:
    """Commit of the working folder, if it lies in a git repository."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
