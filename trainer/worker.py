"""One rank of a run: `python -m trainer.worker ATTEMPT_DIR`, started by msrun.

ATTEMPT_DIR holds config.yaml and plan.json; events.jsonl, the artifact and result.json, or an
error file, appear there.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, nn

from diffusion import models
from diffusion.config import load_model_config
from diffusion.lora import inject, lora_masks, lora_parameters
from diffusion.tokenizer import Tokenizer, clip_vocabulary
from trainer import artifact, checkpoint
from trainer.batches import Batch, Sampling, training_batch, validation_batch
from trainer.config import RunConfig
from trainer.config_file import load_config
from trainer.data import EncodedData, encode
from trainer.distributed import Group
from trainer.events import Events, write_error, write_json
from trainer.images import DataError
from trainer.optimizer import FlatAdamW, learning_rate
from trainer.plan import (
    Plan,
    open_run_base,
    training_examples,
    validation_examples,
)
from trainer.step import DiffusionLoss, TrainStep

LOG_SECONDS = 0.5


class DivergedError(DataError):
    """The loss is no longer a number."""


def train(config: RunConfig, plan: Plan, group: Group, attempt: Path, events: Events) -> None:
    """The whole run of one rank, from the base's weights to the artifact."""
    started = time.monotonic()
    events.phase("loading base")
    model = load_model_config(plan.model)
    base = open_run_base(config)
    ms.set_seed(config.seed)
    unet, vae, text_encoder = (
        models.build(model, network)
        if network in config.base.initialise
        else models.load(model, base, network, config.base.allow_nan)
        for network in ("unet", "vae", "text_encoder")
    )
    trained = _trained(config, plan, unet, text_encoder)
    trains_text = "text_encoder" in trained
    masks = [mask for network in (unet, text_encoder) for mask in lora_masks(network)]

    events.phase("encoding images")
    resolution = config.data.resolution or model.resolution
    tokenizer = Tokenizer(clip_vocabulary(), model.text_encoder.pad_token_id)
    frozen_text = None if trains_text else text_encoder
    encoded = [
        encode(group, examples, resolution, vae, model.vae.scaling_factor, tokenizer, frozen_text)
        if examples
        else None
        for examples in (training_examples(config), validation_examples(config))
    ]
    data, held_out = encoded
    del vae

    loss = DiffusionLoss(unet, text_encoder if trains_text else None)
    parameters = [parameter for found in trained.values() for parameter in found]
    options = config.optimizer
    optimizer = FlatAdamW(
        parameters, options.betas, options.eps, options.weight_decay, options.max_grad_norm
    )
    step = TrainStep(loss, optimizer, masks, plan.accumulation, plan.devices)
    sampling = Sampling(
        config.seed,
        model.prediction_type,
        config.data.caption_dropout,
        config.min_snr_gamma,
        config.noise_offset,
        config.lora.dropout,
        config.lora.rank,
        len(masks),
    )

    def micro_batches(number: int) -> list[Batch]:
        """This rank's part of global batch `number`: every accumulation's slice of it."""
        size, chunk = plan.micro_batch, plan.micro_batch * group.world_size
        first = number * plan.global_batch + group.rank_id * size
        return [
            training_batch(data, sampling, first + i * chunk, size)
            for i in range(plan.accumulation)
        ]

    def validate(number: int) -> float | None:
        if held_out is None:
            return None
        value = validation_loss(loss, held_out, model.prediction_type, group, plan.micro_batch)
        events.emit("validation", step=number, loss=value)
        return value

    names = tuple(
        (f"{network}.{parameter.name}", parameter.size)
        for network, found in trained.items()
        for parameter in found
    )
    resumed = None
    if plan.resume_from is not None:
        resumed = checkpoint.read_state(Path(plan.resume_from))
        if resumed.parameters != names:
            raise DataError(
                f"{plan.resume_from}: this checkpoint is of other tensors than the config trains; "
                "resume with the config that it was made with"
            )
        optimizer.restore(checkpoint.read_vectors(Path(plan.resume_from)))
    seconds_before = resumed.seconds if resumed else 0.0

    def save_checkpoint(done: int) -> None:
        """What `--resume` goes on from, and the LoRA as it is."""
        if group.rank_id != 0:
            return
        seconds = seconds_before + time.monotonic() - training_started
        state = checkpoint.State(
            step=done,
            images=done * plan.global_batch,
            parameters=names,
            config=config.model_dump(mode="json"),
            base_digest=plan.base_digest,
            data_digest=plan.data_digest,
            validation_loss_before=loss_before,
            seconds=seconds,
        )
        folder = attempt.parent / "checkpoints"
        checkpoint.save(folder, state, optimizer.vectors(), config.keep_checkpoints)
        save()
        events.emit("checkpoint", step=done)

    def save() -> None:
        if group.rank_id != 0:
            return
        tensors = _arrays(trained, optimizer, averaged=options.ema_decay > 0)
        if config.train == "lora":
            path = attempt / "lora.safetensors"
            artifact.save_lora(path, tensors, config, plan.model, model, plan.base_digest)
        else:
            artifact.save_base(attempt / "base", tensors)

    events.phase("validating")
    loss_before = resumed.validation_loss_before if resumed else validate(0)
    events.phase("compiling")
    training_started = logged = time.monotonic()
    pending: list[tuple[int, float, ms.Tensor]] = []

    def log() -> None:
        """Report the steps since the last report; the one place where the host waits."""
        elapsed = time.monotonic() - training_started
        for number, rate, outcome in pending:
            value, norm = (float(x) for x in outcome.asnumpy())
            if not np.isfinite(value):
                raise DivergedError(
                    f"the loss is {value} at step {number + 1}; use a smaller "
                    "optimizer.learning_rate"
                )
            events.emit(
                "step",
                step=number + 1,
                steps=plan.steps,
                images=(number + 1) * plan.global_batch,
                loss=value,
                gradient_norm=norm,
                learning_rate=rate,
                images_per_second=(number - plan.start_step) * plan.global_batch / elapsed,
            )
        pending.clear()

    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(micro_batches, plan.start_step)
        for number in range(plan.start_step, plan.steps):
            batches = upcoming.result()
            upcoming = pool.submit(micro_batches, min(number + 1, plan.steps - 1))
            rate = learning_rate(
                number, plan.steps, options.learning_rate, options.warmup_steps, options.schedule
            )
            decay = min(options.ema_decay, (1 + number) / (10 + number))
            pending.append((number, rate, step(batches, number + 1, rate, decay)))
            now = time.monotonic()
            first = number == plan.start_step
            if first or number == plan.steps - 1 or now - logged >= LOG_SECONDS:
                logged = now
                log()
            if first:
                events.phase("training")
                training_started = time.monotonic()
            if (number + 1) % config.save_every == 0 and number + 1 < plan.steps:
                log()
                save_checkpoint(number + 1)
    training_seconds = seconds_before + time.monotonic() - training_started
    events.phase("validating")
    loss_after = validate(plan.steps)
    events.phase("saving")
    own = hashlib.sha256(b"".join(p.asnumpy().tobytes() for p in parameters)).digest()
    rank_digests = group.gather(
        np.frombuffer(own, np.uint8)[None].astype(np.float32), group.world_size
    )
    save()
    if group.rank_id != 0:
        return
    measured = loss_before is not None
    write_json(
        attempt / "result.json",
        {
            "artifact": "lora.safetensors" if config.train == "lora" else "base",
            "validation_loss": {"base": loss_before, "lora": loss_after} if measured else None,
            "images": plan.images,
            "steps": plan.steps,
            "trained_parameters": optimizer.size,
            "synced_bytes": step.synced_bytes if group.world_size > 1 else 0,
            "rank_digests": [bytes(row.astype(np.uint8)).hex() for row in rank_digests],
            "base_digest": plan.base_digest,
            "data_digest": plan.data_digest,
            "seconds": {
                "training": training_seconds,
                "total": time.monotonic() - started,
            },
            "versions": {"mindspore": ms.__version__, "numpy": np.__version__},
        },
    )


