"""The training loop: one rank's work from the base's weights to the artifact."""

from __future__ import annotations

import hashlib
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np

from diffusion.images import DataError
from trainer import artifact, checkpoint
from trainer.checkpoint import State, Validation
from trainer.config import RunConfig
from trainer.dataset import Scan
from trainer.distributed import Group
from trainer.events import Events, write_json
from trainer.journal import DivergedError, Journal
from trainer.optimizer import learning_rate
from trainer.plan import Plan
from trainer.setup import Ready, batch_of, prepare, read_ahead
from trainer.telemetry import Telemetry, peak_memory
from trainer.validation import validation_losses
from weights.files import WeightsError

_OWN_STEPS = 10
"""So often a rank measures its own time; it then cannot work ahead."""


def train(
    config: RunConfig, plan: Plan, scan: Scan, group: Group, attempt: Path, events: Events
) -> None:
    """The whole run of one rank, from the base's weights to the artifact."""
    started = time.monotonic()
    ready = prepare(config, plan, scan, group, events)
    options, step, optimizer = config.optimizer, ready.step, ready.step.optimizer
    names = _parameter_names(ready)
    validation, seconds = _resume(plan, ready, names)
    journal = Journal(plan, events, seconds)
    checkpoints = attempt.parent / "checkpoints"
    asked_to_stop = _termination()
    telemetry = Telemetry(config.name, group.rank_id)

    def validate(done: int) -> Validation:
        with journal.apart("validating"), _averaged(ready, options.ema_decay):
            parts = validation_losses(
                ready.loss,
                scan.validation,
                ready.latents,
                ready.text,
                ready.sampling,
                group,
                plan.micro_batch,
            )
            value = float(np.mean(parts))
            events.emit("validation", step=done, loss=value, quarters=parts)
        return validation.with_loss(value, done)

    def save(done: int) -> bool:
        """Write a checkpoint; False if the disk is full."""
        with journal.apart("saving"):
            _check_agreement(group, optimizer.weights(), done)
            if group.rank_id != 0:
                return True
            state = State(
                step=done,
                images=done * plan.global_batch,
                parameters=names,
                config=config.model_dump(mode="json"),
                base_digest=plan.base_digest,
                data_digest=plan.data_digest,
                seconds=journal.seconds,
                validation=validation,
            )
            begun = time.monotonic()
            try:
                with telemetry.timed("checkpoint"):
                    path = checkpoint.save(
                        checkpoints, state, step.vectors(), config.keep_checkpoints
                    )
            except WeightsError as error:  # the disk is full: the next one may find room
                events.emit("warning", step=done, text=f"no checkpoint of step {done}: {error}")
                return False
            events.emit(
                "checkpoint",
                step=done,
                bytes=path.stat().st_size,
                seconds=time.monotonic() - begun,
            )
            return True

    def draw(done: int) -> None:
        if ready.draw is not None:
            with journal.apart("drawing"), _averaged(ready, options.ema_decay):
                ready.draw(attempt.parent / "samples" / f"step_{done:08d}.png")

    if plan.start_step == 0:
        if scan.validation.examples:
            validation = validate(0)
        draw(0)
    done, compiled, stepped = plan.start_step, set(), set()
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read_ahead, ready, scan, plan, group.rank_id, done)
        while done < plan.steps:
            events.beat(mark=2 * done)
            measured = done % _OWN_STEPS == 0
            if measured:
                journal.settle(0)
            begun, own = time.monotonic(), None
            with telemetry.timed("data"):
                batches = [batch_of(ready, part) for part in ahead.result()]
            following = min(done + 1, plan.steps - 1)
            ahead = pool.submit(read_ahead, ready, scan, plan, group.rank_id, following)
            rate = learning_rate(
                done, plan.steps, options.peak, options.warmup_steps, options.schedule
            )
            decay = min(options.ema_decay, (1 + done) / (10 + done))
            shape = batches[0].noisy.shape
            if shape not in compiled:
                with journal.apart("compiling"), ready.compiled.used(shape):
                    result = step(batches, rate, decay, bool(asked_to_stop))
                    result.asnumpy()
                journal.add(done, result, compiled=True)
                compiled.add(shape)
                events.emit("compiled", step=done + 1, seconds=time.monotonic() - begun)
            else:
                gathered = step.accumulate(batches, bool(asked_to_stop))
                if measured:  # what follows waits for the slowest rank
                    gathered.asnumpy()
                    own = time.monotonic() - begun
                    events.beat(own=own)
                    telemetry.took("own", own)
                    telemetry.look()
                journal.add(done, step.update(rate, decay))
            events.beat(mark=2 * done + 1)
            done += 1
            if measured and own is not None:
                journal.settle(0)
                telemetry.took("others", time.monotonic() - begun - own)
            journal.settle(1)
            if shape in stepped:
                telemetry.took("step", time.monotonic() - begun)
            stepped.add(shape)
            if _due(done, plan.validate_steps) or (
                done == plan.steps and validation.before is not None
            ):
                validation = validate(done)
            if _due(done, plan.sample_steps) or done == plan.steps:
                draw(done)
            if done < plan.steps and (
                _due(done, config.save_every) or validation.best_step == done
            ):
                save(done)
            if journal.stop and done < plan.steps:
                break  # after what is due at this step, so that nothing of it is missing later
            if config.patience and validation.not_better >= config.patience:
                break
    journal.settle(0)
    if journal.stop and done < plan.steps:
        if not save(done):
            raise DataError(
                f"the run was asked to stop after step {done}, but the disk is full; free some "
                "space and resume from the checkpoint before"
            )
        if group.rank_id == 0:
            write_json(attempt / "stopped.json", {"step": done, "steps": plan.steps})
        return

    events.phase("saving")
    digests = _rank_digests(group, optimizer.weights())
    if group.rank_id != 0:
        return
    published = validation.best_step or done
    best = checkpoint.path_of(checkpoints, published)
    if published != done and best.is_file():
        optimizer.restore(checkpoint.read_vectors(best))
    elif published != done:
        text = f"the best step, {published}, could not be saved; the last one is published"
        events.emit("warning", step=done, text=text)
        published, validation = done, replace(validation, best=validation.last)
    _save_artifact(config, plan, ready, attempt)
    after = validation.last if validation.best is None else validation.best
    losses = {"base": validation.before, "lora": after}
    write_json(
        attempt / "result.json",
        {
            "artifact": "lora.safetensors" if config.train == "lora" else "base",
            "validation_loss": losses if validation.before is not None else None,
            "published_step": published,
            "images": done * plan.global_batch,
            "steps": done,
            "skipped_steps": journal.skipped,
            "trained_parameters": optimizer.size,
            "synced_bytes": step.synced_bytes if group.world_size > 1 else 0,
            "rank_digests": digests,
            "base_digest": plan.base_digest,
            "data_digest": plan.data_digest,
            "seconds": {
                "training": journal.seconds,
                "total": time.monotonic() - started,
            },
            "images_per_second": journal.images_per_second,
            "peak_memory_bytes": peak_memory(),
            "versions": {"mindspore": ms.__version__, "numpy": np.__version__},
        },
    )


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


