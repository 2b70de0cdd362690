"""The UNet and the text encoder: adapters of every kind, half precision, upcast attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from mindspore.nn.utils import no_init_parameters
from scipy import special

from diffusion import models
from diffusion.attention import Exchange, ScaledDotProduct, _GatheredExchange
from diffusion.config import ModelConfig, TextEncoderConfig, UNetConfig, load_model_config
from diffusion.convolution import Conv2d
from diffusion.layers import (
    GELU,
    LOGIT,
    GatedGELU,
    GroupNorm,
    LayerNorm,
    _BatchedLayerNorm,
    _FusedGroupNorm,
    _GroupNorm,
    _LayerNorm,
    _LogisticCDF,
    _NormalCDF,
)
from diffusion.lora import adapters, inject, lora_parameters
from diffusion.models import compile_graphs
from diffusion.randomness import generator
from diffusion.text_encoder import CLIPTextModel
from diffusion.unet import UNet2DConditionModel
from tests.diffusion.pulled import Pulled
from weights.lora import merge

UNET = UNetConfig(
    block_out_channels=(16, 32),
    cross_attention=(False, False),
    layers_per_block=1,
    attention_heads=(2, 2),
    cross_attention_dim=16,
    norm_num_groups=8,
)
TEXT = TextEncoderConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    hidden_act="quick_gelu",
    pad_token_id=0,
)
RANK, ALPHA = 2, 3.0
LOSS_SCALE = 1024.0


@pytest.fixture(autouse=True, scope="module")
def graph_mode() -> None:
    compile_graphs()


class Loss(nn.Cell):
    """The mean squared difference to a target, scaled, and the network's output."""

    def __init__(self, network: nn.Cell, scale: float):
        super().__init__(auto_prefix=False)
        self.network = network
        self.scale = scale

    def construct(self, target: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        output = self.network(*inputs)
        error = output - target
        return (error * error).mean() * self.scale, output


class Gradient(nn.Cell):
    """Output, loss and the gradient of the adapters as one vector."""

    def __init__(self, network: nn.Cell, scale: float):
        super().__init__(auto_prefix=False)
        trained = ms.ParameterTuple(network.trainable_params())
        self.gradient = ops.value_and_grad(Loss(network, scale), None, trained, has_aux=True)

    def construct(self, target: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (loss, output), gradients = self.gradient(target, *inputs)
        return output, loss, ops.concat([gradient.reshape(-1) for gradient in gradients])


class Trial:
    """A network with adapters that are not zero, and its gradient as one graph."""

    def __init__(
        self,
        kind: str,
        dtype: object = ms.float32,
        frozen: str | None = None,
        recomputed: bool = False,
    ):
        self.network = UNet2DConditionModel(UNET) if kind == "unet" else CLIPTextModel(TEXT)
        fill(self.network)
        models.store_as(self.network, dtype)
        targets = "convolution" if kind == "unet" else "text_encoder"
        self.modules = inject(self.network, targets, RANK, ALPHA)
        fill(self.network, "lora_up.weight")
        for parameter in lora_parameters(self.network):
            parameter.requires_grad = frozen is None or frozen not in parameter.name
        if recomputed:
            models.recompute(self.network)
        self.scale = LOSS_SCALE if dtype == ms.float16 else 1.0
        self.graph = Gradient(self.network, self.scale)
        self.inputs = INPUTS[kind]

    def __call__(self) -> tuple[np.ndarray, float, np.ndarray]:
        output, loss, gradient = self.graph(*(Tensor(array) for array in self.inputs))
        assert output.dtype == gradient.dtype == ms.float32
        return output.asnumpy(), float(loss.asnumpy()), gradient.asnumpy() / self.scale

    def arrays(self) -> dict[str, np.ndarray]:
        return {p.name: p.asnumpy().copy() for p in self.network.get_parameters()}

    def put(self, tensors: dict[str, np.ndarray]) -> None:
        models.set_weights(self.network, tensors.items(), "a test")


def draw(name: str, *shape: int) -> np.ndarray:
    return generator(3, name).standard_normal(shape).astype(np.float32)


def fill(network: nn.Cell, ending: str = "") -> None:
    """Made-up values in the parameters whose names end so; of the order of a trained network."""
    for parameter in network.get_parameters():
        if parameter.name.endswith(ending):
            shape = tuple(parameter.shape)
            value = draw(parameter.name, *shape)
            if len(shape) > 1:
                value /= np.sqrt(np.prod(shape[1:]))
            elif parameter.name.endswith("weight"):
                value = 1 + 0.1 * value
            parameter.set_data(Tensor(value.astype(np.float32), parameter.dtype))


INPUTS = {
    "unet": (
        draw("target", 2, 4, 8, 8),
        draw("latents", 2, 4, 8, 8),
        np.array([10, 700], np.int32),
        draw("text", 2, 7, 16),
    ),
    "text_encoder": (
        draw("hidden", 2, 9, 16),
        generator(3, "ids").integers(50, size=(2, 9)).astype(np.int32),
    ),
}


@pytest.fixture(scope="module", params=["unet", "text_encoder"])
def trial(request: pytest.FixtureRequest) -> Iterator[Trial]:
    yield Trial(request.param)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_an_adapter_in_the_weights_is_the_same_as_one_beside_them(trial: Trial) -> None:
    apart, _, _ = trial()
    tensors = trial.arrays()
    trained = {name: array for name, array in tensors.items() if ".lora_" in name}
    found = adapters(trained, ALPHA)
    assert set(found) == set(trial.modules)
    without = {name: np.zeros_like(array) for name, array in trained.items() if "_up." in name}
    trial.put(without)
    plain, _, _ = trial()
    trial.put(merge(tensors, found))
    merged, _, _ = trial()
    trial.put(tensors)
    assert np.abs(plain - apart).max() > 0.1 * np.abs(apart).max()
    np.testing.assert_allclose(merged, apart, rtol=0, atol=1e-5 * np.abs(apart).max())


def test_the_gradient_is_the_slope_of_the_loss(trial: Trial) -> None:
    """Along random directions, one for each kind of layer, by central differences."""
    _, _, gradient = trial()
    parameters = trial.network.trainable_params()
    before = {p.name: p.asnumpy().copy() for p in parameters}
    parts = np.split(gradient, np.cumsum([p.size for p in parameters])[:-1])
    slopes = {p.name: part.reshape(p.shape) for p, part in zip(parameters, parts, strict=True)}
    kinds: dict[str, list[str]] = {}
    for name in before:
        module, _, matrix = name.rpartition(".lora_")
        kinds.setdefault(f"{module.rpartition('.')[2]} {matrix}", []).append(name)
    step = 3e-3
    for kind, names in kinds.items():
        norm = np.sqrt(sum((slopes[name] ** 2).sum() for name in names))
        losses = []
        for sign in (1, -1):
            along = {n: before[n] + sign * step * slopes[n] / norm for n in names}
            trial.put(along)
            losses.append(trial()[1])
        trial.put({name: before[name] for name in names})
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(norm, rel=0.02), kind


def test_half_precision_gives_nearly_the_same(trial: Trial) -> None:
    kind = "unet" if len(trial.inputs) == 4 else "text_encoder"
    output, loss, gradient = trial()
    half = Trial(kind, ms.float16)
    for name, cell in half.network.cells_and_names():
        for parameter in cell.get_parameters(expand=False):
            whole = isinstance(cell, GroupNorm | LayerNorm) or ".lora_" in parameter.name
            assert parameter.dtype == (ms.float32 if whole else ms.float16), name
    output_half, loss_half, gradient_half = half()
    assert np.isfinite(gradient_half).all()
    assert np.abs(output_half - output).max() < 0.01 * np.abs(output).max()
    assert loss_half / LOSS_SCALE == pytest.approx(loss, rel=0.01)
    assert cosine(gradient_half, gradient) > 0.999
    assert np.linalg.norm(gradient_half) == pytest.approx(np.linalg.norm(gradient), rel=0.01)


@pytest.mark.parametrize("frozen", ["nothing", pytest.param("blocks", marks=pytest.mark.slow)])
def test_recomputation_changes_no_gradient(frozen: str) -> None:
    """With adapters inside of the blocks that are computed again, and only outside of them."""
    inside = ".transformer_blocks." if frozen == "blocks" else None
    plain, again = (Trial("unet", frozen=inside, recomputed=r) for r in (False, True))
    assert again.arrays().keys() == plain.arrays().keys()
    for ours, theirs in zip(again(), plain(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
@pytest.mark.parametrize("network", ["unet", "text_encoder", "vae"])
def test_what_is_stored_in_half_precision(network: str, dtype: object) -> None:
    config = load_model_config("emoji")
    with no_init_parameters():
        cell = models.build(config, network, dtype)
    found = {p.name: p.dtype for p in cell.get_parameters()}
    if network == "vae":
        assert set(found.values()) == {ms.float32}
        return
    norms = [name for name in found if "norm" in name]
    assert norms
    assert {found[name] for name in norms} == {ms.float32}
    assert {found[name] for name in found if name not in norms} == {dtype}


# ---- upcast attention


class Attention(nn.Cell):
    """Attention, and the gradients of q, k and v for a given one of the output."""

    def __init__(self, attend: nn.Cell):
        super().__init__(auto_prefix=False)
        self.attend = attend
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)(attend)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return (self.attend(q, k, v), *self.gradient(q, k, v, dout))


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The same in float64."""
    scale = q.shape[-1] ** -0.5
    scores = scale * q @ k.transpose(0, 2, 1)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = dout @ v.transpose(0, 2, 1)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    return p @ v, ds @ k, ds.transpose(0, 2, 1) @ q, p.transpose(0, 2, 1) @ dout


def test_upcast_attention_survives_scores_beyond_float16() -> None:
    tokens, width = 6, 64
    v, dout = draw("v", 2, tokens, width), 0.1 * draw("dout", 2, tokens, width)
    # All scores are near 80 000 and differ by a few units.
    q = np.full((2, tokens, width), 100, np.float32) + draw("q", 2, tokens, width)
    k = np.full((2, tokens, width), 100, np.float32) + 0.05 * draw("k", 2, tokens, width)
    half = [array.astype(np.float16) for array in (q, k, v, dout)]
    wanted = attention(*(array.astype(np.float64) for array in half))
    found = Attention(ScaledDotProduct(width, upcast=True))(*map(Tensor, half))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == ms.float16
        np.testing.assert_allclose(ours.asnumpy(), theirs, atol=0.02 * np.abs(theirs).max())
    plain = Attention(ScaledDotProduct(width))(*map(Tensor, half))
    assert not np.isfinite(plain[0].asnumpy()).all()


def test_upcast_attention_reaches_every_attention() -> None:
    config = load_model_config("sd21-v")
    assert config.unet.upcast_attention
    for upcast in (True, False):
        unet = models.build(small(config, upcast), "unet")
        cells = [c for _, c in unet.cells_and_names() if isinstance(c, ScaledDotProduct)]
        assert cells
        assert {cell.upcast for cell in cells} == {upcast}


def small(config: ModelConfig, upcast: bool) -> ModelConfig:
    unet = UNET.model_copy(update={"upcast_attention": upcast})
    return config.model_copy(update={"unet": unet})


class _Normalized(nn.Cell):
    """Gradients by x, weight and bias, and the value."""

    def __init__(self, norm: nn.Cell):
        super().__init__()
        self.norm = norm
        self.gradients = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor, dout: Tensor) -> tuple:
        value = self.norm(x, weight, bias)
        return (value, *self.gradients(self.norm)(x, weight, bias, dout))


@pytest.mark.parametrize("shape", [(2, 32, 6, 10), (3, 8, 64, 80)])
def test_group_norm_is_on_cpu_what_it_is_elsewhere(shape: tuple[int, ...]) -> None:
    """Of large values far from zero too; with an odd number of pixels in a group."""
    draw = np.random.default_rng(0)
    arrays = [draw.normal(5, 3, shape), draw.normal(1, 1, shape[1]), draw.normal(0, 1, shape[1])]
    given = [Tensor(array, ms.float32) for array in (*arrays, draw.normal(0, 1, shape))]
    both = [_Normalized(kind(4, 1e-5))(*given) for kind in (_GroupNorm, _FusedGroupNorm)]
    assert_same(*both)


@pytest.mark.parametrize("shape", [(2, 77, 64), (3, 130, 321)])
def test_layer_norm_is_on_cpu_what_it_is_elsewhere(shape: tuple[int, ...]) -> None:
    draw = np.random.default_rng(0)
    arrays = [draw.normal(5, 3, shape), draw.normal(1, 1, shape[2]), draw.normal(0, 1, shape[2])]
    given = [Tensor(array, ms.float32) for array in (*arrays, draw.normal(0, 1, shape))]
    assert_same(*(_Normalized(kind(1e-5))(*given) for kind in (_LayerNorm, _BatchedLayerNorm)))


def assert_same(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    for expected, found in zip(one, other, strict=True):
        largest = np.abs(expected.asnumpy()).max()
        np.testing.assert_allclose(found.asnumpy(), expected.asnumpy(), rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("attending", [(False, True), (True, False), (False, False)])
def test_several_texts_for_each_of_the_latents(attending: tuple[bool, bool]) -> None:
    """As if latents and timesteps were there once for each text, wherever attention begins."""
    unet = UNet2DConditionModel(UNET.model_copy(update={"cross_attention": attending}))
    fill(unet)
    unet.set_train(False)
    _, latents, timesteps, _ = INPUTS["unet"]
    text = draw("texts", 6, 7, 16)
    ours = unet(Tensor(latents), Tensor(timesteps), Tensor(text)).asnumpy()
    repeated = np.tile(latents, (3, 1, 1, 1)), np.tile(timesteps, 3), text
    theirs = unet(*map(Tensor, repeated)).asnumpy()
    assert np.abs(theirs[:2] - theirs[2:4]).max() > 0.01
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_exchanging_by_rows_is_a_transpose() -> None:
    x, weights = draw("x", 2, 3, 5, 4), draw("weights", 2, 3, 5, 4)
    found = Pulled(_GatheredExchange())(Tensor(x), Tensor(weights.reshape(2, 5, 3, 4)))
    usual = Pulled(Exchange())(Tensor(x), Tensor(weights.reshape(2, 5, 3, 4)))
    np.testing.assert_array_equal(found[0].asnumpy(), x.transpose(0, 2, 1, 3))
    for one, other in zip(found, usual, strict=True):
        np.testing.assert_array_equal(one.asnumpy(), other.asnumpy())


class ToRows(nn.Cell):
    def __init__(self, layer: Conv2d):
        super().__init__()
        self.layer = layer

    def construct(self, x: Tensor) -> Tensor:
        return self.layer.to_rows(x)


class FromRows(ToRows):
    def construct(self, x: Tensor) -> Tensor:
        return self.layer.from_rows(x, 4, 6)


@pytest.mark.parametrize("channels", [5, 40])
def test_a_pointwise_convolution_of_rows_is_the_same(channels: int) -> None:
    """With more positions than channels, and with fewer."""
    layer = Conv2d(channels, 7, 1)
    weight, bias = layer.weight.asnumpy().reshape(7, channels), draw("bias", 7)
    layer.bias.set_data(Tensor(bias))
    x, weights = draw("x", 3, channels, 4, 6), draw("weights", 3, 24, 7)
    rows = x.reshape(3, channels, 24).transpose(0, 2, 1)
    expected = rows @ weight.T + bias

    found, gradient = Pulled(ToRows(layer))(Tensor(x), Tensor(weights))
    np.testing.assert_allclose(found.asnumpy(), expected, atol=1e-5)
    back = (weights @ weight).transpose(0, 2, 1).reshape(x.shape)
    np.testing.assert_allclose(gradient.asnumpy(), back, atol=1e-5)

    images = weights.transpose(0, 2, 1).reshape(3, 7, 4, 6)
    found, gradient = Pulled(FromRows(layer))(Tensor(rows), Tensor(images))
    planes = expected.transpose(0, 2, 1).reshape(3, 7, 4, 6)
    np.testing.assert_allclose(found.asnumpy(), planes, atol=1e-5)
    np.testing.assert_allclose(gradient.asnumpy(), weights @ weight, atol=1e-5)


def test_a_network_that_is_released_has_given_its_weights_back() -> None:
    network = CLIPTextModel(TEXT)
    network(Tensor(np.zeros((1, 4), np.int32)))
    models.release(network)
    assert {parameter.size for parameter in network.get_parameters()} == {1}


def test_the_logistic_function_of_a_polynomial_is_the_normal_distribution() -> None:
    x = np.linspace(-40, 40, 80_001)
    found = special.expit(x * np.polynomial.polynomial.polyval(x * x, LOGIT))
    assert np.abs(found - special.ndtr(x)).max() <= 3e-8


@pytest.mark.parametrize(("kind", "error"), [(_NormalCDF, 1e-7), (_LogisticCDF, 1e-6)])
def test_both_ways_to_the_normal_distribution(kind: type[nn.Cell], error: float) -> None:
    large = [-np.inf, -1e30, -1e4, 1e4, 1e30, np.inf]
    x = np.concatenate((np.linspace(-9, 9, 100_001), large)).astype(np.float32)
    found = kind()(Tensor(x)).asnumpy()
    assert np.abs(found - special.ndtr(x.astype(np.float64))).max() <= error


@pytest.mark.parametrize("kind", [_NormalCDF, _LogisticCDF])
@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_gelu_and_its_gradient(kind: type[nn.Cell], dtype: object) -> None:
    x = np.linspace(-6, 6, 1001).astype(np.float32 if dtype == ms.float32 else np.float16)
    exact = x.astype(np.float64)
    value = exact * special.ndtr(exact)
    slope = special.ndtr(exact) + exact * np.exp(-exact * exact / 2) / np.sqrt(2 * np.pi)
    within = 1e-6 if dtype == ms.float32 else 4e-3
    gelu, gated = GELU(), GatedGELU()
    gelu.cdf = gated.cdf = kind()
    assert np.abs(gelu(Tensor(x)).asnumpy() - value).max() <= within
    assert np.abs(ms.grad(gelu)(Tensor(x)).asnumpy() - slope).max() <= within
    hidden = Tensor(np.full_like(x, -0.5))
    assert np.abs(gated(hidden, Tensor(x)).asnumpy() + 0.5 * value).max() <= within
    of_hidden, of_gate = ms.grad(gated, (0, 1))(hidden, Tensor(x))
    assert np.abs(of_hidden.asnumpy() - value).max() <= within
    assert np.abs(of_gate.asnumpy() + 0.5 * slope).max() <= within
