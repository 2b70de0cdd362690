"""Scores of pictures, against double loops, closed forms and the spread of many draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pytest
from scipy.linalg import sqrtm

from sampler import metrics
from sampler.metrics import MetricsError, Score

Kernel = Callable[[np.ndarray, np.ndarray], float]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def cubic(x: np.ndarray, y: np.ndarray) -> float:
    return (x @ y / len(x) + 1) ** 3


def rbf(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    return np.exp(-np.sum((x - y) ** 2) / (2 * 10**2))


def looped_mmd(
    kernel: Kernel, x: np.ndarray, y: np.ndarray, x_labels: Sequence, y_labels: Sequence
) -> float:
    """MMD² over all pairs whose labels differ, one by one."""

    def mean(a: np.ndarray, b: np.ndarray, a_labels: Sequence, b_labels: Sequence) -> float:
        pairs = product(zip(a, a_labels, strict=True), zip(b, b_labels, strict=True))
        return float(np.mean([kernel(p, q) for (p, i), (q, j) in pairs if i != j]))

    return (
        mean(x, x, x_labels, x_labels)
        + mean(y, y, y_labels, y_labels)
        - 2 * mean(x, y, x_labels, y_labels)
    )


def own(side: str, count: int) -> list[str]:
    return [f"{side} {i}" for i in range(count)]


# ---- values


@pytest.mark.parametrize("name", ["kid", "cmmd"])
def test_mmd_is_the_mean_over_all_pairs_of_two_pictures(name: str) -> None:
    x, y = normal(1, 9, 5), normal(2, 6, 5) + 0.5
    score = getattr(metrics, name)
    kernel, scale = (cubic, 1) if name == "kid" else (rbf, 1000)
    expected = scale * looped_mmd(kernel, x, y, own("x", 9), own("y", 6))
    assert score(x, y).value == pytest.approx(expected, rel=1e-9)

    groups, real_groups = list("aabbcc"), list("abcdefghi")
    expected = scale * looped_mmd(kernel, x, y, own("x", 9), groups)
    assert score(x, y, groups).value == pytest.approx(expected, rel=1e-9)
    expected = scale * looped_mmd(kernel, x, y, real_groups, groups)
    assert score(x, y, groups, real_groups).value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["kid", "cmmd"])
def test_a_difference_is_that_of_the_two_values(name: str) -> None:
    x, base, lora = normal(1, 12, 5), normal(2, 9, 5) + 0.5, normal(3, 9, 5) + 0.2
    score, difference = getattr(metrics, name), getattr(metrics, f"{name}_difference")
    for groups, real_groups in [(range(9), None), (list("aaabbbccd"), list("abcdefghijkl"))]:
        both = [score(x, y, groups, real_groups).value for y in (lora, base)]
        found = difference(x, base, lora, groups, real_groups).value
        assert found == pytest.approx(both[0] - both[1], rel=1e-9)
    reverse = difference(x, lora, base, groups, real_groups)
    assert reverse.value == pytest.approx(both[1] - both[0], rel=1e-9)


def gaussian_kid(a: np.ndarray, A: np.ndarray, b: np.ndarray, B: np.ndarray) -> float:
    """The true KID of N(a, diag A) and N(b, diag B)."""

    def mean(a: np.ndarray, A: np.ndarray, b: np.ndarray, B: np.ndarray) -> float:
        d, ab = len(a), a @ b
        second = A @ B + b**2 @ A + a**2 @ B + ab**2
        third = ab**3 + 3 * ab * (b**2 @ A + a**2 @ B + A @ B) + 6 * np.sum(a * B * A * b)
        return float(1 + 3 * ab / d + 3 * second / d**2 + third / d**3)

    return mean(a, A, a, A) + mean(b, B, b, B) - 2 * mean(a, A, b, B)


MEANS = np.zeros(6), np.array([0.6, 0.3, 0, 0, 0, -0.3])
VARIANCES = 1 / np.arange(1.0, 7), 0.8 / np.arange(1.0, 7)
TRUE_KID = gaussian_kid(MEANS[0], VARIANCES[0], MEANS[1], VARIANCES[1])


def drawn(seed: int, side: int, count: int) -> np.ndarray:
    """Features of one of two Gaussian models."""
    return MEANS[side] + normal(2 * seed + side, count, 6) * VARIANCES[side] ** 0.5


@pytest.fixture(scope="module")
def kids() -> list[Score]:
    """KID of 40 real and 40 generated pictures, 300 times."""
    return [metrics.kid(drawn(i, 0, 40), drawn(i, 1, 40)) for i in range(300)]


def test_kid_is_unbiased(kids: list[Score]) -> None:
    values = np.array([score.value for score in kids])
    assert abs(values.mean() - TRUE_KID) < 3 * values.std() / len(values) ** 0.5
    assert values.std() / len(values) ** 0.5 < TRUE_KID / 20


def test_cmmd_of_the_same_distribution_is_0_in_the_mean_and_that_with_the_diagonal_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "RESAMPLES", 10)  # only values are looked at
    found, biased = [], []
    for i in range(200):
        x, y = drawn(i, 0, 30) + 1, drawn(1000 + i, 0, 30) + 1
        found.append(metrics.cmmd(x, y).value)
        # A V-statistic is mean k over all i, j: here from the two means over i ≠ j.
        unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (x, y)]
        gap = [1 - np.exp((side @ side.T - 1) / 100).sum() / 30**2 for side in unit]
        biased.append(found[-1] + 1000 * sum(gap) / 29)
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found)) < 3 * error
    assert np.mean(biased) > 10 * error


def looped_fid(x: np.ndarray, y: np.ndarray) -> float:
    a, b = np.cov(x.T), np.cov(y.T)
    return float(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b - 2 * np.real(sqrtm(a @ b))))


@pytest.mark.parametrize(("n", "m"), [(50, 60), (8, 60), (60, 8), (7, 9)])
def test_fid_is_that_of_the_matrix_square_root(n: int, m: int) -> None:
    x, y = normal(1, n, 12), 0.7 * normal(2, m, 12) + 0.3
    rank_deficient = min(n, m) <= 12
    assert metrics.frechet_distance(x, y) == pytest.approx(
        looped_fid(x, y), rel=1e-5 if rank_deficient else 1e-10
    )


def test_fid_of_many_pictures_and_of_few_is_computed_alike() -> None:
    """Features that are always 0 change no FID, but whether there are more pictures than those."""
    x, y = normal(1, 50, 12), 0.7 * normal(2, 60, 12) + 0.3
    wide = [np.pad(side, ((0, 0), (0, 60))) for side in (x, y)]
    assert metrics._root(x).shape == (12, 12)
    assert metrics._root(wide[0]).shape == (50, 72)
    found = metrics.frechet_distance(x, y)
    assert found == pytest.approx(metrics.frechet_distance(*wide), rel=1e-12)
    assert found == pytest.approx(metrics.frechet_distance(x, wide[1][:, :12]), rel=1e-12)
    mixed = metrics.frechet_distance(np.pad(x, ((0, 0), (0, 43))), np.pad(y, ((0, 0), (0, 43))))
    assert found == pytest.approx(mixed, rel=1e-12)


def test_fid_of_gaussians_has_a_closed_form() -> None:
    """Samples made to have exactly the mean and covariance that the formula takes."""
    white = normal(1, 100, 5)
    white -= white.mean(0)
    white @= np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
    a, b = np.array([1, 2, 3, 4, 5.0]), np.array([2, 2, 1, 0.5, 3])
    found = metrics.frechet_distance(white * a, white * b + 0.3)
    assert found == pytest.approx(5 * 0.3**2 + np.sum((a - b) ** 2), rel=1e-10)
    assert metrics.frechet_distance(white, white[::-1]) == pytest.approx(0, abs=1e-10)


def test_a_collapsed_model_has_the_better_fid_of_few_pictures() -> None:
    """Why FID has no interval here: of 50 pictures it says the opposite of the truth."""
    spread = 1 / np.arange(1, 301) ** 0.5
    real = normal(1, 50, 300) * spread
    perfect = metrics.frechet_distance(real, normal(2, 50, 300) * spread)
    collapsed = metrics.frechet_distance(real, 0.7 * normal(3, 50, 300) * spread)
    assert collapsed < perfect
    assert metrics.fid_of_halves(real) > perfect


def test_halves_are_drawn_from_the_seed() -> None:
    x = normal(1, 41, 8)
    assert metrics.fid_of_halves(x, 3) == metrics.fid_of_halves(x, 3)
    assert metrics.fid_of_halves(x, 3) != metrics.fid_of_halves(x, 4)
    with pytest.raises(MetricsError, match="at least 4 real pictures, and there are 3"):
        metrics.fid_of_halves(x[:3])


def test_clip_scores_are_the_cosines_in_percent() -> None:
    images = np.array([[2.0, 0], [1, 1], [-1, 0], [3, 4]])
    texts = np.array([[5.0, 0], [1, 0], [1, 0], [3, 4]])
    expected = [100, 100 / 2**0.5, 0, 100]
    assert metrics.clip_scores(images, texts) == pytest.approx(expected, rel=1e-12)


def test_diversity_is_the_mean_distance_of_pictures_of_different_prompts() -> None:
    x = normal(1, 8, 4)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    apart = [1 - unit[i] @ unit[j] for i in range(8) for j in range(8) if i != j]
    assert metrics.diversity(x).value == pytest.approx(np.mean(apart), rel=1e-12)
    apart = [1 - unit[i] @ unit[j] for i in range(8) for j in range(8) if i // 2 != j // 2]
    groups = np.arange(8) // 2
    assert metrics.diversity(7 * x, groups).value == pytest.approx(np.mean(apart), rel=1e-12)
    found = metrics.diversity_difference(x, x[::-1] ** 3, groups)
    expected = metrics.diversity(x**3, groups).value - np.mean(apart)
    assert found.value == pytest.approx(expected, rel=1e-9)


def test_distances_within_a_prompt() -> None:
    x, groups = normal(1, 5, 4), ["a", "b", "a", "b", "a"]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = [
        np.mean([1 - unit[i] @ unit[j] for j in range(5) if j != i and groups[j] == groups[i]])
        for i in range(5)
    ]
    assert metrics.distances_within(x, groups) == pytest.approx(np.array(expected), rel=1e-12)
    with pytest.raises(MetricsError, match="each prompt needs at least 2 pictures"):
        metrics.distances_within(x, ["a", "a", "a", "a", "b"])


def test_a_copy_of_a_training_picture_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    training, generated = normal(1, 30, 16), normal(2, 5, 16)
    generated[3] = 2.5 * training[17]
    distance, index = metrics.nearest(generated, training)
    assert index[3] == 17
    assert distance[3] == pytest.approx(0, abs=1e-12)
    usual, others = metrics.nearest_other(training)
    assert (others != np.arange(30)).all()
    close = metrics.closeness(distance, usual)
    assert close[3] == 1 / 31
    assert (np.delete(close, 3) > 0.05).all()
    monkeypatch.setattr(metrics, "STRIP", 64)
    assert np.array_equal(metrics.nearest(generated, training)[1], index)
    assert metrics.nearest_other(training)[0] == pytest.approx(usual, rel=1e-12)


def test_closeness_of_pictures_that_copy_nothing_is_even() -> None:
    """Held-out pictures against held-out pictures: one in twenty is below 0.05."""
    training = normal(1, 60, 8)
    usual = metrics.nearest(normal(2, 400, 8), training)[0]
    found = metrics.closeness(metrics.nearest(normal(3, 2000, 8), training)[0], usual)
    assert 0.02 < np.mean(found <= 0.05) < 0.08
    assert np.mean(found) == pytest.approx(0.5, abs=0.05)


# ---- intervals


def width(score: Score) -> float:
    return score.upper - score.lower


def covered(scores: Sequence[Score], truth: float) -> float:
    return float(np.mean([score.lower <= truth <= score.upper for score in scores]))


def test_intervals_of_kid_cover_the_true_value(kids: list[Score]) -> None:
    """300 draws tell 95 % to within 2.5 %."""
    assert 0.92 <= covered(kids, TRUE_KID) <= 0.99
    spread = np.std([score.value for score in kids])
    mean_width = np.mean([width(score) for score in kids])
    assert mean_width == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_intervals_of_equal_sets_hold_0_and_are_not_much_wider_than_the_spread() -> None:
    scores = [metrics.kid(drawn(i, 0, 40), drawn(5000 + i, 0, 40)) for i in range(150)]
    assert covered(scores, 0) >= 0.94
    assert all(score.upper > 0 for score in scores)
    spread = np.std([score.value for score in scores])
    assert np.mean([width(score) for score in scores]) < 1.6 * 2 * 1.96 * spread


def test_intervals_of_means_cover_and_without_the_prompts_they_do_not() -> None:
    groups = np.repeat(np.arange(40), 4)
    values = [normal(i, 40)[groups] + 0.5 * normal(9999 - i, 160) for i in range(200)]
    assert 0.92 <= covered([metrics.mean_score(v, groups) for v in values], 0) <= 0.98
    assert covered([metrics.mean_score(v) for v in values], 0) < 0.8


def test_a_mean_has_students_interval() -> None:
    values = normal(1, 100)
    score = metrics.mean_score(values)
    half = 1.984 * values.std(ddof=1) / 10
    assert score.value == pytest.approx(values.mean(), rel=1e-12)
    assert score.lower == pytest.approx(score.value - half, abs=0.1 * half)
    assert score.upper == pytest.approx(score.value + half, abs=0.1 * half)


@pytest.mark.parametrize(("freedom", "quantile"), [(3, 3.182), (9, 2.262), (39, 2.0227)])
def test_students_quantile(freedom: int, quantile: float) -> None:
    assert 1.95996 * metrics._student(freedom) == pytest.approx(quantile, rel=0.01)


def test_pairs_of_the_same_prompt_and_seed_narrow_a_difference() -> None:
    real, base = drawn(1, 0, 60), drawn(1, 1, 60)
    lora = base + 0.1 * normal(3, 60, 6)
    paired = metrics.kid_difference(real, base, lora)
    alone = (width(metrics.kid(real, base)) ** 2 + width(metrics.kid(real, lora)) ** 2) ** 0.5
    assert width(paired) < alone / 2

    values = normal(4, 60)
    better = values + 0.2 + 0.1 * normal(5, 60)
    difference = metrics.paired_difference(values, better)
    assert difference.value == pytest.approx(np.mean(better - values), rel=1e-12)
    assert difference.lower > 0
    assert width(difference) < width(metrics.mean_score(values)) / 4


def test_the_interval_of_a_kid_difference_covers() -> None:
    scores = []
    for i in range(200):
        base = drawn(i, 1, 40)
        lora = 0.5 * base + 0.3 * normal(7000 + i, 40, 6)
        scores.append(metrics.kid_difference(drawn(i, 0, 40), base, lora))
    mean = 0.5 * MEANS[1]
    truth = gaussian_kid(MEANS[0], VARIANCES[0], mean, 0.25 * VARIANCES[1] + 0.09) - TRUE_KID
    values = [score.value for score in scores]
    assert np.mean(values) == pytest.approx(truth, abs=3 * np.std(values) / 200**0.5)
    assert 0.91 <= covered(scores, truth) <= 0.99


@pytest.mark.parametrize("name", ["kid", "cmmd"])
def test_the_same_picture_several_times_is_no_more_evidence(name: str) -> None:
    score = getattr(metrics, name)
    real, once = drawn(1, 0, 30), drawn(1, 1, 30)
    thrice, groups = np.repeat(once, 3, axis=0), np.repeat(np.arange(30), 3)
    expected = score(real, once)
    found = score(real, thrice, groups)
    assert found.value == pytest.approx(expected.value, rel=1e-9)
    assert found.lower == pytest.approx(expected.lower, rel=1e-6)
    assert found.upper == pytest.approx(expected.upper, rel=1e-6)
    assert score(real, thrice).value > expected.value
    assert width(score(real, thrice)) < width(expected)


def test_real_pictures_of_the_same_prompts_do_not_lower_kid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both sides show the same content per prompt, in the same way: the true KID is 0."""
    monkeypatch.setattr(metrics, "RESAMPLES", 10)
    found, naive = [], []
    for i in range(300):
        content = drawn(i, 0, 20)
        real, generated = (content + 0.3 * normal(9000 + 2 * i + k, 20, 6) for k in range(2))
        found.append(metrics.kid(real, generated, range(20), range(20)).value)
        naive.append(metrics.kid(real, generated).value)
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found)) < 3 * error
    assert np.mean(naive) < -5 * error


