"""Inception-v3 as FID uses it: the network of TensorFlow's `inception-2015-12-05`, 2048 features.

The layout and the names are those of pytorch-fid's port. It is not torchvision's Inception: other
weights, 1008 classes, average pools that do not count the padding, and in the last block a maximum
where an average would be expected. MindONE's checkpoint of the same weights is read too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import numpy as np
from mindspore import Tensor, nn, ops

from sampler.networks import Convolution, Tensors, fold_all, load, read
from weights.files import WeightsError

SIZE = 299
"""Pixels along a side."""
MEAN, DEVIATION = 128.0, 128.0
"""Its input is (x − 128) / 128 of values in 0..255."""
FEATURES, CLASSES = 2048, 1008

PUBLISHED = {
    "pt_inception-2015-12-05-6726825d.pth": (
        "6726825d",
        "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights",
    ),
    "inception_v3_fid-9ec6dfe4.ckpt": (
        "9ec6dfe4",
        "https://download.mindspore.cn/toolkits/mindone/stable_diffusion/fid/",
    ),
}
"""Files with these weights: how their SHA-256 begins, and where they are."""

_EPS = 1e-3  # of every BatchNorm
_ACROSS, _DOWN = (1, 7), (7, 1)


class ConvReLU(Convolution):
    def construct(self, x: Tensor) -> Tensor:
        return ops.relu(self.bias_add(self.conv(x, self.weight), self.bias))


class AveragePool(nn.Cell):
    """The mean of 3 × 3 cells, at the border of those that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = ops.AvgPool(3, 1, "SAME")

    def construct(self, x: Tensor) -> Tensor:
        # Whether a device counts the padding is not documented; this way it does not matter.
        return self.pool(x) / self.pool(ops.ones_like(x))


def _halving(inputs: int, outputs: int) -> ConvReLU:
    return ConvReLU(inputs, outputs, 3, stride=2, padding="valid")


def _max_pool() -> nn.Cell:
    return nn.MaxPool2d(3, stride=2)


