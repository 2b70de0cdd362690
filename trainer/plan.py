"""What a run will do, computed before anything starts; needs no MindSpore."""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from diffusion.config import ModelConfig, recognise
from trainer.config import ConfigError, RunConfig
from trainer.images import DataError, Example, find_examples, read_image
from weights import files
from weights.base import Base, combined_digest, open_base
from weights.lora import adapter_size, check_rank, target_modules
from weights.structure import NETWORKS


@dataclass(frozen=True)
class Plan:
    """One run in numbers."""

    name: str
    model: str
    base: str
    """What the weights were found to be."""
    base_digest: str
    """sha256 of the base's files."""
    data_digest: str
    """sha256 over training images and captions."""
    train: str
    device_target: str
    devices: int
    examples: int
    validation_examples: int
    images: int
    """Samples seen in all; a whole number of global batches."""
    steps: int
    global_batch: int
    micro_batch: int
    accumulation: int
    trained_parameters: int | None
    """None where only the built network can tell."""
    synced_bytes: int | None
    """Bytes of gradient and loss that one device puts into the all-reduce of one step."""
    learning_rate: float
    schedule: str
    start_step: int = 0
    """Steps that were done before, by the attempt that is resumed."""
    resume_from: str | None = None
    """The checkpoint to go on from."""

    @property
    def epochs(self) -> float:
        """How often each training image is seen."""
        return self.images / self.examples

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return asdict(self)


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


def training_examples(config: RunConfig) -> list[Example]:
    """All training examples, folder by folder."""
    prefix = config.data.prefix
    return [example for folder in config.data.train for example in find_examples(folder, prefix)]


def validation_examples(config: RunConfig) -> list[Example]:
    """The held-out examples; none if the config names no folder."""
    folder = config.data.validation
    return find_examples(folder, config.data.prefix) if folder else []


def data_digest(examples: list[Example]) -> str:
    """sha256 over the digests of images and captions, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{files.sha256(example.path)}  {example.caption}\n".encode())
    return digest.hexdigest()


def trained_shapes(config: RunConfig, base: Base) -> dict[str, tuple[int, ...]]:
    """Shapes of all adapted weights of a LoRA run.

    Raises WeightsError if the rank is larger than a layer.
    """
    networks: dict[str, str] = {"unet": config.lora.targets}
    if config.lora.text_encoder:
        networks["text_encoder"] = "text_encoder"
    found = {}
    for network, targets in networks.items():
        shapes = base.networks[network].shapes
        for module in target_modules(shapes, targets):
            shape = shapes[f"{module}.weight"]
            check_rank(module, shape, config.lora.rank)
            found[f"{network}.{module}"] = shape
    return found


def make_plan(config: RunConfig, devices: int, device_target: str = "CPU") -> Plan:
    """Everything that can be known before a device is touched.

    Raises ConfigError, ModelConfigError, DataError or WeightsError, each one sentence.
    """
    base = open_run_base(config)
    model, _ = run_model(config, base)
    examples, held_out = training_examples(config), validation_examples(config)
    micro, accumulation = batch_split(config.global_batch, devices, config.micro_batch)
    wanted = config.images or (config.epochs or 0) * len(examples)
    steps = max(1, math.ceil(wanted / config.global_batch))
    if config.train == "lora":
        shapes = trained_shapes(config, base).values()
        parameters = sum(adapter_size(shape, config.lora.rank) for shape in shapes)
    else:
        parameters = None
    return Plan(
        name=config.name,
        model=model,
        base=describe_base(base),
        base_digest=combined_digest(base.digests()),
        data_digest=data_digest(examples),
        train=config.train,
        device_target=device_target,
        devices=devices,
        examples=len(examples),
        validation_examples=len(held_out),
        images=steps * config.global_batch,
        steps=steps,
        global_batch=config.global_batch,
        micro_batch=micro,
        accumulation=accumulation,
        trained_parameters=parameters,
        synced_bytes=None if parameters is None else 4 * (parameters + 1),
        learning_rate=config.optimizer.learning_rate,
        schedule=config.optimizer.schedule,
    )


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


def check_images(config: RunConfig) -> None:
    """Decode every image once; raises DataError that names each file that does not decode."""

    def problem(example: Example) -> str | None:
        try:
            read_image(example.path, 8)
        except DataError as error:
            return str(error)
        return None

    examples = training_examples(config) + validation_examples(config)
    with ThreadPoolExecutor() as pool:
        problems = [text for text in pool.map(problem, examples) if text]
    if problems:
        raise DataError("\n".join(problems))