def _trained(
    config: RunConfig, plan: Plan, unet: nn.Cell, text_encoder: nn.Cell
) -> dict[str, list[Parameter]]:
    """The trained parameters of each network that has some; everything else is frozen."""
    if config.train == "all":
        return {"unet": unet.trainable_params(), "text_encoder": text_encoder.trainable_params()}
    lora = config.lora
    targets = {"unet": (unet, lora.targets)}
    if lora.text_encoder:
        targets["text_encoder"] = (text_encoder, "text_encoder")
    batch = plan.micro_batch if lora.dropout else None
    found = {}
    for name, (network, taken) in targets.items():
        inject(network, taken, lora.rank, lora.scale * lora.rank, config.seed, batch)
        found[name] = lora_parameters(network)
    return found


def _arrays(
    trained: dict[str, list[Parameter]], optimizer: FlatAdamW, averaged: bool
) -> dict[str, dict[str, np.ndarray]]:
    """The trained weights, or their average, by network and parameter name."""
    average = np.split(optimizer.average.asnumpy(), np.cumsum(optimizer.sizes)[:-1])
    remaining = iter(average)
    return {
        network: {
            parameter.name: next(remaining).reshape(parameter.shape)
            if averaged
            else parameter.asnumpy()
            for parameter in parameters
        }
        for network, parameters in trained.items()
    }


def validation_loss(
    loss: DiffusionLoss, held_out: EncodedData, prediction_type: str, group: Group, size: int
) -> float:
    """Mean loss over fixed noise and timesteps of the held-out images, on all devices together."""
    samples = 4 * held_out.examples
    mine = list(group.share(samples))
    loss.set_train(False)
    total = 0.0
    for start in range(0, len(mine), size):
        numbers = mine[start : start + size]
        padded = numbers + numbers[-1:] * (size - len(numbers))
        batch = validation_batch(held_out, prediction_type, padded)
        weights = np.where(np.arange(size) < len(numbers), np.float32(size), np.float32(0))
        inputs = (batch.noisy, batch.timesteps, batch.text, batch.target, weights)
        total += float(loss(*(ms.Tensor(array) for array in inputs)).asnumpy())
    return float(group.sum(np.array([total]))[0]) / samples


def main() -> None:
    """Entry point of a worker process; exits 1 after writing its error file."""
    attempt = Path(sys.argv[1])
    rank_id = int(os.environ.get("RANK_ID", 0))
    try:
        plan = Plan(**json.loads((attempt / "plan.json").read_text()))
        config = load_config(attempt / "config.yaml")
        group = Group(plan.device_target)
        rank_id = group.rank_id
        train(config, plan, group, attempt, Events(attempt, rank_id))
    except Exception as error:
        write_error(attempt, rank_id, error)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
