"""Everything that a rank needs before its first step: networks, caches, optimizer."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, nn

from diffusion.config import ModelConfig, load_model_config
from diffusion.lora import lora_masks
from diffusion.models import (
    in_batches,
    recompute,
    transform_convolutions,
    use_flash_attention,
)
from diffusion.pipeline import Pipeline
from diffusion.tokenizer import Tokenizer, clip_vocabulary
from trainer.batches import Batch, Draws, Order, Sampling, assemble, training_draws
from trainer.compiled import CompiledStep
from trainer.config import RunConfig
from trainer.data import (
    ENCODE_BATCH,
    CachedLatents,
    EncodedLatents,
    Latents,
    Text,
    cached_text,
    fill_latents,
    fill_text,
)
from trainer.dataset import Scan
from trainer.distributed import Group
from trainer.events import Events
from trainer.networks import load_network, prepare_trained
from trainer.optimizer import make_optimizer
from trainer.plan import Plan, open_run_base, run_cache
from trainer.samples import draw_samples
from trainer.step import DiffusionLoss, TrainStep

Ahead = tuple[Draws, np.ndarray, np.ndarray | None, np.ndarray]
"""What is read of a micro-batch while the step before it runs."""


@dataclass(frozen=True)
class Ready:
    """A rank that can start training."""

    model: ModelConfig
    trained: dict[str, list[Parameter]]
    """The trained parameters of each network."""
    loss: DiffusionLoss
    step: TrainStep
    order: Order
    sampling: Sampling
    latents: Latents
    text: Text
    compiled: CompiledStep
    draw: Callable[[Path], None] | None
    """Draws the pictures of `samples` into a file; None if none are asked for."""


def prepare(config: RunConfig, plan: Plan, scan: Scan, group: Group, events: Events) -> Ready:
    """Load the base, fill the caches, free what they replace, and build the step."""
    events.phase("loading base")
    model = load_model_config(plan.model)
    base = open_run_base(config)
    ms.set_seed(config.seed)

    def load(network: str) -> nn.Cell:
        return load_network(config, plan, model, base, network)

    def load_vae(part: str) -> nn.Cell:
        return transform_convolutions(load("vae"), part)

    cache = run_cache(config, plan)
    trains_text = config.train == "all" or config.lora.text_encoder
    text_in_step = trains_text or config.data.shuffle_captions or cache is None
    tokenizer = Tokenizer(clip_vocabulary(), model.text_encoder.pad_token_id)
    examples = [*scan.training.examples, *scan.validation.examples]

    latents: Latents
    if cache is None or config.data.crop == "random":
        latents = EncodedLatents(load_vae("encoder"), config.data.masks, model.vae.factor)
    else:
        events.phase("encoding images")
        report = events.cache("images")
        encoder, factor = lambda: load_vae("encoder"), model.vae.factor
        fill_latents(group, cache, examples, encoder, factor, report)
        latents = CachedLatents(cache)
    text: Text
    text_encoder = load("text_encoder") if text_in_step else None
    if text_encoder is not None or cache is None:
        text = tokenizer
    else:
        events.phase("encoding captions")
        prompts = config.samples.prompts if config.samples else ()
        captions = sorted({"", *prompts, *(example.caption for example in examples)})
        fill_text(
            group,
            cache,
            captions,
            tokenizer,
            lambda: load("text_encoder"),
            events.cache("captions"),
        )
        text = cached_text(cache)
    gc.collect()  # the networks that the caches replace

    unet = load("unet")
    networks = {"unet": unet}
    if trains_text and text_encoder is not None:
        networks["text_encoder"] = text_encoder
    elif text_encoder is not None:
        for parameter in text_encoder.get_parameters():
            parameter.requires_grad = False
    trained = prepare_trained(config, plan, networks)
    if config.flash_attention:
        use_flash_attention(unet)
    if config.gradient_checkpointing:
        recompute(unet)
    masks = [mask for network in networks.values() for mask in lora_masks(network)]
    loss = DiffusionLoss(unet, text_encoder)
    step = TrainStep(
        loss,
        make_optimizer(trained, config.optimizer),
        masks,
        plan.accumulation,
        plan.devices,
        scaled=plan.precision == "fp16",
    )
    sampling = _sampling(config, model, len(masks))
    draw = None
    if config.samples is not None:
        vae = load_vae("decoder") if group.rank_id == 0 else None
        draw = _drawer(config, model, group, unet, text_encoder, vae, text, tokenizer, sampling)
    return Ready(
        model,
        trained,
        loss,
        step,
        Order(scan.training, config.seed, plan.global_batch),
        sampling,
        latents,
        text,
        _compiled(config, plan, model, text_in_step, group.rank_id),
        draw,
    )


def read_ahead(ready: Ready, scan: Scan, plan: Plan, rank_id: int, number: int) -> list[Ahead]:
    """This rank's part of global batch `number`: every accumulation's slice of it."""
    size, chunk = plan.micro_batch, plan.micro_batch * plan.devices
    first = number * plan.global_batch + rank_id * size
    parts = []
    for i in range(plan.accumulation):
        draws = training_draws(scan.training, ready.order, ready.sampling, first + i * chunk, size)
        parts.append((draws, *ready.latents.read(draws), ready.text(draws.captions)))
    return parts


def batch_of(ready: Ready, part: Ahead) -> Batch:
    """The batch from what was read of it; encodes images if there is no cache of latents."""
    draws, read, picture_weights, text = part
    return assemble(draws, ready.latents.moments(read), picture_weights, text, ready.sampling)


def _compiled(
    config: RunConfig, plan: Plan, model: ModelConfig, text_in_step: bool, rank_id: int
) -> CompiledStep:
    """The compiled step of this rank, with everything that it is made of."""
    inputs = {"schedule", "warmup_steps"}  # of the step, not of its graph
    if config.optimizer.text_encoder_learning_rate is None:
        inputs.add("learning_rate")
    facts = {
        "model": model.model_dump(mode="json"),
        "train": config.train,
        "lora": config.lora.model_dump(mode="json", exclude={"start"}),
        "optimizer": config.optimizer.model_dump(mode="json", exclude=inputs),
        "gradient_checkpointing": config.gradient_checkpointing,
        "flash_attention": config.flash_attention,
        "text_in_step": text_in_step,
        "precision": plan.precision,
        "device_target": plan.device_target,
        "product": plan.product,
        "split": [plan.devices, plan.micro_batch, plan.accumulation],
        "rank_id": rank_id,
    }
    folder = Path(config.cache) / "graphs" if config.cache is not None else None
    return CompiledStep(folder, facts)


def _sampling(config: RunConfig, model: ModelConfig, modules: int) -> Sampling:
    return Sampling(
        seed=config.seed,
        prediction_type=model.prediction_type,
        latent_channels=model.vae.latent_channels,
        factor=model.vae.factor,
        scaling_factor=model.vae.scaling_factor,
        caption_dropout=config.data.caption_dropout,
        shuffle_captions=config.data.shuffle_captions,
        keep_tokens=config.data.keep_tokens,
        flip=config.data.flip,
        random_crop=config.data.crop == "random",
        min_snr_gamma=config.min_snr_gamma,
        noise_offset=config.noise_offset,
        zero_terminal_snr=config.zero_terminal_snr,
        dropout=config.lora.dropout,
        rank=config.lora.rank,
        modules=modules,
    )


def _drawer(
    config: RunConfig,
    model: ModelConfig,
    group: Group,
    unet: nn.Cell,
    text_encoder: nn.Cell | None,
    vae: nn.Cell | None,
    text: Text,
    tokenizer: Tokenizer,
    sampling: Sampling,
) -> Callable[[Path], None]:
    """What draws the pictures of `samples`, with the LoRA as it then is."""
    samples = config.samples
    assert samples is not None
    pipeline = Pipeline(model, unet, text_encoder, vae, sampling.alphas_cumprod)
    prompts = [*samples.prompts, ""]

    def draw(path: Path) -> None:
        if text_encoder is None:
            states = text(prompts)
        else:
            states = in_batches(text_encoder, tokenizer(prompts), ENCODE_BATCH)
        draw_samples(pipeline, states, samples, group, path)

    return draw
