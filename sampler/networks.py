"""What the feature networks share: convolutions without BatchNorm, and weights by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer
from mindspore.nn.utils import no_init_parameters

from diffusion import models
from diffusion.layers import name_parameters
from weights import files, torch_file
from weights.files import WeightsError

Tensors = dict[str, np.ndarray]


class Convolution(nn.Cell):
    """2-D convolution with bias; weight (out, in / groups, height, width).

    A BatchNorm that only infers is an affine function of each channel: `fold_all` puts it into
    weight and bias, so no network here has one. Padding is "valid" (none) or "same" as in
    TensorFlow: of an odd number of cells, the larger half at the bottom and on the right.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: str = "same",
        groups: int = 1,
    ):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        shape = (out_channels, in_channels // groups, height, width)
        self.weight = Parameter(initializer("zeros", shape))
        self.bias = Parameter(initializer("zeros", (out_channels,)))
        self.conv = ops.Conv2D(
            out_channels, (height, width), pad_mode=padding, stride=stride, group=groups
        )
        self.bias_add = ops.BiasAdd()

    def construct(self, x: Tensor) -> Tensor:
        return self.bias_add(self.conv(x, self.weight), self.bias)


_TORCH = ("weight", "bias", "running_mean", "running_var")
_MINDSPORE = ("gamma", "beta", "moving_mean", "moving_variance")


def fold_all(
    tensors: Mapping[str, np.ndarray],
    units: Iterable[tuple[str, str, str]],
    eps: float,
    source: str,
) -> Tensors:
    """Weights and biases of `Convolution`s from convolutions without bias and their BatchNorms.

    A unit is the name of a convolution here, of the one in the file, and of its BatchNorm there,
    whose parts may have PyTorch's names or MindSpore's. Computed in double precision. Raises
    WeightsError if a tensor is missing, or a BatchNorm is not of its convolution's width.
    """
    folded = {}
    for ours, convolution, norm in units:
        parts = _MINDSPORE if f"{norm}.gamma" in tensors else _TORCH
        names = [f"{convolution}.weight", *(f"{norm}.{part}" for part in parts)]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise WeightsError(
                f"{source}: expected a tensor {missing[0]}, found none; check that these are "
                "weights of this network"
            )
        weight, scale, shift, mean, variance = (tensors[n].astype(np.float64) for n in names)
        for name in names[1:]:
            if tensors[name].shape != weight.shape[:1]:
                raise WeightsError(
                    f"{source}: expected {name} of shape {weight.shape[:1]}, found "
                    f"{tensors[name].shape}; check that these are weights of this network"
                )
        factor = scale / np.sqrt(variance + eps)
        aligned = factor.reshape(-1, *[1] * (weight.ndim - 1))
        folded[f"{ours}.weight"] = (weight * aligned).astype(np.float32)
        folded[f"{ours}.bias"] = (shift - mean * factor).astype(np.float32)
    return folded


def read(path: str | os.PathLike[str]) -> Tensors:
    """The tensors of a safetensors file, a MindSpore `.ckpt` or a state dict of `torch.save`.

    Raises WeightsError if it is none of them, or damaged; no code in it is run.
    """
    path = Path(path)
    head = b""
    if path.is_file():
        with open(path, "rb") as file:
            head = file.read(4)
    if head.startswith(b"PK\x03\x04") or head[:1] == b"\x80":
        return torch_file.load(path)
    return files.load(path)


def load(build: Callable[[], nn.Cell], tensors: Mapping[str, np.ndarray], source: str) -> nn.Cell:
    """A network with these float32 weights, out of training; no random weights are drawn.

    What the network has no place for is left out. Raises WeightsError if a tensor is missing or
    of another shape.
    """
    with no_init_parameters():
        network = name_parameters(build())
    fitting = {}
    for parameter in network.get_parameters():
        tensor, shape = tensors.get(parameter.name), tuple(parameter.shape)
        if tensor is None or tensor.shape != shape:
            found = "no such tensor" if tensor is None else f"the shape {tensor.shape}"
            raise WeightsError(
                f"{source}: expected {parameter.name} of shape {shape}, found {found}; check that "
                "these are weights of this network"
            )
        fitting[parameter.name] = np.ascontiguousarray(tensor, np.float32)
    models.set_weights(network, fitting.items(), source)
    return network.set_train(False)
