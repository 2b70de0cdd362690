"""From the workers' result to a published version."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launcher import evaluation
from launcher.errors import Failure, LaunchError, RunFailed
from launcher.job import Job, attempts
from launcher.status import State
from registry import queue
from registry.api import open_registry
from registry.errors import RegistryError
from trainer.events import write_json

_PUBLISHED = "published.json"


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


def publish(job: Job, result: Result, signals: Sequence[int] = ()) -> str | None:
    """Score the LoRA, push it and return its `name@version`; None if the config names no registry.

    What is to be done is written down before, so that `finish` can do it again. Raises LaunchError,
    or Interrupted.
    """
    evaluation.ask_for(job, result.artifact)
    if job.config.registry is not None:
        queue.write(job.attempt, _push(job, result, job.config.registry))
    return finish(job.folder, job.attempt, signals)


def _push(job: Job, result: Result, registry: str) -> queue.Push:
    losses = result.validation_loss
    metrics = (
        {"validation_loss": losses["lora"], "validation_loss_base": losses["base"]}
        if losses
        else {}
    )
    return queue.Push(
        registry if registry.startswith("s3://") else os.path.abspath(registry),
        job.config.name,
        result.artifact,
        metrics=metrics,
        metadata=lineage(job, result, _code()),
        evaluation={"validation": _how_validated(job)} if losses else {},
        samples=_pictures(job, result),
    )


def unfinished(folder: Path) -> Path | None:
    """The newest attempt of a run, if what it trained is still to be scored or published."""
    found = attempts(folder)
    if not found:
        return None
    attempt = found[-1]
    to_publish = queue.is_written(attempt) and not (attempt / _PUBLISHED).exists()
    return attempt if to_publish or evaluation.is_asked_for(attempt) else None


def finish(
    folder: Path, attempt: Path, signals: Sequence[int] = (), evaluate: bool = True
) -> str | None:
    """Do what `publish` has written down, each part once, and return the `name@version`; None if
    nothing is to be published.

    Raises LaunchError if the evaluation fails, or the registry does not take the LoRA.
    """
    if not evaluate:
        evaluation.forget(attempt)
    scores = evaluation.evaluate(folder, attempt, signals)
    if not queue.is_written(attempt):
        return None
    if not (attempt / _PUBLISHED).exists():
        push = queue.read(attempt)
        if scores is not None:
            push = _with_scores(push, scores, attempt)
        queue.write(attempt, replace(push, report=_report(folder, attempt)))
    return _send(folder, attempt)


def _with_scores(push: queue.Push, scores: dict[str, Any], attempt: Path) -> queue.Push:
    """A push with what `lora-eval` has said."""
    sheet = os.path.relpath(scores["sheet"], attempt)
    return replace(
        push,
        metrics={**push.metrics, **scores["scores"]},
        evaluation={**push.evaluation, **scores["evaluation"]},
        samples=tuple(dict.fromkeys((sheet, *push.samples))),
    )


def _report(folder: Path, attempt: Path) -> str | None:
    """Write the page about the run that goes with the version; its name, seen from the attempt.
    None if there is none: no LoRA stays unpublished because of it."""
    from launcher.report import report_html
    from launcher.report_command import read_facts

    state, path = State("finished", "trained, and published with this page", False), "report.html"
    try:
        facts = replace(read_facts(folder, time.time()), state=state)
        (attempt / path).write_text(report_html(facts), encoding="utf-8")
    except (LaunchError, OSError):
        return None
    return path


def _send(folder: Path, attempt: Path) -> str:
    """Push what is written down, once. Raises LaunchError."""
    try:
        registry = open_registry(queue.read(attempt).location)
        reference = queue.send(registry, attempt).reference
    except RegistryError as error:
        raise LaunchError(
            f"{error}; the LoRA is trained and lies in {attempt}: publish it with lora-launch "
            f"--resume {folder}"
        ) from error
    write_json(attempt / _PUBLISHED, {"reference": reference, "registry": registry.location})
    return reference


def lineage(job: Job, result: Result, code: dict[str, Any] | None) -> dict[str, Any]:
    """Where the LoRA comes from: base, data, config, plan, machines and software."""
    config = job.config
    facts = {
        "base": {
            **config.base.model_dump(mode="json"),
            "model": job.plan.model,
            "digest": result.base_digest,
        },
        "data": {"digest": result.data_digest, "examples": job.plan.examples},
        "trigger_words": list(config.trigger_words),
        "licence": config.licence,
        "parent": job.parent,
        "seed": config.seed,
        "images": result.images,
        "steps": result.steps,
        "published_step": result.published_step,
        "seconds": result.seconds,
        "devices": {
            "count": job.plan.devices,
            "target": job.plan.device_target,
            "product": job.product,
        },
        "code": code,
        "versions": {**result.versions, "ascend-lora": version("ascend-lora")},
        "config": config.model_dump(mode="json"),
        "plan": job.plan.as_dict(),
    }
    return {key: value for key, value in facts.items() if value not in (None, [])}


def _how_validated(job: Job) -> dict[str, Any]:
    """How the validation loss was measured; it weighs timesteps as the training does."""
    config = job.config
    return {
        "metrics": ["validation_loss"],
        "validation_digest": job.data.validation.digest(),
        "validation_images": job.plan.validation_examples,
        "base_digest": job.plan.base_digest,
        "min_snr_gamma": config.min_snr_gamma,
        "noise_offset": config.noise_offset,
        "zero_terminal_snr": config.zero_terminal_snr,
    }


def _pictures(job: Job, result: Result) -> tuple[str, ...]:
    """What was drawn with the weights that are published, or the last before, seen from the
    attempt."""
    drawn = sorted((job.folder / "samples").glob("step_*.png"))
    last = f"step_{result.published_step:08d}.png"
    fitting = [path.name for path in drawn if path.name <= last]
    return (f"../samples/{fitting[-1]}",) if fitting else ()


def _code() -> dict[str, Any] | None:
    """Commit of the working folder, and whether it is all that is there, if it lies in a git
    repository."""

    def git(*words: str) -> str:
        found = subprocess.run(["git", *words], capture_output=True, text=True, check=True)
        return found.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "clean": not git("status", "--porcelain")}
    except (OSError, subprocess.CalledProcessError):
        return None
