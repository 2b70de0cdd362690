"""A job, its progress and its result in words. Pure functions."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from launcher.job import Job
from launcher.publish import Result


def plan_text(job: Job) -> str:
    """The plan, a fact a line."""
    config, plan = job.config, job.plan
    optimizer = config.optimizer
    if plan.train == "lora":
        places = "the UNet's attention" if config.lora.targets == "attention" else "the UNet"
        if config.lora.text_encoder:
            places += " and the text encoder"
        trained = (
            f"LoRA of rank {config.lora.rank} on {places}: {plan.trained_parameters:,} parameters"
        )
    else:
        trained = "every weight of UNet and text encoder"
    if plan.devices == 1:
        synced = "nothing, there is one device"
    elif plan.synced_bytes:
        synced = f"{plan.synced_bytes:,} bytes each step"
    else:
        synced = "every gradient, each step"
    warm = f" after {optimizer.warmup_steps} warm-up steps" if optimizer.warmup_steps else ""
    validation = (
        f"{plan.validation_examples} held-out images" if plan.validation_examples else "none"
    )
    published = f"{config.name} in {config.registry}, as its next version"
    rows = {
        "base": f"{plan.model}, {config.base.weights} ({plan.base})",
        "trained": trained,
        "all-reduced": synced,
        "images": f"{plan.examples:,}, seen {plan.epochs:.4g} times: {plan.images:,} samples",
        "validation": validation,
        "global batch": (
            f"{plan.global_batch} = {plan.devices} device{'' if plan.devices == 1 else 's'} × "
            f"{plan.micro_batch} images × {plan.accumulation} accumulation"
        ),
        "steps": f"{plan.steps:,}"
        + (f", of which {plan.start_step:,} are done" if plan.start_step else ""),
        "learning rate": f"{plan.learning_rate:g}, {plan.schedule}{warm}",
        "devices": (
            f"{job.machine.device_target} {', '.join(map(str, job.device_ids))}; "
            f"port {job.msrun.master_port}; {job.environment['OMP_NUM_THREADS']} threads each"
        ),
        "run folder": str(job.folder),
        "published as": published if config.registry else "not published",
    }
    return "\n".join([f"plan of {plan.name}", *table(rows)])


def dry_run_text(job: Job) -> str:
    """What would be started and with which environment."""
    parts = [
        "command",
        f"  {shlex.join(job.command)}",
        "environment added",
        *table(job.environment),
    ]
    if job.rank_table is not None:
        parts += ["rank table", job.rank_table.rstrip()]
    return "\n".join(parts)


def dry_run_json(job: Job) -> dict[str, Any]:
    """The same and the plan as plain values."""
    return {
        "plan": job.plan.as_dict(),
        "device_ids": list(job.device_ids),
        "run_folder": str(job.folder),
        "command": list(job.command),
        "environment": job.environment,
        "rank_table": job.rank_table,
    }


def result_text(job: Job, result: Result, reference: str | None) -> str:
    """What training has come to, a fact a line."""
    rows = {}
    if result.validation_loss:
        base, lora = result.validation_loss["base"], result.validation_loss["lora"]
        rows["validation loss"] = f"{base:.4f} → {lora:.4f} ({lora / base - 1:+.1%})"
    rows["time"] = (
        f"{clock(result.seconds['total'])}, of that training {clock(result.seconds['training'])}, "
        f"{result.images_per_second:.3g} images/s"
    )
    digest = result.rank_digests[0][:12]
    count = len(result.rank_digests)
    if count > 1:
        rows["weights"] = f"equal on all {count} ranks, sha256 {digest}…"
        rows["all-reduced"] = f"{result.synced_bytes:,} bytes each step"
    rows["file"] = str(job.folder / "attempt_1" / result.artifact)
    if reference:
        rows["published as"] = f"{reference} in {job.config.registry}"
    return "\n".join([f"result of {job.plan.name}", *table(rows)])


def seconds_left(step: Mapping[str, Any], global_batch: int) -> float | None:
    """Time to the last step at the present speed."""
    speed = step["images_per_second"]
    return (step["steps"] - step["step"]) * global_batch / speed if speed > 0 else None


def step_text(step: Mapping[str, Any], global_batch: int) -> str:
    """`loss 0.1234, 21.5 images/s, 2:03 left`."""
    left = seconds_left(step, global_batch)
    return (
        f"loss {step['loss']:.4f}, {step['images_per_second']:.3g} images/s, "
        f"{'time unknown' if left is None else clock(left) + ' left'}"
    )


def clock(seconds: float) -> str:
    """`2:03` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(rows: Mapping[str, str]) -> list[str]:
    """Indented lines, the values below each other."""
    width = max(map(len, rows))
    return [f"  {key:<{width}}  {value}" for key, value in rows.items()]
