"""A job, its progress and its result in words. Pure functions."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from launcher import estimate, evaluation
from launcher.estimate import Estimate
from launcher.job import Job
from launcher.publish import Result
from trainer.plan import Plan


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
    per_step = "step" if plan.devices == 1 else f"step, over all {plan.devices} devices"
    rows = {
        "base": f"{plan.model}, {config.base.weights} ({plan.base})",
        "trained": trained,
        "all-reduced": synced,
        "images": _images_text(job),
        **_shapes_row(plan),
        **_cache_row(job),
        "validation": validation,
        "global batch": (
            f"{plan.global_batch} images a {per_step} = {plan.devices} × "
            f"{plan.micro_batch} at once × {plan.accumulation} accumulated"
        ),
        "steps": (f"{plan.steps:,}" if plan.steps else "follow from the images")
        + (f", of which {plan.start_step:,} are done" if plan.start_step else ""),
        "learning rate": f"{plan.learning_rate:g}, {plan.schedule}{warm}; {optimizer.name}",
        "weight decay": (
            f"{optimizer.weight_decay:g}, on "
            + ("all LoRA matrices" if plan.train == "lora" else "every weight")
        ),
        "precision": (
            "fp32"
            if plan.precision == "fp32"
            else f"{plan.precision}, with the LoRA and its gradients in fp32"
        ),
        "devices": _devices_text(job),
        **_nodes_row(job),
        "evaluation": _evaluation_text(job),
        "run folder": str(job.folder),
        "published as": published if config.registry else "not published",
    }
    if plan.not_at_hand:
        rows["to start"] = f"needs {' and '.join(plan.not_at_hand)}"
    return "\n".join([f"plan of {plan.name}", *table(rows)])


def _evaluation_text(job: Job) -> str:
    config = job.config
    held_out = job.plan.validation_examples if job.plan.steps else None
    wanted, reason = config.evaluation, evaluation.problem(config, held_out)
    if wanted is None or reason:
        return f"none: {reason}"
    prompts = f"the prompts in {wanted.prompts}" if wanted.prompts else "held-out captions"
    times = f", {wanted.images_per_prompt} pictures each" if wanted.images_per_prompt > 1 else ""
    return (
        f"{prompts}{times}, with the LoRA and with the base, against the pictures in "
        f"{wanted.real or config.data.validation}"
    )


def _devices_text(job: Job) -> str:
    start, machine = job.start, job.machine
    product = f" ({job.product})" if job.product else ""
    text = f"{machine.device_target}{product} {', '.join(map(str, start.device_ids))}; "
    if start.msrun.local_worker_num == start.msrun.worker_num:
        text += f"port {start.msrun.master_port}; "
    threads = start.environment["OMP_NUM_THREADS"]
    text += f"{threads} thread{'' if threads == '1' else 's'} each"
    if start.cluster.bind_cores:
        text += ", bound to cores of their own"
    if start.cluster.bind_numa:
        text += ", bound to NUMA nodes"
    if machine.device_target == "CPU" and len(start.device_ids) > machine.cores:
        text += f"; {len(start.device_ids)} workers share {machine.cores} cores"
    return text


def _nodes_row(job: Job) -> dict[str, str]:
    run = job.start.msrun
    nodes = run.worker_num // run.local_worker_num
    if nodes == 1:
        return {}
    count = run.local_worker_num
    return {
        "nodes": f"{nodes}, each with {count} device{'' if count == 1 else 's'}; this is node "
        f"{run.node_rank}; node 0 is {run.master_addr}, port {run.master_port}"
    }


def _images_text(job: Job) -> str:
    plan = job.plan
    if not plan.examples:
        wanted = f"{plan.images:,} samples" if plan.images else f"{job.config.epochs:g} epochs"
        return f"not at hand; {wanted} of them"
    text = f"{plan.examples:,}, {plan.epochs:.4g} epochs: {plan.images:,} samples"
    if plan.repeated:
        text += f"; {plan.repeated:,} in each epoch again, to fill up batches of one shape"
    return text + (f"; {plan.notes} remarks, see lora-launch data-check" if plan.notes else "")


def _shapes_row(plan: Plan) -> dict[str, str]:
    if len(plan.shapes) < 2:
        return {}
    return {"shapes": ", ".join(f"{w} × {h} ({n:,})" for w, h, n in plan.shapes)}


def _cache_row(job: Job) -> dict[str, str]:
    if job.config.cache is None or job.config.data.crop == "random":
        return {"cache": "none: latents are computed at every step"}
    if job.plan.cached is None:
        return {"cache": job.config.cache}
    there, needed = job.plan.cached
    return {"cache": f"{job.config.cache}, has {there:,} of {needed:,} images"}


def dry_run_text(job: Job, found: list[Estimate] | None = None) -> str:
    """What would be started and with which environment, and what it is estimated to take."""
    parts = [
        "command",
        f"  {shlex.join(job.start.command)}",
        "environment added",
        *table(job.start.environment),
    ]
    if job.rank_table is not None:
        parts += ["rank table", job.rank_table.rstrip()]
    if found is not None:
        parts.append(estimate.text(found))
    return "\n".join(parts)


def dry_run_json(job: Job, found: list[Estimate] | None = None) -> dict[str, Any]:
    """The same and the plan as plain values."""
    return {
        "plan": job.plan.as_dict(),
        "device_ids": list(job.start.device_ids),
        "run_folder": str(job.folder),
        "command": list(job.start.command),
        "environment": job.start.environment,
        "rank_table": job.rank_table,
        **({} if found is None else {"estimate": estimate.as_json(found)}),
    }


def result_text(job: Job, result: Result) -> str:
    """What training has come to, a fact a line."""
    rows = {}
    if result.validation_loss:
        base, lora = result.validation_loss["base"], result.validation_loss["lora"]
        rows["validation loss"] = f"{base:.4f} → {lora:.4f} ({lora / base - 1:+.1%})"
        if result.published_step < result.steps:
            rows["validation loss"] += f", best at step {result.published_step} of {result.steps}"
    rows["time"] = (
        f"{clock(result.seconds['total'])}, of that training {clock(result.seconds['training'])}, "
        f"{result.images_per_second:.3g} images/s"
    )
    rows["memory"] = f"{result.peak_memory_bytes / 1e9:.1f} GB at most, on rank 0"
    if result.skipped_steps:
        rows["skipped"] = f"{result.skipped_steps} steps whose gradient was not finite"
    digest = result.rank_digests[0][:12]
    count = len(result.rank_digests)
    if count > 1:
        rows["weights"] = f"equal on all {count} ranks at the end, sha256 {digest}…"
        rows["all-reduced"] = f"{result.synced_bytes:,} bytes each step"
    rows["file"] = str(job.folder / job.attempt.name / result.artifact)
    return "\n".join([f"result of {job.plan.name}", *table(rows)])


def published_text(job: Job, scores: Mapping[str, Any] | None, reference: str | None) -> str:
    """What the evaluation has found, and where the LoRA is."""
    lines = []
    if scores is not None:
        rows = scores["table"]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [f"scores of {job.plan.name}, with 95 % intervals"]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append(f"  {'  '.join(cells)}".rstrip())
        lines += [f"  caution: {text}" for text in scores["cautions"]]
        lines.append(f"  see {scores['sheet']}")
    if reference:
        lines.append(f"published as {reference} in {job.config.registry}")
    return "\n".join(lines)


def seconds_left(step: Mapping[str, Any], global_batch: int) -> float | None:
    """Time to the last step at the present speed."""
    speed = step["images_per_second"]
    return (step["steps"] - step["step"]) * global_batch / speed if speed > 0 else None


def step_text(step: Mapping[str, Any], global_batch: int) -> str:
    """`loss 0.1234, 21.5 images/s, 2:03 left`."""
    return f"loss {step['loss']:.4f}, {speed_text(step, global_batch)}"


def speed_text(step: Mapping[str, Any], global_batch: int) -> str:
    """`21.5 images/s, 2:03 left`."""
    left = seconds_left(step, global_batch)
    left_text = "time unknown" if left is None else f"{clock(left)} left"
    return f"{step['images_per_second']:.3g} images/s, {left_text}"


def cache_text(event: Mapping[str, Any]) -> str:
    """`images cached, 12.3 a second, 1:02 left`."""
    speed = event["done"] / max(event["seconds"], 1e-9)
    left = clock((event["total"] - event["done"]) / speed)
    return f"{event['kind']} cached, {speed:.3g} a second, {left} left"


def remark(event: Mapping[str, Any]) -> str | None:
    """What is said once about an event, such as `validation loss 0.1234 at step 0`."""
    if event["event"] == "validation":
        quarters = ", ".join(f"{part:.4f}" for part in event["quarters"])
        return (
            f"validation loss {event['loss']:.4f} at step {event['step']} "
            f"(by quarter of the timesteps: {quarters})"
        )
    if event["event"] == "warning":
        return f"warning: {event['text']}"
    return None


def clock(seconds: float) -> str:
    """`2:03` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(rows: Mapping[str, str]) -> list[str]:
    """Indented lines, the values below each other."""
    width = max(map(len, rows))
    return [f"  {key:<{width}}  {value}" for key, value in rows.items()]
