"""What a run will do, computed before anything starts; needs no MindSpore."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffusion.config import ModelConfig, load_model_config, recognise
from trainer import dataset
from trainer.batches import Order
from trainer.cache import Cache
from trainer.config import ConfigError, RunConfig
from trainer.dataset import Dataset, Scan
from weights.base import Base, combined_digest, open_base
from weights.lora import adapter_size, check_rank, target_modules
from weights.structure import NETWORKS, Shapes, text_encoder_shapes, unet_shapes


@dataclass(frozen=True)
class Plan:
    """One run in numbers."""

    name: str
    model: str
    base: str
    """What the weights were found to be."""
    base_digest: str
    """sha256 of the base's files."""
    vae_key: str
    """Digest of the VAE's weights and structure, by which latents are cached."""
    text_key: str
    data_digest: str
    """sha256 over all that is seen of the training data."""
    train: str
    precision: str
    """"fp32", "fp16" or "bf16"."""
    device_target: str
    devices: int
    examples: int
    shapes: tuple[tuple[int, int, int], ...]
    """Width, height and how many of an epoch's samples have it, the most frequent first."""
    validation_examples: int
    notes: int
    """What a check of the data would remark on."""
    cached: tuple[int, int] | None
    """How many of the latents that are needed are there already; None without a cache of them."""
    epoch_samples: int
    repeated: int
    """Samples of an epoch that only fill up batches."""
    images: int
    """Samples seen in all; a whole number of global batches."""
    steps: int
    validate_steps: int | None
    """Steps between two validations."""
    sample_steps: int | None
    global_batch: int
    micro_batch: int
    accumulation: int
    trained_parameters: int | None
    """None where only the built network can tell."""
    synced_bytes: int | None
    """Bytes of gradient, loss and stop that one device puts into the all-reduce of one step."""
    learning_rate: float
    schedule: str
    product: str | None = None
    """"910A", "A2" or "A3", if the devices are known to be that."""
    lora_start: str | None = None
    """The LoRA file to go on from."""
    start_step: int = 0
    """Steps that were done before, by the attempt that is resumed."""
    resume_from: str | None = None
    """The checkpoint to go on from."""
    not_at_hand: tuple[str, ...] = ()
    """What a dry run did without: then nothing can start, and some figures are not known."""

    @property
    def epochs(self) -> float:
        """How often each training image is seen."""
        return self.images / self.epoch_samples

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return json.loads(json.dumps(asdict(self)))


def read_plan(attempt: Path) -> Plan:
    """The plan in the folder of an attempt."""
    return Plan(**json.loads((attempt / "plan.json").read_text(encoding="utf-8")))


def batch_split(global_batch: int, devices: int, most: int) -> tuple[int, int]:
    """(micro-batch, accumulation) such that devices × both = `global_batch`.

    The micro-batch is the largest divisor of each device's share that is not above `most`.
    Raises ConfigError, with the device counts that are possible, where it does not divide.
    """
    if global_batch % devices:
        possible = ", ".join(str(n) for n in range(1, global_batch + 1) if global_batch % n == 0)
        raise ConfigError(
            f"global_batch {global_batch} does not divide among {devices} devices; use a multiple "
            f"of {devices}, or one of these numbers of devices: {possible}"
        )
    share = global_batch // devices
    micro = max(size for size in range(1, min(share, most) + 1) if share % size == 0)
    return micro, share // micro


def trained_shapes(config: RunConfig, networks: Mapping[str, Shapes]) -> dict[str, tuple[int, ...]]:
    """Shapes of all adapted weights of a LoRA run, from those of each network's tensors.

    Raises WeightsError if the rank is larger than a layer.
    """
    targets: dict[str, str] = {"unet": config.lora.targets}
    if config.lora.text_encoder:
        targets["text_encoder"] = "text_encoder"
    found = {}
    for network, taken in targets.items():
        shapes = networks[network]
        for module in target_modules(shapes, taken):
            shape = shapes[f"{module}.weight"]
            check_rank(module, shape, config.lora.rank)
            found[f"{network}.{module}"] = shape
    return found