class InceptionA(nn.Cell):
    def __init__(self, inputs: int, pooled: int):
        super().__init__()
        self.branch1x1 = ConvReLU(inputs, 64, 1)
        self.branch5x5_1 = ConvReLU(inputs, 48, 1)
        self.branch5x5_2 = ConvReLU(48, 64, 5)
        self.branch3x3dbl_1 = ConvReLU(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvReLU(64, 96, 3)
        self.branch3x3dbl_3 = ConvReLU(96, 96, 3)
        self.branch_pool = ConvReLU(inputs, pooled, 1)
        self.pool = AveragePool()

    def construct(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return ops.concat((self.branch1x1(x), five, double, self.branch_pool(self.pool(x))), 1)


class InceptionB(nn.Cell):
    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = _halving(inputs, 384)
        self.branch3x3dbl_1 = ConvReLU(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvReLU(64, 96, 3)
        self.branch3x3dbl_3 = _halving(96, 96)
        self.pool = _max_pool()

    def construct(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return ops.concat((self.branch3x3(x), double, self.pool(x)), 1)


class InceptionC(nn.Cell):
    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.branch1x1 = ConvReLU(inputs, 192, 1)
        self.branch7x7_1 = ConvReLU(inputs, width, 1)
        self.branch7x7_2 = ConvReLU(width, width, _ACROSS)
        self.branch7x7_3 = ConvReLU(width, 192, _DOWN)
        self.branch7x7dbl_1 = ConvReLU(inputs, width, 1)
        self.branch7x7dbl_2 = ConvReLU(width, width, _DOWN)
        self.branch7x7dbl_3 = ConvReLU(width, width, _ACROSS)
        self.branch7x7dbl_4 = ConvReLU(width, width, _DOWN)
        self.branch7x7dbl_5 = ConvReLU(width, 192, _ACROSS)
        self.branch_pool = ConvReLU(inputs, 192, 1)
        self.pool = AveragePool()

    def construct(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return ops.concat((self.branch1x1(x), seven, double, self.branch_pool(self.pool(x))), 1)


class InceptionD(nn.Cell):
    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3_1 = ConvReLU(inputs, 192, 1)
        self.branch3x3_2 = _halving(192, 320)
        self.branch7x7x3_1 = ConvReLU(inputs, 192, 1)
        self.branch7x7x3_2 = ConvReLU(192, 192, _ACROSS)
        self.branch7x7x3_3 = ConvReLU(192, 192, _DOWN)
        self.branch7x7x3_4 = _halving(192, 192)
        self.pool = _max_pool()

    def construct(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return ops.concat((three, self.branch7x7x3_4(seven), self.pool(x)), 1)


class InceptionE(nn.Cell):
    def __init__(self, inputs: int, pool: nn.Cell):
        super().__init__()
        self.branch1x1 = ConvReLU(inputs, 320, 1)
        self.branch3x3_1 = ConvReLU(inputs, 384, 1)
        self.branch3x3_2a = ConvReLU(384, 384, (1, 3))
        self.branch3x3_2b = ConvReLU(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvReLU(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvReLU(448, 384, 3)
        self.branch3x3dbl_3a = ConvReLU(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvReLU(384, 384, (3, 1))
        self.branch_pool = ConvReLU(inputs, 192, 1)
        self.pool = pool

    def construct(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = (
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        )
        return ops.concat(branches, 1)


class Inception(nn.Cell):
    """(n, 3, 299, 299) float32, (x − 128) / 128 → pooled features (n, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _halving(3, 32)
        self.Conv2d_2a_3x3 = ConvReLU(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = ConvReLU(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvReLU(80, 192, 3, padding="valid")
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, AveragePool())
        self.Mixed_7c = InceptionE(2048, nn.MaxPool2d(3, stride=1, pad_mode="same"))
        self.pool = _max_pool()
        self.mean = ops.ReduceMean()

    def construct(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.pool(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.pool(x))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return self.mean(x, (2, 3))


def network(path: str | os.PathLike[str]) -> nn.Cell:
    """Inception with the weights of a file in pytorch-fid's names or MindONE's.

    Raises WeightsError if the file is missing, damaged or holds another network.
    """
    tensors = from_mindone(read(path))
    classes = tensors.get("fc.bias")
    if classes is not None and classes.shape != (CLASSES,):
        raise WeightsError(
            f"{path}: expected the Inception of FID with {CLASSES} classes, found one with "
            f"{classes.size}, whose features are others; use {' or '.join(PUBLISHED)}"
        )
    end = ".conv.weight"
    modules = [name.removesuffix(end) for name in tensors if name.endswith(end)]
    units = [(module, f"{module}.conv", f"{module}.bn") for module in modules]
    return load(Inception, fold_all(tensors, units, _EPS, f"{path}"), f"{path}")


_BRANCHES = {
    "5": ("branch1x1", "branch5x5", "branch3x3dbl"),
    "6": ("branch1x1", "branch7x7", "branch7x7dbl"),
    "7": ("branch1x1", "branch3x3", "branch3x3dbl"),
    "6a": ("branch3x3", "branch3x3dbl"),
    "7a": ("branch3x3", "branch7x7x3"),
}
"""What MindONE calls branch0, branch1 and branch2, by block or by the first digit of a block."""

_IN_A_BRANCH = re.compile(r"Mixed_((\d)\w)\.branch(\d|_pool)(?:\.(\d)|_(\w))?\.((?:conv|bn)\..+)")
_STEM = re.compile(r"Conv2d_(\d\w)\.(.+)")


def from_mindone(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """MindONE's names (`examples/stable_diffusion_v2/tools/eval/fid`) as pytorch-fid's.

    A name that is not MindONE's stays. The parts of a BatchNorm keep their names.
    """
    return {_from_mindone(name): tensor for name, tensor in tensors.items()}


def _from_mindone(name: str) -> str:
    if found := _STEM.fullmatch(name):
        layer, part = found.groups()
        return f"Conv2d_{layer}_{'1x1' if layer == '3b' else '3x3'}.{part}"
    if not (found := _IN_A_BRANCH.fullmatch(name)):
        return name
    block, stage, branch, step, letter, part = found.groups()
    if branch == "_pool":
        return f"Mixed_{block}.branch_pool.{part}"
    names, number = _BRANCHES.get(block) or _BRANCHES.get(stage, ()), int(branch)
    if number >= len(names):
        return name
    if step is not None:  # one of a sequence
        suffix = f"_{int(step) + 1}"
    elif letter is not None:  # one of the two that a branch ends in
        suffix = f"_{number + 1}{letter}"
    else:  # alone, or before those two
        suffix = "_1" if number else ""
    return f"Mixed_{block}.{names[number]}{suffix}.{part}"