# ---- the same numbers, however they are computed


def test_strips_of_the_kernel_matrix_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    real, base, lora = drawn(1, 0, 50), drawn(1, 1, 40), drawn(2, 1, 40)
    groups = np.arange(40) % 13
    whole = [metrics.kid_difference(real, base, lora, groups), metrics.cmmd(real, lora)]
    monkeypatch.setattr(metrics, "STRIP", 300)
    strips = [metrics.kid_difference(real, base, lora, groups), metrics.cmmd(real, lora)]
    for a, b in zip(whole, strips, strict=True):
        for part in ("value", "lower", "upper"):
            assert getattr(a, part) == pytest.approx(getattr(b, part), rel=1e-9)


def test_many_pictures_are_pooled_for_the_interval_only(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated, values = drawn(1, 0, 300), drawn(1, 1, 200), normal(2, 300)
    every = [metrics.kid(real, generated), metrics.mean_score(values)]
    monkeypatch.setattr(metrics, "MOST_UNITS", 100)
    pooled = [metrics.kid(real, generated), metrics.mean_score(values)]
    for a, b in zip(every, pooled, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-12)
        assert width(a) == pytest.approx(width(b), rel=0.25)
        assert a != b


def test_order_does_not_matter_but_for_the_chance_in_the_interval() -> None:
    real, generated = drawn(1, 0, 50), drawn(1, 1, 40)
    order = np.random.default_rng(1).permutation(40)
    a, b = metrics.kid(real, generated), metrics.kid(real, generated[order])
    assert a.value == pytest.approx(b.value, rel=1e-12)
    assert width(a) == pytest.approx(width(b), rel=0.1)
    fids = [metrics.frechet_distance(real, side) for side in (generated, generated[order])]
    assert fids[0] == pytest.approx(fids[1], rel=1e-12)


def test_the_same_input_gives_the_same_interval() -> None:
    real, generated = drawn(1, 0, 50), drawn(1, 1, 40)
    assert metrics.kid(real, generated) == metrics.kid(real, generated)
    values = normal(1, 50)
    assert metrics.mean_score(values) == metrics.mean_score(values)


def test_half_precision_features_lose_nothing_more() -> None:
    real, generated = drawn(1, 0, 50).astype(np.float16), drawn(1, 1, 40).astype(np.float16)
    exact = [side.astype(np.float64) for side in (real, generated)]
    assert metrics.kid(real, generated) == metrics.kid(*exact)
    expected = metrics.frechet_distance(*exact)
    assert metrics.frechet_distance(real, generated) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_very_few_pictures_have_a_finite_score(count: int) -> None:
    real, generated = drawn(1, 0, count), drawn(1, 1, count)
    for score in (metrics.kid(real, generated), metrics.mean_score(generated[:, 0])):
        assert np.isfinite([score.value, score.lower, score.upper]).all()
        assert score.lower <= score.value <= score.upper


# ---- bad input


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        ((1, 4), (5, 4), "real: at least 2 pictures are needed, not 1"),
        ((5, 4), (0, 4), "generated: at least 2 pictures are needed, not 0"),
        ((5, 4), (5, 3), "real features have 4 dimensions, but generated ones 3"),
        ((5,), (5, 3), r"real features are \(n, d\), not of shape \(5,\)"),
    ],
)
@pytest.mark.parametrize("name", ["kid", "cmmd", "frechet_distance"])
def test_features_that_cannot_be_compared(
    name: str, real: tuple, generated: tuple, message: str
) -> None:
    with pytest.raises(MetricsError, match=message):
        getattr(metrics, name)(np.ones(real), np.ones(generated))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["kid", "cmmd", "frechet_distance", "nearest"])
