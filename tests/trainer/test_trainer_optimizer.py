"""AdamW and Prodigy over one flat vector, against arithmetic in double precision."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

from diffusion.models import compile_graphs
from trainer.config import OptimizerConfig
from trainer.optimizer import AdamW, Optimizer, Prodigy, learning_rate, make_optimizer

START = np.linspace(-1, 1, 6)
TARGET = np.array([0.5, -0.3, 0.8, 0.1, -0.9, 0.4])
CURVATURE = np.arange(1, 7)


@pytest.fixture(autouse=True, scope="module")
def graph_mode() -> None:
    compile_graphs()


def parameters(module: str = "to_q") -> list[Parameter]:
    """START, as two tensors."""
    down = Tensor(START[:4].reshape(2, 2), ms.float32)
    return [
        Parameter(down, name=f"{module}.lora_down.weight"),
        Parameter(Tensor(START[4:], ms.float32), name=f"{module}.lora_up.weight"),
    ]


def gradient(weights: np.ndarray) -> np.ndarray:
    """Of Σ CURVATURE · (weights − TARGET)²."""
    return 2 * CURVATURE * (weights - TARGET)


def update(optimizer: Optimizer, gradient: np.ndarray, rate: float, decay: float = 0) -> np.ndarray:
    scalars = (Tensor(rate, ms.float32), Tensor(decay, ms.float32))
    return optimizer(Tensor(gradient, ms.float32), *scalars).asnumpy()


def test_adamw_is_adamw() -> None:
    options = OptimizerConfig(betas=(0.9, 0.99), weight_decay=0.1, max_grad_norm=5, eps=1e-6)
    optimizer = AdamW(parameters(), options)
    weights, first, second, average = START.copy(), np.zeros(6), np.zeros(6), START.copy()
    for step in range(1, 21):
        own = gradient(weights)
        norm, applied, rate = update(optimizer, gradient(optimizer.weights()), 0.05, 0.8)
        assert (applied, rate) == (1, np.float32(0.05))
        assert norm == pytest.approx(np.linalg.norm(own), rel=1e-4)
        own = own * min(1, 5 / (np.linalg.norm(own) + 1e-6))
        first = 0.9 * first + 0.1 * own
        second = 0.99 * second + 0.01 * own**2
        direction = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.99**step)) + 1e-6)
        weights = weights - 0.05 * (direction + 0.1 * weights)
        average = 0.8 * average + 0.2 * weights
        np.testing.assert_allclose(optimizer.weights(), weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(optimizer.average.asnumpy(), average, rtol=1e-5, atol=1e-6)


def test_prodigy_is_the_authors() -> None:
    """Golden values of prodigyopt 1.1.2 in double precision, gradients clipped to 1."""
    small = [Parameter(Tensor(START / 1000, ms.float32), name="weight")]
    optimizer = Prodigy(small, OptimizerConfig(name="prodigy", weight_decay=0.01))
    estimates = []
    for step in range(60):
        own = 2 * CURVATURE * (optimizer.weights() - TARGET / 1000)
        update(optimizer, own, min(1, (step + 1) / 5))
        estimates.append(float(optimizer.estimate.asnumpy()[0]))
    expected = [1e-06, 1e-06, 1.21919612069222e-06, 2.0353600115235262e-05, 0.0001107281399979799]
    np.testing.assert_allclose([estimates[i] for i in (0, 9, 19, 39, 59)], expected, rtol=1e-3)
    golden = [1006.44767, -337.302092, 908.449756, 92.0458202, -1406.45679, 526.35743]
    np.testing.assert_allclose(1e6 * optimizer.weights(), golden, atol=1)


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(name: str, bad: float) -> None:
    optimizer = make_optimizer({"unet": parameters()}, OptimizerConfig(name=name))
    broken = np.array([1, 2, bad, 4, 5, 6])

    def unchanged() -> None:
        before = optimizer.vectors()
        norm, applied, _ = update(optimizer, broken, 0.1)
        assert applied == 0
        assert not np.isfinite(norm)
        for key, vector in optimizer.vectors().items():
            np.testing.assert_array_equal(vector, before[key], key)

    unchanged()  # at the very first step nothing is known of the moments
    update(optimizer, gradient(START), 0.1)
    unchanged()


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_what_is_restored_goes_on_to_the_bit(name: str) -> None:
    options = OptimizerConfig(name=name)
    one, other = (make_optimizer({"unet": parameters()}, options) for _ in range(2))
    for _ in range(3):
        update(one, gradient(one.weights()), 0.1, 0.5)
    other.restore(one.vectors())
    for optimizer in (one, other):
        update(optimizer, gradient(optimizer.weights()), 0.1, 0.5)
    for key, vector in one.vectors().items():
        np.testing.assert_array_equal(vector, other.vectors()[key], key)


def test_parameters_of_all_shapes_get_their_own_parts_back() -> None:
    """Side by side or not, alone or many, matrices or vectors."""
    shapes = [(2, 3), (2, 3), (2, 3), (3, 2), (6,), (6,), (2, 3)]
    sizes = [int(np.prod(shape)) for shape in shapes]
    values = np.split(np.linspace(-1, 1, sum(sizes)), np.cumsum(sizes)[:-1])
    trained = [
        Parameter(Tensor(value.reshape(shape), ms.float32), name=f"part{i}")
        for i, (value, shape) in enumerate(zip(values, shapes, strict=True))
    ]
    optimizer = AdamW(trained, OptimizerConfig(weight_decay=0.5, max_grad_norm=1e9))
    update(optimizer, np.zeros(sum(sizes)), 0.5)
    for parameter, value, shape in zip(trained, values, shapes, strict=True):
        found = parameter.asnumpy()
        np.testing.assert_allclose(found, 0.75 * value.reshape(shape), rtol=1e-6, atol=1e-7)


def test_up_matrices_and_the_text_encoder_have_rates_of_their_own() -> None:
    options = OptimizerConfig(
        learning_rate=1e-2, text_encoder_learning_rate=5e-3, lora_plus_ratio=4, weight_decay=0
    )
    trained = {"unet": parameters(), "text_encoder": parameters("q_proj")}
    optimizer = make_optimizer(trained, options)
    update(optimizer, np.ones(12), 1e-2)
    moved = np.tile(START, 2) - optimizer.weights()
    np.testing.assert_allclose(
        moved, 1e-2 * np.array([1] * 4 + [4] * 2 + [0.5] * 4 + [2] * 2), rtol=1e-4
    )


def test_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(step, 110, 1.0, 10, "cosine") for step in range(110)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3
    assert learning_rate(109, 110, 1.0, 10, "constant") == 1.0


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.5), ("polynomial", 0.25)])
def test_every_schedule_warms_up_and_ends_near_zero(schedule: str, middle: float) -> None:
    rates = [learning_rate(step, 110, 2.0, 10, schedule) for step in range(110)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 5)
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(2 * middle)
    assert 0 < rates[-1] < 0.03
    assert rates[10:] == sorted(rates[10:], reverse=True)