def make_plan(
    config: RunConfig, devices: int, device_target: str = "CPU", may_lack: bool = False
) -> tuple[Plan, Scan]:
    """Everything that can be known before a device is touched, and the data that it is about.

    With `may_lack`, for a dry run, neither weights nor images need to be at hand; then the model
    must be named. Raises ConfigError, ModelConfigError, DataError or WeightsError, each one
    sentence.
    """
    lacking = []
    weights = Path(config.base.weights)
    if may_lack and config.base.model and not weights.exists():
        lacking.append(f"the weights {weights}")
        base, name, model = None, config.base.model, load_model_config(config.base.model)
        shapes = {"unet": unet_shapes(model.unet)}
        shapes["text_encoder"] = text_encoder_shapes(model.text_encoder)
    else:
        base = open_run_base(config)
        name, model = run_model(config, base)
        shapes = {network: dict(found.shapes) for network, found in base.networks.items()}
    _check_model(config, model, name)
    found_folders = [Path(one.folder) for one in config.data.train]
    if may_lack and (absent := [folder for folder in found_folders if not folder.exists()]):
        lacking += [f"the images {folder}" for folder in absent]
        scan = Scan(Dataset((), ()), Dataset((), ()), [], [])
    else:
        resolution = config.data.resolution or model.resolution
        scan = dataset.load(config.data, resolution, pixel_unit(model), config.global_batch)
    order = Order(scan.training, config.seed, config.global_batch)
    micro, accumulation = batch_split(config.global_batch, devices, config.micro_batch)
    wanted = config.images or (config.epochs or 0) * order.epoch_samples
    steps = max(1, math.ceil(wanted / config.global_batch)) if wanted else 0
    parameters = None
    if config.train == "lora":
        adapted = trained_shapes(config, shapes).values()
        parameters = sum(adapter_size(shape, config.lora.rank) for shape in adapted)
    digests = base.digests() if base else {}
    precision = run_precision(config, device_target)
    plan = Plan(
        name=config.name,
        model=name,
        base=describe_base(base) if base else "not at hand",
        base_digest=combined_digest(digests),
        vae_key=_network_key(base, "vae", model, digests) if base else "",
        text_key=f"{precision} {_network_key(base, 'text_encoder', model, digests)}"
        if base
        else "",
        data_digest=scan.training.digest(),
        train=config.train,
        precision=precision,
        device_target=device_target,
        devices=devices,
        examples=len(scan.training.examples),
        shapes=tuple((*shape, count) for shape, count in scan.training.shapes()),
        validation_examples=len(scan.validation.examples),
        notes=len(scan.notes),
        cached=None,
        epoch_samples=order.epoch_samples,
        repeated=order.repeated,
        images=steps * config.global_batch,
        steps=steps,
        validate_steps=_steps(config.validate_every, config),
        sample_steps=_steps(config.samples.every if config.samples else None, config),
        global_batch=config.global_batch,
        micro_batch=micro,
        accumulation=accumulation,
        trained_parameters=parameters,
        synced_bytes=None if parameters is None else 4 * (parameters + 2),
        learning_rate=config.optimizer.peak,
        schedule=config.optimizer.schedule,
        not_at_hand=tuple(lacking),
    )
    cache = run_cache(config, plan)
    if cache is not None and base is not None and config.data.crop != "random":
        needed = [*scan.training.examples, *scan.validation.examples]
        paths = {cache.latents_path(example) for example in needed}
        plan = replace(plan, cached=(sum(path.is_file() for path in paths), len(paths)))
    return plan, scan


def pixel_unit(model: ModelConfig) -> int:
    """What width and height of a picture must be multiples of, in pixels."""
    return model.vae.factor * 2 ** (len(model.unet.block_out_channels) - 1)


def run_cache(config: RunConfig, plan: Plan) -> Cache | None:
    """The cache of latents and text that the run uses; None if it uses none."""
    if config.cache is None:
        return None
    data = config.data
    return Cache(Path(config.cache), plan.vae_key, plan.text_key, data.flip, data.masks)


def run_precision(config: RunConfig, device_target: str) -> str:
    """What the run computes in there: "fp32", "fp16" or "bf16".

    Raises ConfigError if that device cannot.
    """
    if config.precision == "bf16" and device_target == "CPU":
        raise ConfigError(
            "precision: bf16 is not possible on CPU, MindSpore has no bfloat16 matrix product "
            "there; use fp32"
        )
    precision = config.precision
    if precision == "auto":
        precision = "fp16" if device_target == "Ascend" and config.train == "lora" else "fp32"
    if config.flash_attention and (device_target != "Ascend" or precision == "fp32"):
        raise ConfigError(
            f"flash_attention: MindSpore has it on Ascend in fp16 and bf16, not on {device_target} "
            f"in {precision}; take it away, or plan for Ascend with --device-target Ascend "
            "--dry-run"
        )
    return precision


def _check_model(config: RunConfig, model: ModelConfig, name: str) -> None:
    if config.zero_terminal_snr and model.prediction_type != "v_prediction":
        raise ConfigError(
            f"zero_terminal_snr: {name} predicts epsilon, which says nothing where only noise is "
            "left; use a model that predicts v, or take it away"
        )


def _steps(images: int | None, config: RunConfig) -> int | None:
    """Optimizer steps in which about so many images are seen."""
    return None if images is None else max(1, round(images / config.global_batch))


def _network_key(base: Base, network: str, model: ModelConfig, digests: Mapping[str, str]) -> str:
    """Digest of one network's weights and structure; empty if the base is without it."""
    if network not in base.networks:
        return ""
    folder = base.path if base.path.is_dir() else base.path.parent
    paths = {source.file.path for source in base.networks[network].sources.values()}
    names = (path.relative_to(folder).as_posix() for path in paths)
    structure = getattr(model, network).model_dump_json()
    parts = [network, structure, *sorted(digests[name] for name in names)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def open_run_base(config: RunConfig) -> Base:
    """The base of a run, without the networks that begin with random weights.

    Raises WeightsError as `weights.base.open_base` does.
    """
    loaded = [name for name in NETWORKS if name not in config.base.initialise]
    return open_base(config.base.weights, loaded)


def run_model(config: RunConfig, base: Base) -> tuple[str, ModelConfig]:
    """Name and config of the model that the run fine-tunes, recognised if it is not given.

    Raises ModelConfigError.
    """
    return recognise(base, config.base.model)


def describe_base(base: Base) -> str:
    """What was found, in words: "diffusers folder, Stable Diffusion 1.x, float16"."""
    family = base.family if "unet" in base.networks else "without a UNet"
    words = [base.layout, family, "/".join(base.dtypes)]
    if base.prediction is not None:
        words.append(f"{base.prediction.type} by {base.prediction.source}")
    return ", ".join(words)
