"""What a run will do, computed before anything starts; needs no MindSpore."""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from diffusion.config import load_model_config
from trainer.config import ConfigError, RunConfig
from trainer.images import DataError, Example, find_examples, read_image
from weights import base, files
from weights.files import WeightsError
from weights.lora import adapter_size, check_rank, target_modules


@dataclass(frozen=True)
class Plan:
    """One run in numbers."""

    name: str
    model: str
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
    return [example for folder in config.data.train for example in find_examples(folder)]


def validation_examples(config: RunConfig) -> list[Example]:
    """The held-out examples; none if the config names no folder."""
    return find_examples(config.data.validation) if config.data.validation else []


def data_digest(examples: list[Example]) -> str:
    """sha256 over the digests of images and captions, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{files.sha256(example.path)}  {example.caption}\n".encode())
    return digest.hexdigest()


def trained_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all trained tensors of a LoRA run, from the headers of the base's files.

    Raises WeightsError if the rank is larger than a layer.
    """
    networks: dict[str, str] = {"unet": config.lora.targets}
    if config.lora.text_encoder:
        networks["text_encoder"] = "text_encoder"
    found = {}
    for network, targets in networks.items():
        shapes = files.shapes(base.network_file(config.base.weights, network))
        for module in target_modules(shapes, targets):
            shape = shapes[f"{module}.weight"]
            check_rank(module, shape, config.lora.rank)
            found[f"{network}.{module}"] = shape
    return found


def make_plan(config: RunConfig, devices: int, device_target: str = "CPU") -> Plan:
    """Everything that can be known before a device is touched.

    Raises ConfigError, ModelConfigError, DataError or WeightsError, each one sentence.
    """
    load_model_config(config.base.model)
    examples, held_out = training_examples(config), validation_examples(config)
    micro, accumulation = batch_split(config.global_batch, devices, config.micro_batch)
    wanted = config.images or (config.epochs or 0) * len(examples)
    steps = max(1, math.ceil(wanted / config.global_batch))
    if config.train == "lora":
        shapes = trained_shapes(config).values()
        parameters = sum(adapter_size(shape, config.lora.rank) for shape in shapes)
    else:
        parameters = None
    return Plan(
        name=config.name,
        model=config.base.model,
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


def loaded_networks(config: RunConfig) -> tuple[str, ...]:
    """The networks whose weights come from files."""
    return tuple(name for name in base.NETWORK_FILES if name not in config.base.initialise)


def check_base(config: RunConfig) -> dict[str, str]:
    """sha256 of each weight file of the base.

    Raises WeightsError if a file is missing or altered, or is another model's than `base.model`.
    """
    digests = base.digests(config.base.weights, loaded_networks(config))
    for network, (name, expected) in _telling_shapes(config).items():
        if network in loaded_networks(config):
            path = base.network_file(config.base.weights, network)
            found = files.shapes(path).get(name)
            if found != expected:
                raise WeightsError(
                    f"{path}: expected {name} of {expected} as in {config.base.model}, found "
                    f"{found or 'none'}; check that base.model fits base.weights"
                )
    return digests


def _telling_shapes(config: RunConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """One tensor of each network whose shape tells the models apart."""
    model = load_model_config(config.base.model)
    unet, vae, text = model.unet, model.vae, model.text_encoder
    return {
        "unet": ("conv_in.weight", (unet.block_out_channels[0], unet.in_channels, 3, 3)),
        "vae": ("encoder.conv_in.weight", (vae.block_out_channels[0], 3, 3, 3)),
        "text_encoder": (
            "text_model.embeddings.token_embedding.weight",
            (text.vocab_size, text.hidden_size),
        ),
    }


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
