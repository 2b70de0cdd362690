"""The networks of a run, with what is trained of them marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, nn

from diffusion import models
from diffusion.config import ModelConfig
from diffusion.images import DataError
from diffusion.lora import inject, lora_parameters
from trainer.config import RunConfig
from trainer.plan import Plan
from weights import lora_files
from weights.base import Base
from weights.lora import fit

DTYPES = {"fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}


def load_network(
    config: RunConfig, plan: Plan, model: ModelConfig, base: Base, network: str
) -> nn.Cell:
    """A network of the base, or one with random weights if the config says so.

    The VAE is float32 in any case: in half precision it overflows.
    """
    dtype = ms.float32 if network == "vae" else DTYPES[plan.precision]
    if network in config.base.initialise:
        return models.build(model, network)
    loaded = models.load(model, base, network, config.base.allow_nan, dtype)
    if network == "unet" and config.train != "all":
        models.transform_convolutions(loaded)
    return loaded


def prepare_trained(
    config: RunConfig, plan: Plan, networks: Mapping[str, nn.Cell]
) -> dict[str, list[Parameter]]:
    """Put the adapters in, and return the trained parameters of each network.

    `networks` are the UNet and, if it is trained, the text encoder; whatever is not trained is
    frozen. Raises DataError or WeightsError if the LoRA to start from is another one.
    """
    if config.train == "all":
        return {
            name: sorted(network.trainable_params(), key=lambda parameter: parameter.shape)
            for name, network in networks.items()
        }
    lora = config.lora
    batch = plan.micro_batch if lora.dropout else None
    found = {}
    for name, network in networks.items():
        targets = lora.targets if name == "unet" else "text_encoder"
        inject(network, targets, lora.rank, lora.scale * lora.rank, config.seed, batch)
        found[name] = lora_parameters(network)
    if plan.lora_start is not None:
        _start_from(Path(plan.lora_start), found, lora.scale)
    return found


def _start_from(path: Path, trained: Mapping[str, Sequence[Parameter]], scale: float) -> None:
    """Put a LoRA's matrices into the adapters; a difference of scale goes into the up matrices."""
    shapes = {
        network: {
            f"{module}.weight": (up.shape[0], *down.shape[1:]) for module, down, up in _pairs(found)
        }
        for network, found in trained.items()
    }
    adapters = fit(lora_files.read(path).adapters, shapes, str(path), "this run")
    for network, found in trained.items():
        for module, down, up in _pairs(found):
            adapter = adapters.get(network, {}).get(module)
            if adapter is None:
                raise DataError(
                    f"{path}: expected an adapter for {module}, found none; set lora.targets and "
                    "lora.text_encoder as they were when it was made"
                )
            if adapter.rank != down.shape[0]:
                raise DataError(
                    f"{path}: its rank is {adapter.rank}, lora.rank is {down.shape[0]}; set "
                    f"lora.rank to {adapter.rank}, or change it with lora-registry resize"
                )
            down.set_data(ms.Tensor(adapter.down.reshape(down.shape), ms.float32))
            factor = np.float32(adapter.scale / scale)
            up.set_data(ms.Tensor(factor * adapter.up.reshape(up.shape), ms.float32))


def _pairs(parameters: Sequence[Parameter]) -> list[tuple[str, Parameter, Parameter]]:
    """(module, down, up) of every adapter."""
    by_name = {parameter.name: parameter for parameter in parameters}
    ending = ".lora_down.weight"
    modules = [name.removesuffix(ending) for name in by_name if name.endswith(ending)]
    return [(m, by_name[m + ending], by_name[f"{m}.lora_up.weight"]) for m in modules]
