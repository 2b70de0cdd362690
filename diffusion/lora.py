"""LoRA layers and their injection into a network (Hu et al., 2021).

An adapted layer computes W x + b + (alpha / rank) · up(down(x)). Its parameters keep the paths of
the original layer, with `lora_down.weight` and `lora_up.weight` beside `weight`; these two are
float32 whatever the network is, and so are their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from diffusion.convolution import Conv2d, Convolving
from diffusion.layers import Affine, Linear, name_parameters
from diffusion.randomness import generator
from weights.lora import Adapter, target_modules


class LoRALinear(Affine):
    """A frozen linear layer with an adapter.

    `mask` (batch, rank) leaves out components of the rank during training, one draw a sample
    (kohya's `rank_dropout`); it is set from outside so that the draw can be addressed.
    """

    def __init__(self, layer: Linear, rank: int, scale: float, mask: Parameter | None):
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.batched = layer.batched
        self.scale = scale
        self.rank = rank
        self.mask = mask
        self.weight = layer.weight
        self.bias = layer.bias
        self.lora_down = Linear(layer.in_features, rank, False, layer.batched)
        self.lora_up = Linear(rank, layer.out_features, False, layer.batched)

    def construct(self, x: Tensor) -> Tensor:
        low = self.lora_down(x)
        if self.mask is not None and self.training:
            mask = self.mask.reshape((-1,) + (1,) * (low.ndim - 2) + (self.rank,))
            low = low * mask.astype(low.dtype)
        adapted = self.lora_up(low)
        if self.scale != 1:
            adapted = self.scale * adapted
        return self.affine(x) + adapted


class LoRAConv2d(Convolving):
    """A frozen convolution with an adapter; `mask` as in LoRALinear.

    `down` has the kernel, stride and padding of the layer, `up` is 1×1.
    """

    def __init__(self, layer: Conv2d, rank: int, scale: float, mask: Parameter | None):
        super().__init__()
        self.in_channels = layer.in_channels
        self.out_channels = layer.out_channels
        self.kernel = layer.kernel
        self.stride = layer.stride
        self.padding = layer.padding
        self.scale = scale
        self.mask = mask
        self.weight = layer.weight
        self.bias = layer.bias
        self.transformed = layer.transformed
        self.by_products = False
        self.conv = layer.conv
        self.bias_add = layer.bias_add
        self.winograd = layer.winograd
        self.lora_down = Conv2d(
            layer.in_channels, rank, layer.kernel, layer.stride, layer.padding, bias=False
        )
        self.lora_up = Conv2d(rank, layer.out_channels, 1, bias=False)

    def construct(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        low = self.lora_down(x, size)
        if self.mask is not None and self.training:
            low = low * self.mask.expand_dims(-1).expand_dims(-1).astype(low.dtype)
        adapted = self.lora_up(low)
        if self.scale != 1:
            adapted = self.scale * adapted
        return self.convolve(x, size) + adapted


def inject(
    network: nn.Cell,
    targets: str,
    rank: int,
    alpha: float,
    seed: int = 0,
    dropout_batch: int | None = None,
) -> list[str]:
    """Freeze `network` and put an adapter on every module that `targets` takes.

    `down` is Kaiming-uniform (a = √5) and drawn by (seed, module), `up` is zero, so the network's
    output does not change. With `dropout_batch` each adapter gets a mask for that many samples.
    Returns the adapted module paths, in order.
    """
    for parameter in network.get_parameters():
        parameter.requires_grad = False
    modules = target_modules([name for name, _ in network.parameters_and_names()], targets)
    cells = dict(network.cells_and_names())
    for module in modules:
        layer = cells[module]
        mask = None
        if dropout_batch is not None:
            ones = Tensor(np.ones((dropout_batch, rank), np.float32))
            mask = Parameter(ones, name="lora_mask", requires_grad=False)
        kind = LoRALinear if isinstance(layer, Linear) else LoRAConv2d
        adapted = kind(layer, rank, alpha / rank, mask)
        down, up = adapted.lora_down.weight, adapted.lora_up.weight
        bound = 1 / math.sqrt(math.prod(down.shape[1:]))
        draw = generator(seed, f"lora_down {module}").uniform(-bound, bound, down.shape)
        down.set_data(Tensor(draw, ms.float32))
        up.set_data(Tensor(np.zeros(up.shape), ms.float32))
        _replace(cells, module, adapted)
    name_parameters(network)
    return modules


def attach(network: nn.Cell, adapters: Mapping[str, Adapter]) -> None:
    """Put adapters beside the weights of their modules, of whatever ranks, to draw with."""
    cells = dict(network.cells_and_names())
    for module, adapter in adapters.items():
        layer = cells[module]
        kind = LoRALinear if isinstance(layer, Linear) else LoRAConv2d
        _replace(cells, module, kind(layer, adapter.rank, adapter.scale, None))
    name_parameters(network)
    set_attached(network, adapters)


def set_attached(network: nn.Cell, adapters: Mapping[str, Adapter]) -> None:
    """Put other matrices into adapters of `attach`; shapes and scales must be the same."""
    cells = dict(network.cells_and_names())
    for module, adapter in adapters.items():
        cell = cells[module]
        assert cell.scale == adapter.scale
        cell.lora_down.weight.set_data(Tensor(adapter.down, ms.float32))
        cell.lora_up.weight.set_data(Tensor(adapter.up, ms.float32))


def _replace(cells: Mapping[str, nn.Cell], module: str, adapted: nn.Cell) -> None:
    """Put a layer with an adapter where the one without was."""
    parent, _, leaf = module.rpartition(".")
    owner = cells[parent]
    if isinstance(owner, nn.CellList):
        owner[int(leaf)] = adapted
    else:
        setattr(owner, leaf, adapted)


def lora_parameters(network: nn.Cell) -> list[Parameter]:
    """The adapters' parameters, those of one shape side by side, as the optimizer likes them."""
    found = [
        parameter
        for parameter in network.get_parameters()
        if parameter.name.endswith((".lora_down.weight", ".lora_up.weight"))
    ]
    return sorted(found, key=lambda parameter: parameter.shape)


def lora_masks(network: nn.Cell) -> list[Parameter]:
    """The dropout masks, in the order of the network's modules."""
    return [parameter for parameter in network.get_parameters() if parameter.name.endswith("mask")]


def adapters(tensors: Mapping[str, np.ndarray], alpha: float) -> dict[str, Adapter]:
    """Adapters by module from arrays named as `lora_parameters` names them."""
    modules = sorted({name.rsplit(".lora_", 1)[0] for name in tensors})
    return {
        module: Adapter(
            tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"], alpha
        )
        for module in modules
    }
