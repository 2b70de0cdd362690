"""Networks with the weights of a base model in them."""

from __future__ import annotations

from collections.abc import Iterable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters

from diffusion.config import ModelConfig
from diffusion.text_encoder import CLIPTextModel
from diffusion.unet import UNet2DConditionModel
from diffusion.vae import AutoencoderKL
from weights.base import Base
from weights.files import WeightsError


def build(config: ModelConfig, network: str) -> nn.Cell:
    """The "unet", "vae" or "text_encoder" of a model, with random weights."""
    if network == "unet":
        return UNet2DConditionModel(config.unet)
    if network == "vae":
        return AutoencoderKL(config.vae)
    return CLIPTextModel(config.text_encoder)


def load(config: ModelConfig, base: Base, network: str, allow_nan: bool = False) -> nn.Cell:
    """The same with the weights of `base`, in float32; no random weights are drawn.

    One tensor at a time is in memory beside the network. Raises WeightsError if the weights do
    not fit the model, or hold NaN (unless `allow_nan`).
    """
    with no_init_parameters():
        cell = build(config, network)
    found = base.networks[network]
    missing = [p.name for p in cell.get_parameters() if p.name not in found.shapes]
    if missing:
        raise WeightsError(
            f"{base.path}: {len(missing)} tensors of the model are not in its {network} (first: "
            f"{missing[0]}); check that base.model fits the weights"
        )
    set_weights(cell, found.tensors(np.float32, allow_nan), f"{base.path}")
    return cell


def set_weights(cell: nn.Cell, tensors: Iterable[tuple[str, np.ndarray]], source: str) -> None:
    """Put arrays into the parameters of these names; raises WeightsError if one does not fit."""
    parameters = {parameter.name: parameter for parameter in cell.get_parameters()}
    for name, tensor in tensors:
        if name not in parameters:
            raise WeightsError(
                f"{source}: the model has no tensor {name}; check that base.model fits the weights"
            )
        parameter = parameters[name]
        if tuple(parameter.shape) != tensor.shape:
            raise WeightsError(
                f"{source}: {name} is {tensor.shape}, the model expects {tuple(parameter.shape)}; "
                "check that base.model fits the weights"
            )
        parameter.set_data(Tensor(tensor, ms.float32))


def in_batches(cell: nn.Cell, rows: np.ndarray, size: int) -> np.ndarray:
    """`cell` on all rows, `size` at a time, the last batch padded, so that it compiles once."""
    outputs = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
        outputs.append(cell(Tensor(padded)).asnumpy()[: len(part)])
    return np.concatenate(outputs)
