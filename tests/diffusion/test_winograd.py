"""Convolutions by Winograd's algorithm against direct ones, and what becomes of changed weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.ops.primitive import constexpr

from diffusion import models, winograd
from diffusion.config import load_model_config
from diffusion.convolution import Conv2d
from diffusion.layers import name_parameters
from diffusion.lora import inject, lora_parameters
from diffusion.models import compile_graphs, transform_convolutions
from diffusion.resnet import Upsample
from diffusion.unet import UNet2DConditionModel
from diffusion.vae import AutoencoderKL
from tests.diffusion.pulled import Pulled

RULE = winograd.worthwhile


@pytest.fixture(autouse=True, scope="module")
def always() -> Iterator[None]:
    """Winograd's way wherever it can be gone, worthwhile or not."""
    compile_graphs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "worthwhile", constexpr(lambda *sizes: True, name="always"))
        yield


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 13])
def test_one_side_is_a_correlation_with_padding(length: int) -> None:
    """In double precision the matrices give what np.correlate gives."""
    draw = np.random.default_rng(length)
    side, kernel = draw.standard_normal(length), draw.standard_normal(3)
    points = (winograd._G @ kernel).repeat(winograd.tiles(length))
    tiles = points * (winograd.input_matrix(length, length).astype(np.float64) @ side)
    ours = tiles @ winograd.output_matrix(length).astype(np.float64)
    np.testing.assert_allclose(ours, np.correlate(np.pad(side, 1), kernel, "valid"), atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "channels", "out", "height", "width"),
    [(2, 8, 24, 16, 16), (3, 20, 6, 7, 10), (1, 5, 5, 4, 12), (2, 6, 7, 1, 2), (2, 6, 7, 64, 128)],
)
def test_as_the_direct_convolution(
    batch: int, channels: int, out: int, height: int, width: int
) -> None:
    """Output, and gradient by the input."""
    convolution = name_parameters(Conv2d(channels, out, 3, padding=1))
    x, weights = normal(batch, channels, height, width), normal(batch, out, height, width)
    inputs = (Tensor(x), Tensor(weights))
    direct = [found.asnumpy() for found in Pulled(convolution)(*inputs)]
    transform_convolutions(convolution)
    assert convolution.is_transformed
    for ours, theirs in zip(Pulled(convolution)(*inputs), direct, strict=True):
        close(ours.asnumpy(), theirs)


@pytest.mark.parametrize("size", [(10, 14), (9, 14), (9, 13), (128, 32)])
def test_of_an_enlarged_input(size: tuple[int, int]) -> None:
    """The enlargement is in the matrices, and cut to the size that is asked for."""
    given = tuple((length + 1) // 2 for length in size)

    class Enlarged(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.upsample = Upsample(12)

        def construct(self, x: Tensor) -> Tensor:
            return self.upsample(x, like)

    like = Tensor(normal(1, 1, *size))
    x, weights = Tensor(normal(2, 12, *given)), Tensor(normal(2, 12, *size))
    network = name_parameters(Enlarged())
    direct = [found.asnumpy() for found in Pulled(network)(x, weights)]
    transform_convolutions(network)
    for ours, theirs in zip(Pulled(network)(x, weights), direct, strict=True):
        close(ours.asnumpy(), theirs)
    rows, columns = (
        np.repeat(np.arange(n), 2)[:length] for n, length in zip(given, size, strict=True)
    )
    repeated = Tensor(x.asnumpy()[:, :, rows][:, :, :, columns])
    close(network.upsample.conv(repeated).asnumpy(), direct[0])


def test_new_weights_are_transformed_too() -> None:
    network = transform_convolutions(name_parameters(nn.CellList([Conv2d(8, 8, 3, padding=1)])))
    x = Tensor(normal(1, 8, 8, 8))
    before = network[0](x).asnumpy()
    weight = normal(8, 8, 3, 3)
    models.set_weights(network, {"0.weight": weight}.items(), "a test")
    fresh = Conv2d(8, 8, 3, padding=1)
    fresh.weight.set_data(Tensor(weight))
    fresh.bias.set_data(network[0].bias)
    close(network[0](x).asnumpy(), fresh(x).asnumpy())
    assert np.abs(network[0](x).asnumpy() - before).max() > 0.1


@pytest.mark.parametrize("first", ["transformed", "adapted"])
def test_an_adapter_beside_transformed_weights(first: str) -> None:
    """On every convolution of a UNet, also those that follow an enlargement."""
    config = load_model_config("emoji").unet
    inputs = [Tensor(normal(1, 4, 12, 12)), Tensor(normal(1)), Tensor(normal(1, 77, 64))]
    unets = [UNet2DConditionModel(config).set_train(False) for _ in range(2)]
    base = {p.name: 0.05 * normal(*p.shape) for p in unets[0].get_parameters()}
    for unet in unets:
        models.set_weights(unet, base.items(), "a test")
    if first == "transformed":
        transform_convolutions(unets[0])
    for unet in unets:
        inject(unet, "convolution", 2, 2.0)
        for parameter in lora_parameters(unet):
            parameter.set_data(Tensor(0.05 * normal(*parameter.shape)))
    if first == "adapted":
        transform_convolutions(unets[0])
    adapted = [cell for _, cell in unets[0].cells_and_names() if hasattr(cell, "lora_down")]
    assert sum(getattr(cell, "is_transformed", False) for cell in adapted) > 10
    assert all(parameter.requires_grad for parameter in lora_parameters(unets[0]))
    close(*(unet(*inputs).asnumpy() for unet in unets))


def test_a_part_of_a_network_keeps_its_names() -> None:
    config = load_model_config("emoji").vae
    vae = transform_convolutions(AutoencoderKL(config), "encoder")
    names = [parameter.name for parameter in vae.get_parameters()]
    transformed = [name for name in names if name.endswith(".transformed")]
    assert transformed
    assert all(name.startswith("encoder.") for name in transformed)
    assert {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= set(names)


def test_what_does_not_fit_stays() -> None:
    """Kernels of few or of very many channels, strided and 1 × 1 ones stay as they are."""
    assert not winograd.fits(4, 320)
    assert not winograd.fits(640, 640)
    for convolution in (Conv2d(8, 8, 3, stride=2, padding=1), Conv2d(8, 8, 1)):
        assert not transform_convolutions(convolution).is_transformed


@pytest.mark.parametrize(
    ("sizes", "taken"),
    [
        ((32, 64, 64, 16, 16), True),
        ((2, 80, 80, 32, 32), True),
        ((2, 320, 320, 8, 8), True),
        ((2, 320, 320, 4, 4), False),
        ((4, 128, 128, 4, 4), False),
        ((1, 16, 16, 64, 64), False),
        ((64, 4, 64, 16, 16), False),
        ((64, 128, 128, 2, 2), False),
        ((1, 512, 512, 128, 128), True),
        ((1, 256, 128, 256, 256), True),
        ((1, 128, 128, 256, 256), False),
        ((1, 256, 256, 512, 512), False),
    ],
)
def test_where_it_is_worth_it(sizes: tuple[int, ...], taken: bool) -> None:
    assert RULE(*sizes) is taken
