"""LoRA arithmetic against the same thing done with dense matrices."""

from __future__ import annotations

import numpy as np
import pytest

from weights import lora
from weights.files import WeightsError
from weights.lora import Adapter

LINEAR, POINT, CONVOLUTION, TALL = "linear", "point", "convolution", "tall"
SHAPES = {LINEAR: (7, 12), POINT: (9, 6, 1, 1), CONVOLUTION: (8, 5, 3, 3), TALL: (30, 4)}
"""Weights (out, in[, k, k]) of the kinds that are adapted."""


def adapter(kind: str, rank: int = 3, alpha: float = 2.0, seed: int = 0) -> Adapter:
    rng = np.random.default_rng([seed, rank, *SHAPES[kind]])
    out, into, *kernel = SHAPES[kind]
    return Adapter(
        rng.standard_normal((rank, into, *kernel)).astype(np.float32),
        rng.standard_normal((out, rank, *(1 for _ in kernel))).astype(np.float32),
        alpha,
    )


def dense(found: Adapter) -> np.ndarray:
    """ΔW in float64, in the shape of the weight, term by term."""
    total = np.zeros((found.up.shape[0], *found.down.shape[1:]))
    for r in range(found.rank):
        column = found.up.reshape(len(found.up), found.rank)[:, r].astype(np.float64)
        total += np.multiply.outer(column, found.down[r].astype(np.float64))
    return total * found.alpha / found.rank


def matrix(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1)


