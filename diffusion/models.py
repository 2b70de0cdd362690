"""Networks with the weights of a base model in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters

from diffusion.attention import FlashAttention
from diffusion.config import ModelConfig
from diffusion.convolution import Convolving
from diffusion.layers import GroupNorm, LayerNorm, name_parameters, shared
from diffusion.recomputed import Recomputed
from diffusion.text_encoder import CLIPTextModel
from diffusion.unet import Attention, Transformer2D, UNet2DConditionModel
from diffusion.vae import AutoencoderKL
from weights.base import Base
from weights.files import WeightsError


def compile_graphs() -> None:
    """Let MindSpore compile networks into graphs, and give each result its place in memory when it
    compiles, not each time a kernel starts: a tenth of a step on CPU, the default on Ascend."""
    ms.set_context(mode=ms.GRAPH_MODE, memory_optimize_level="O1")


def build(config: ModelConfig, network: str, dtype: Any = ms.float32) -> nn.Cell:
    """The "unet", "vae" or "text_encoder" of a model, with random weights.

    It computes in `dtype` and keeps its weights so, but for those of GroupNorm and LayerNorm,
    which stay float32. The VAE overflows in half precision: it is float32 whatever `dtype` says.
    """
    if network == "vae":
        return AutoencoderKL(config.vae)
    if network == "unet":
        return store_as(UNet2DConditionModel(config.unet), dtype)
    return store_as(CLIPTextModel(config.text_encoder), dtype)


def store_as(network: nn.Cell, dtype: Any) -> nn.Cell:
    """Store the weights of a UNet or text encoder in `dtype`; those of the normalisations stay."""
    for _, cell in network.cells_and_names():
        if not isinstance(cell, GroupNorm | LayerNorm):
            for parameter in cell.get_parameters(expand=False):
                parameter.set_dtype(dtype)
    return network


def load(
    config: ModelConfig,
    base: Base,
    network: str,
    allow_nan: bool = False,
    dtype: Any = ms.float32,
) -> nn.Cell:
    """The same with the weights of `base`; no random weights are drawn.

    One tensor at a time is in memory beside the network. Raises WeightsError if the weights do
    not fit the model, or hold NaN (unless `allow_nan`).
    """
    with no_init_parameters():
        cell = build(config, network, dtype)
    found = base.networks[network]
    missing = [p.name for p in cell.get_parameters() if p.name not in found.shapes]
    if missing:
        raise WeightsError(
            f"{base.path}: {len(missing)} tensors of the model are not in its {network} (first: "
            f"{missing[0]}); check that base.model fits the weights"
        )
    set_weights(cell, found.tensors(np.float32, allow_nan), f"{base.path}")
    return cell


def recompute(unet: nn.Cell) -> None:
    """Let the transformer blocks keep their inputs alone for the backward pass.

    A training step then needs less memory and more time. To be called when it is settled which
    parameters are trained, that is, after `lora.inject`.
    """
    for _, cell in list(unet.cells_and_names()):
        if isinstance(cell, Transformer2D):
            names = [(parameter, parameter.name) for parameter in cell.get_parameters()]
            for i, block in enumerate(cell.transformer_blocks):
                cell.transformer_blocks[i] = Recomputed(block)
            for parameter, name in names:
                parameter.name = name


def transform_convolutions(network: nn.Cell, part: str = "") -> nn.Cell:
    """Let the convolutions of a network, or of one part of it, take the fastest way that there is
    on this device; their weights are not trained from then on. `set_weights` keeps to it."""
    for name, cell in network.cells_and_names():
        if isinstance(cell, Convolving) and name.startswith(part):
            cell.transform()
    return name_parameters(network)


def use_flash_attention(unet: nn.Cell) -> None:
    """Let the transformer blocks attend by the fused operator of Atlas A2 devices, which MindSpore
    has for half precision alone. What is `upcast` otherwise is then as precise as the operator."""
    for _, cell in unet.cells_and_names():
        if isinstance(cell, Attention):
            cell.attend = shared(FlashAttention, cell.attend.width, cell.attend.heads)


def set_weights(cell: nn.Cell, tensors: Iterable[tuple[str, np.ndarray]], source: str) -> None:
    """Put arrays into the parameters of these names, in the parameters' dtypes.

    An array of that dtype becomes the parameter's memory, and is not to be changed from then on.
    Raises WeightsError if a name is unknown or a shape differs.
    """
    parameters = {parameter.name: parameter for parameter in cell.get_parameters()}
    changed = set()
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
        value = ms.from_numpy(tensor)
        if value.dtype != parameter.dtype:
            value = Tensor(tensor, parameter.dtype)
        parameter.set_data(value)
        changed.add(name)
    for _, part in cell.cells_and_names():
        if isinstance(part, Convolving) and part.is_transformed and part.weight.name in changed:
            part.transform()


def release(network: nn.Cell) -> None:
    """Free the weights of a network that is not used again: once it was compiled, MindSpore keeps
    its parameters until the process ends."""
    for parameter in network.get_parameters():
        nothing = np.zeros((1,) * parameter.ndim, np.float32)
        parameter.set_data(Tensor(nothing, parameter.dtype), slice_shape=True)


def in_batches(cell: nn.Cell, rows: np.ndarray, size: int) -> np.ndarray:
    """`cell` on all rows, `size` at a time, the last batch padded, so that it compiles once.

    Without dropout, even if `cell` is in training.
    """
    outputs = []
    with evaluating(cell):
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            outputs.append(cell(Tensor(padded)).asnumpy()[: len(part)])
    return np.concatenate(outputs)


@contextmanager
def evaluating(cell: nn.Cell) -> Iterator[None]:
    """In here `cell` is out of training; afterwards it is as it was."""
    training = cell.training
    cell.set_train(False)
    try:
        yield
    finally:
        cell.set_train(training)