def test_features_that_are_not_finite(name: str, bad: float) -> None:
    broken = normal(1, 5, 4)
    broken[3, 2] = bad
    with pytest.raises(MetricsError, match=r"hold NaN or infinity, first in row 3"):
        getattr(metrics, name)(normal(2, 5, 4), broken)


def test_other_bad_input() -> None:
    x, zero = normal(1, 4, 3), np.zeros((4, 3))
    with pytest.raises(MetricsError, match="row 0 have length 0"):
        metrics.cmmd(x, zero)
    with pytest.raises(MetricsError, match="pairs need equally many pictures, not 4 and 3"):
        metrics.clip_scores(x, x[:3])
    with pytest.raises(MetricsError, match="pairs need equally many pictures, not 4 and 3"):
        metrics.kid_difference(x, x, x[:3])
    with pytest.raises(MetricsError, match="pairs need equally many pictures, not 4 and 3"):
        metrics.paired_difference(x[:, 0], x[:3, 0])
    with pytest.raises(MetricsError, match="4 pictures, but groups for 3"):
        metrics.kid(x, x, ["a", "b", "c"])
    with pytest.raises(MetricsError, match="at least 2 prompts"):
        metrics.kid(x, x, ["a"] * 4)
    with pytest.raises(MetricsError, match="at least 2 pictures"):
        metrics.mean_score(x[:1, 0])
    with pytest.raises(MetricsError, match="one finite number each"):
        metrics.mean_score(np.array([1, np.nan]))
    assert issubclass(MetricsError, ValueError)


# ---- what the numbers do not say


def test_caution() -> None:
    apart, unsure = Score(0.1, 0.05, 0.15), Score(0.1, -0.01, 0.2)
    assert "mostly bias" in (metrics.caution("fid", 5000, 100) or "")
    assert "partly bias" in (metrics.caution("fid", 5000, 5000) or "")
    assert metrics.caution("fid", 50_000, 50_000) is None
    assert "rough guess" in (metrics.caution("mean", 12, 12, apart) or "")
    assert metrics.caution("kid", 100, 100, apart) is None
    assert "this KID from 0" in (metrics.caution("kid", 100, 100, unsure) or "")
    assert "whether base or LoRA" in (metrics.caution("difference", 100, 100, unsure) or "")
    assert metrics.caution("mean", 100, 100, unsure) is None