def truncated(array: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """The closest matrix of this rank, and the share of the squared norm that it keeps."""
    u, s, vt = np.linalg.svd(matrix(array).astype(np.float64), full_matrices=False)
    near = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return near.reshape(array.shape), float((s[:rank] ** 2).sum() / (s**2).sum())


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_change_of_a_weight(kind: str) -> None:
    found = adapter(kind)
    assert found.scale == 2 / 3
    assert found.delta().dtype == np.float32
    close(found.delta(), matrix(dense(found)))


@pytest.mark.parametrize("weight", [1.0, 0.7, -1.0, 0.0])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_merge_adds_the_weighted_change(kind: str, weight: float) -> None:
    found = adapter(kind)
    before = np.random.default_rng(1).standard_normal(SHAPES[kind]).astype(np.float32)
    tensors = {"a.weight": before.copy(), "a.bias": np.ones(3), "b.weight": before}
    merged = lora.merge(tensors, {"a": found}, weight)
    assert merged.keys() == {"a.weight"}
    close(merged["a.weight"], before + weight * dense(found))
    assert np.array_equal(tensors["a.weight"], before)


def test_a_merge_keeps_the_dtype_and_sums_in_float32() -> None:
    found = adapter(LINEAR)
    before = np.random.default_rng(1).standard_normal(SHAPES[LINEAR]).astype(np.float16)
    merged = lora.add(before, found, 0.5)
    assert merged.dtype == np.float16
    wanted = (before.astype(np.float32) + 0.5 * dense(found)).astype(np.float16)
    np.testing.assert_allclose(
        merged.astype(np.float32), wanted.astype(np.float32), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("kind", SHAPES)
def test_combining_is_the_weighted_sum_with_the_ranks_side_by_side(kind: str) -> None:
    parts = [(adapter(kind, 2, 2.0, 1), 0.7), (adapter(kind, 3, 1.0, 2), -0.5),
             (adapter(kind, 1, 4.0, 3), 2.0)]  # fmt: skip
    only = adapter(LINEAR, seed=4)
    loras = [({"unet": {"a": found}}, weight) for found, weight in parts]
    loras.append(({"text_encoder": {"b": only}}, 0.25))
    combined = lora.combine(loras)
    assert combined.keys() == {"unet", "text_encoder"}
    found = combined["unet"]["a"]
    assert found.rank == 6
    assert found.down.shape[1:] == SHAPES[kind][1:]
    assert found.up.shape == (SHAPES[kind][0], 6, *(1 for _ in SHAPES[kind][2:]))
    wanted = sum(weight * dense(part) for part, weight in parts)
    close(found.delta(), matrix(wanted))
    close(combined["text_encoder"]["b"].delta(), 0.25 * dense(only))


def test_a_linear_layer_and_a_one_by_one_convolution_combine() -> None:
    found = adapter(POINT)
    linear = Adapter(found.down[..., 0, 0], found.up[..., 0, 0], found.alpha)
    combined = lora.combine([({"unet": {"a": found}}, 1.0), ({"unet": {"a": linear}}, 1.0)])
    close(combined["unet"]["a"].delta(), matrix(2 * dense(found)))


def test_loras_of_different_models_do_not_combine() -> None:
    with pytest.raises(WeightsError) as raised:
        lora.combine([({"unet": {"a": adapter(LINEAR)}}, 1), ({"unet": {"a": adapter(TALL)}}, 1)])
    assert str(raised.value) == (
        "the LoRAs are for different models: unet.a is 7 × 12 and 30 × 4; merge only those made "
        "for one base"
    )


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_resize_is_the_best_of_its_rank(kind: str, rank: int) -> None:
    found = adapter(kind, rank=5 if kind != TALL else 4, alpha=3.0)
    resized, kept = lora.resize({"unet": {"a": found}}, rank)
    narrow = resized["unet"]["a"]
    assert narrow.rank == min(rank, found.rank)
    wanted, share = truncated(dense(found), rank)
    close(narrow.delta(), matrix(wanted))
    assert kept == pytest.approx(share, abs=1e-9)
    assert narrow.down.shape[1:] == found.down.shape[1:]
    assert narrow.up.shape[2:] == found.up.shape[2:]


def test_a_resize_leaves_alone_what_is_narrow_enough() -> None:
    found = {"unet": {"a": adapter(LINEAR, 2), "b": adapter(CONVOLUTION, 5)}}
    resized, kept = lora.resize(found, 3)
    assert resized["unet"]["a"] is found["unet"]["a"]
    near, _ = truncated(dense(found["unet"]["b"]), 3)
    a, b = dense(found["unet"]["a"]), dense(found["unet"]["b"])
    share = ((a**2).sum() + (near**2).sum()) / ((a**2).sum() + (b**2).sum())
    assert kept == pytest.approx(share, abs=1e-9)


def test_a_resize_of_nothing_keeps_all_of_it() -> None:
    zero = Adapter(adapter(LINEAR).down, np.zeros((7, 3), np.float32), 1.0)
    resized, kept = lora.resize({"unet": {"a": zero}}, 1)
    assert kept == 1.0
    assert not resized["unet"]["a"].delta().any()


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("kind", SHAPES)
def test_an_extract_recovers_a_lora_at_its_rank(kind: str, rank: int) -> None:
    wanted = dense(adapter(kind, rank if kind != TALL else min(rank, 4), alpha=1.5))
    found, kept = lora.extract(wanted, rank)
    assert found.rank == min(rank, *matrix(wanted).shape)
    assert found.scale == 1.0
    assert found.down.shape[1:] == SHAPES[kind][1:]
    close(found.delta(), matrix(wanted))
    assert kept == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", SHAPES)
def test_an_extract_is_the_best_of_its_rank(kind: str, rank: int) -> None:
    delta = np.random.default_rng(3).standard_normal(SHAPES[kind]).astype(np.float32)
    found, kept = lora.extract(delta, rank)
    wanted, share = truncated(delta, rank)
    assert found.rank == rank
    close(found.delta(), matrix(wanted))
    assert kept == pytest.approx(share, abs=1e-9)
    assert 0 < kept < 1


def test_the_family_follows_from_the_width_of_the_text() -> None:
    def of(width: int, module: str = "x.attn2.to_k", network: str = "unet") -> str | None:
        wide = Adapter(np.ones((1, width), np.float32), np.ones((3, 1), np.float32), 1.0)
        return lora.family({network: {module: wide}})

    assert of(768) == "Stable Diffusion 1.x"
    assert of(1024) == "Stable Diffusion 2.x"
    assert of(2048) == "Stable Diffusion XL"
    assert of(768, "text_model.encoder.layers.0.self_attn.q_proj", "text_encoder") == (
        "Stable Diffusion 1.x"
    )
    assert of(768, "x.attn1.to_k") is None
    assert of(64) is None


def test_a_rank_wider_than_the_layer_is_refused() -> None:
    lora.check_rank("a", (320, 64, 1, 1), 64)
    with pytest.raises(WeightsError, match=r"lora\.rank is 65, but a is only 320 × 64; use 64"):
        lora.check_rank("a", (320, 64, 1, 1), 65)
