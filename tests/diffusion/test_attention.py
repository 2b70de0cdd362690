"""Attention in slices, and networks that are called again and again."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from diffusion import attention
from diffusion.attention import MultiHead, slices
from diffusion.layers import Network
from diffusion.models import compile_graphs


@pytest.fixture(autouse=True, scope="module")
def graph_mode() -> None:
    compile_graphs()


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


class Attended(nn.Cell):
    """The output, and the gradients of q, k and v for a given one of it."""

    def __init__(self, attend: nn.Cell):
        super().__init__()
        self.attend = attend
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)(attend)

    def construct(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return (self.attend(q, k, v), *self.gradient(q, k, v, dout))


@pytest.mark.parametrize("context", [6, 10])
def test_slices_of_heads_attend_as_all_together(
    monkeypatch: pytest.MonkeyPatch, context: int
) -> None:
    given = [Tensor(normal(2, n, 24)) for n in (10, context, context, 10)]
    whole = Attended(MultiHead(24, 4))(*given)
    monkeypatch.setattr(attention, "_SLICE_OF_SCORES", 2 * 10 * context)
    assert attention.slices(8, 10, context) == 4
    sliced = Attended(MultiHead(24, 4))(*given)
    for ours, theirs in zip(sliced, whole, strict=True):
        np.testing.assert_allclose(ours.asnumpy(), theirs.asnumpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "tokens", "context", "wanted"),
    [
        (16, 64, 77, 1),
        (16, 1024, 1024, 4),
        (8, 1024, 1024, 2),
        (8, 4096, 4096, 8),
        (6, 2048, 1024, 3),
    ],
)
def test_slices_are_equal_and_at_least_a_head(
    rows: int, tokens: int, context: int, wanted: int
) -> None:
    assert slices(rows, tokens, context) == wanted


def test_a_network_in_two_graphs_of_two_shapes() -> None:
    """Its cells are told which graph they are in only when that changes; results do not change."""

    class Inner(nn.Cell):
        told = 0

        def construct(self, x: Tensor) -> Tensor:
            return 2 * x

        @property
        def compile_phase(self) -> str | None:
            return super().compile_phase

        @compile_phase.setter
        def compile_phase(self, phase: str) -> None:
            Inner.told += 1
            nn.Cell.compile_phase.fset(self, phase)

    class Outer(Network):
        def __init__(self, inner: nn.Cell, shift: float):
            super().__init__()
            self.inner = inner
            self.shift = shift

        def construct(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.shift

    inner = Inner()
    networks = [Outer(inner, shift) for shift in (0.0, 1.0)]
    for length in (1, 2, 1, 1, 2):
        for network in networks:
            x = np.arange(length, dtype=np.float32)
            found = network(Tensor(x, ms.float32)).asnumpy()
            np.testing.assert_array_equal(found, 2 * x + network.shift)
    assert Inner.told == 2 * 4