def _termination() -> list[int]:
    """A list that is empty until this process is asked to end (SIGTERM)."""
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    return received


def _parameter_names(ready: Ready) -> tuple[tuple[str, int], ...]:
    """Name and size of each trained tensor, in the order of the vectors."""
    return tuple(
        (f"{network}.{parameter.name}", parameter.size)
        for network, found in ready.trained.items()
        for parameter in found
    )


def _resume(
    plan: Plan, ready: Ready, names: tuple[tuple[str, int], ...]
) -> tuple[Validation, float]:
    """Put back the checkpoint that the plan names; what was measured, and seconds of training."""
    if plan.resume_from is None:
        return Validation(), 0.0
    path = Path(plan.resume_from)
    state = checkpoint.read_state(path)
    if state.parameters != names:
        raise DataError(
            f"{path}: this checkpoint is of other tensors than the config trains; resume with the "
            "config that it was made with"
        )
    vectors = checkpoint.read_vectors(path)
    if vectors.keys() != ready.step.vectors().keys():
        raise DataError(
            f"{path}: this checkpoint is of another optimizer than the config asks for; resume "
            "with optimizer.name as it was"
        )
    ready.step.restore(vectors)
    return state.validation, state.seconds


@contextmanager
def _averaged(ready: Ready, ema_decay: float) -> Iterator[None]:
    """With the average of the weights in their place, if there is one."""
    if not ema_decay:
        yield
        return
    optimizer = ready.step.optimizer
    weights = optimizer.weights()
    optimizer.set_weights(optimizer.average.asnumpy())
    try:
        yield
    finally:
        optimizer.set_weights(weights)


def _rank_digests(group: Group, weights: np.ndarray) -> list[str]:
    """sha256 of the trained weights of each process."""
    own = hashlib.sha256(weights.tobytes()).digest()
    rows = group.gather(np.frombuffer(own, np.uint8))
    return [bytes(row.astype(np.uint8)).hex() for row in rows]


def _check_agreement(group: Group, weights: np.ndarray, done: int) -> None:
    """Raise DivergedError if the processes do not hold the same weights."""
    digests = _rank_digests(group, weights)
    usual = max(digests, key=digests.count)
    others = [str(rank_id) for rank_id, digest in enumerate(digests) if digest != usual]
    if others:
        majority = len(others) < len(digests) / 2
        odd = f"rank {', '.join(others)}" if majority else "the ranks differ: those of some"
        raise DivergedError(
            f"after step {done} the weights of {odd} are not those of the others; the last "
            "checkpoint is from before; look for a fault of a device, then resume"
        )


def _save_artifact(config: RunConfig, plan: Plan, ready: Ready, attempt: Path) -> None:
    """The trained weights, or their average, as a file of their own."""
    optimizer = ready.step.optimizer
    averaged = config.optimizer.ema_decay > 0
    vector = optimizer.average.asnumpy() if averaged else optimizer.weights()
    arrays = iter(optimizer.split(vector))
    tensors = {
        network: {parameter.name: next(arrays) for parameter in parameters}
        for network, parameters in ready.trained.items()
    }
    if config.train == "lora":
        path = attempt / "lora.safetensors"
        digests = plan.base_digest, plan.data_digest
        artifact.save_lora(path, tensors, config, plan.model, ready.model, *digests)
    else:
        artifact.save_base(attempt / "base", tensors)
