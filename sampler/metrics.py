"""What pictures score, as functions of feature arrays; which network made them is not asked here.

Features are (n, d), a row per picture, of any float type; sums are in float64. Scores come with a
95 % interval, from one decomposition for all of them: a score is its value plus an effect of each
picture (or prompt) plus, where pairs of pictures are compared, an interaction of each two
(Hoeffding, 1948). Resampling weights these, so kernels are computed once, and a picture drawn
twice is never compared with itself, which would bias KID and CMMD upwards.

Pictures of one prompt depend on each other. `groups` names the prompt of each picture: prompts
are then resampled, not pictures, and pairs within a prompt are left out of KID, CMMD and
`diversity`, which compare independent pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.randomness import generator

CONFIDENCE = 0.95
RESAMPLES = 2000
MOST_UNITS = 2000
"""Units that are resampled; more pictures (or prompts) than that are pooled to so many."""
STRIP = 8 * 2**20
"""Entries of a kernel matrix in memory at a time: 64 MB."""

Array = NDArray[Any]
Labels = Sequence[Hashable] | Array
Kernel = Callable[[Array], Array]
"""A kernel as a function of the inner products of two pictures' features, elementwise."""


class MetricsError(ValueError):
    """Features that have no score; the message is one sentence."""


@dataclass(frozen=True)
class Score:
    """A value and its 95 % interval."""

    value: float
    lower: float
    upper: float


# ---- distances between two sets of pictures


def kid(
    real: Array,
    generated: Array,
    groups: Labels | None = None,
    real_groups: Labels | None = None,
) -> Score:
    """Kernel inception distance: Bińkowski et al. (2018), arXiv 1801.01401.

    The unbiased MMD² over all pairs, kernel (x·y/d + 1)³; so it is below 0 now and then if the
    two sets are alike. It is the plain number: tables usually show it times 1000.

    real (n, d), generated (m, d). `groups` (m) is the prompt of each generated picture,
    `real_groups` (n) that of each real one, if it shows the same as the pictures generated for
    its caption: a pair of the same prompt would make the two sets look closer than they are.
    Raises MetricsError for fewer than two pictures or prompts on a side, unequal d, NaN, infinity.
    """
    sides = _sides(real=real, generated=generated)
    return _pair_score(_rooted(sides), [real_groups, groups], _MMD, _cubic)


def kid_difference(
    real: Array,
    base: Array,
    lora: Array,
    groups: Labels | None = None,
    real_groups: Labels | None = None,
) -> Score:
    """KID of `lora` minus KID of `base`: below 0 if the LoRA comes closer to the real pictures.

    base and lora (m, d): row i of both has the same prompt and seed, so they are resampled
    together, against the same real pictures. Otherwise as `kid`.
    """
    sides = _sides(real=real, base=base, lora=lora)
    groups = _paired(base, lora, groups)
    return _pair_score(_rooted(sides), [real_groups, groups, groups], _MMD_DIFFERENCE, _cubic)


def cmmd(
    real: Array,
    generated: Array,
    groups: Labels | None = None,
    real_groups: Labels | None = None,
    sigma: float = 10.0,
    scale: float = 1000.0,
) -> Score:
    """CLIP maximum mean discrepancy: Jayasumana et al. (2024), arXiv 2401.09603.

    MMD² of L2-normalised CLIP embeddings, kernel exp(−‖x − y‖² / 2σ²), times `scale`. This is
    the unbiased statistic. The authors' code also counts the pairs of a picture with itself, which
    adds about 20 (1 − mean cosine) / n, 0.27 for 30 pictures of mean cosine 0.6. Arguments and
    errors as in `kid`; an embedding of length 0 is one too.
    """
    sides = _normalised(_sides(real=real, generated=generated))
    return _pair_score(sides, [real_groups, groups], _MMD, _gaussian(sigma), scale)


def cmmd_difference(
    real: Array,
    base: Array,
    lora: Array,
    groups: Labels | None = None,
    real_groups: Labels | None = None,
    sigma: float = 10.0,
    scale: float = 1000.0,
) -> Score:
    """CMMD of `lora` minus CMMD of `base`, paired as in `kid_difference`."""
    sides = _normalised(_sides(real=real, base=base, lora=lora))
    groups = _paired(base, lora, groups)
    labels = [real_groups, groups, groups]
    return _pair_score(sides, labels, _MMD_DIFFERENCE, _gaussian(sigma), scale)


def frechet_distance(real: Array, generated: Array) -> float:
    """FID, Heusel et al. (2017), arXiv 1706.08500: ‖μ₁ − μ₂‖² + Tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½).

    real (n, d), generated (m, d), covariances with n − 1. If Σ₁ = AᵀA and Σ₂ = BᵀB, the last
    trace is the sum of the singular values of ABᵀ. A is the centred features if they are at most
    d, and otherwise a root of their covariance; both are exact, without complex numbers.

    There is no interval: the bias is many times the spread and depends on the model (Chong and
    Forsyth, 2019, arXiv 1911.07023). With 100 pictures a perfect model scores 87 ± 1 and a
    collapsed one, whose FID is 9, scores 70 ± 1 (Gaussians, d = 2048). `fid_of_halves` shows how
    much is bias. Raises as `kid`.
    """
    x, y = _sides(real=real, generated=generated)
    a, b = _root(x), _root(y)
    shift = x.mean(axis=0, dtype=np.float64) - y.mean(axis=0, dtype=np.float64)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(shift @ shift + np.vdot(a, a) + np.vdot(b, b) - 2 * cross)


def fid_of_halves(real: Array, seed: int = 0) -> float:
    """FID between two random halves of the real pictures (n, d): what a perfect model would score.

    Its bias is that of n / 2 pictures a side. Raises MetricsError for fewer than four pictures.
    """
    (x,) = _sides(real=real)
    if len(x) < 4:
        raise MetricsError(f"two halves need at least 4 real pictures, and there are {len(x)}")
    order = generator(seed, "halves").permutation(len(x))
    half = len(x) // 2
    return frechet_distance(x[order[:half]], x[order[half : 2 * half]])


# ---- scores of single pictures


def clip_scores(image_embeddings: Array, text_embeddings: Array) -> Array:
    """CLIP score of each picture and its prompt, (n, d) and (n, d) → (n,), from 0 to 100.

    100 · max(cos, 0), as torchmetrics has it; the 2.5 · max(cos, 0) of Hessel et al. (2021),
    arXiv 2104.08718, is this over 40. Raises MetricsError if the two do not pair or hold NaN,
    infinity or a vector of length 0.
    """
    images, texts = _normalised(_sides(1, image=image_embeddings, text=text_embeddings))
    _paired(images, texts, None)
    cosines: Array = np.einsum("nd,nd->n", images, texts)
    return 100 * np.clip(cosines, 0, 1)


def mean_score(values: Array, groups: Labels | None = None) -> Score:
    """The mean of per-picture scores (n,), whose prompts are `groups` (n).

    Raises MetricsError for fewer than two pictures or prompts, NaN or infinity.
    """
    values = _values(values)
    (units,) = _units([len(values)], [groups])
    units = units % MOST_UNITS
    effects = np.bincount(units, values - values.mean()) / len(values)
    return _resampled(float(values.mean()), effects, [np.arange(len(effects))])


def paired_difference(base: Array, lora: Array, groups: Labels | None = None) -> Score:
    """The mean of lora − base, per-picture scores (n,) of the same prompts and seeds.

    Raises as `mean_score`, and if the lengths differ.
    """
    _paired(base, lora, groups)
    return mean_score(_values(lora) - _values(base), groups)


# ---- variety, and copies of training pictures


def diversity(features: Array, groups: Labels | None = None) -> Score:
    """Mean cosine distance 1 − cos between pictures (n, d) of different prompts, from 0 to 2.

    Cosine, as CLIP and DINO are trained with it, and as it does not grow with the length of the
    features, so that sets of pictures can be compared: the same of real pictures is the
    reference. Raises as `kid`, and for a feature of length 0.
    """
    return _pair_score(_normalised(_sides(generated=features)), [groups], {(0, 0): 1}, _cosine)


def diversity_difference(base: Array, lora: Array, groups: Labels | None = None) -> Score:
    """Diversity of `lora` minus that of `base`, of the same prompts and seeds."""
    sides = _normalised(_sides(base=base, lora=lora))
    groups = _paired(base, lora, groups)
    return _pair_score(sides, [groups, groups], {(1, 1): 1, (0, 0): -1}, _cosine)


def distances_within(features: Array, groups: Labels) -> Array:
    """Mean cosine distance of each picture (n, d) to the others of its prompt, (n,).

    Small if a prompt gives the same picture whatever the seed. For `mean_score` and
    `paired_difference`. Raises MetricsError for a prompt with one picture only.
    """
    (x,) = _normalised(_sides(generated=features))
    (units,) = _units([len(x)], [groups])
    sums, counts = np.zeros((units.max() + 1, x.shape[1])), np.bincount(units)
    if counts.min() < 2:
        raise MetricsError("each prompt needs at least 2 pictures, and there is one with 1")
    np.add.at(sums, units, x)
    others = sums[units] - x
    cosines: Array = np.einsum("nd,nd->n", x, others) / (counts[units] - 1)
    return 1 - cosines


def nearest(generated: Array, training: Array) -> tuple[Array, Array]:
    """Cosine distance (n,) to, and row (n,) of, the training picture nearest to each generated one.

    generated (n, d), training (m, d). A distance near 0 is a copy. What is normal say `nearest` of
    held-out real pictures, or `nearest_other` of the training pictures; `closeness` compares.
    Raises as `diversity`, but one generated picture is enough.
    """
    x, y = _normalised(_sides(1, generated=generated, training=training))
    return _nearest(x, y, np.full(len(x), -1))


def nearest_other(training: Array) -> tuple[Array, Array]:
    """As `nearest`, of each training picture (n, d) to the others."""
    (x,) = _normalised(_sides(training=training))
    return _nearest(x, x, np.arange(len(x)))


def closeness(distance: Array, normal: Array) -> Array:
    """The share of `normal` distances (m,) that are at most as large as each distance (n,).

    (1 + count) / (1 + m): the p-value of "not nearer to the training set than another real
    picture is". Among pictures that copy nothing, one in twenty falls below 0.05.
    """
    normal = np.sort(_values(normal))
    count = np.searchsorted(normal, _values(distance), side="right")
    return (1 + count) / (1 + len(normal))


# ---- what the numbers do not say


def caution(metric: str, n_real: int, n_generated: int, score: Score | None = None) -> str | None:
    """Why a score of so few pictures says little, in one sentence; None if it says something.

    `metric`: "fid", "kid", "cmmd", or "difference" for any difference between base and LoRA;
    other names are of scores that 0 does not matter to. Count prompts if several pictures share
    one; give `n_generated` twice where no real pictures take part.
    """
    n = min(n_real, n_generated)
    if metric == "fid":
        if n < 10_000:
            part = "mostly" if n < 2048 else "partly"
            return (
                f"FID of {n} pictures is {part} bias: compare it with FID of the same numbers of "
                "pictures only, and judge by KID"
            )
        return None
    if n < 20:
        return f"an interval from {n} pictures is only a rough guess: draw 20 or more"
    if score is not None and score.lower <= 0 <= score.upper:
        if metric == "difference":
            return f"{n} pictures do not tell whether base or LoRA is better"
        if metric in ("kid", "cmmd"):
            return f"{n} pictures do not tell this {metric.upper()} from 0"
    return None


# ---- means over pairs, and their intervals

Terms = Mapping[tuple[int, int], float]
"""A score as a sum: what the mean kernel between two sets counts."""

_MMD: Terms = {(0, 0): 1, (1, 1): 1, (0, 1): -2}
_MMD_DIFFERENCE: Terms = {(2, 2): 1, (0, 2): -2, (1, 1): -1, (0, 1): 2}


def _cubic(product: Array) -> Array:
    moved = product + 1
    cube: Array = moved * moved * moved  # ** 3 takes five times as long
    return cube


def _gaussian(sigma: float) -> Kernel:
    """Less 1, which drops out of MMD: the kernel of unit vectors is 1 to within 4 / 2σ²."""
    return lambda product: np.expm1((product - 1) / sigma**2)


def _cosine(product: Array) -> Array:
    return 1 - product


def _pair_score(
    sides: Sequence[Array],
    labels: Sequence[Labels | None],
    terms: Terms,
    kernel: Kernel,
    scale: float = 1.0,
) -> Score:
    """Σ c_st · mean k(x, y) over x of side s and y of side t that share no label: a U-statistic."""
    units = _units([len(side) for side in sides], labels)
    size = min(MOST_UNITS, 1 + max(int(own.max()) for own in units))
    counts = [np.bincount(own % size, minlength=size) for own in units]
    value, pairs = 0.0, np.zeros((size, size))
    for (s, t), coefficient in terms.items():
        sums = _unit_sums(sides[s], sides[t], units[s], units[t], size, kernel)
        number = _pairs_apart(units[s], units[t])
        mean = float(sums.sum()) / number
        value += scale * coefficient * mean
        term = sums - mean * np.outer(counts[s], counts[t])
        pairs += scale * coefficient / (2 * number) * (term + term.T)
    np.fill_diagonal(pairs, 0)
    present = np.array(counts) > 0
    kinds = [
        np.flatnonzero((present == kind[:, None]).all(axis=0))
        for kind in np.unique(present, axis=1).T
    ]
    effects, interactions = _decomposed(pairs, kinds)
    smallest = int(present.sum(axis=1).min())
    return _resampled(value, effects, kinds, interactions, smallest)


def _unit_sums(
    x: Array, y: Array, x_units: Array, y_units: Array, size: int, kernel: Kernel
) -> Array:
    """Kernel sums between units modulo `size`, (size, size), without pairs of the same unit.

    A strip of the kernel matrix is in memory at a time; that of a side with itself is symmetric,
    and half of it is made.
    """
    alone = x_units is y_units
    rows, columns = (np.argsort(own % size, kind="stable") for own in (x_units, y_units))
    x_units, y_units, y = x_units[rows], y_units[columns], y[columns]
    sums: Array = np.zeros((size, size))
    for strip in _strips(len(x), len(y)):
        first = strip.start if alone else 0
        own, others = x_units[strip], y_units[first:]
        k = kernel(x[rows[strip]] @ y[first:].T)
        k *= own[:, None] != others
        if alone:
            k[:, : len(own)] /= 2
        of_columns, starts = np.unique(others % size, return_index=True)
        k = np.add.reduceat(k, starts, axis=1)
        of_rows, starts = np.unique(own % size, return_index=True)
        sums[np.ix_(of_rows, of_columns)] += np.add.reduceat(k, starts, axis=0)
    return sums + sums.T if alone else sums


def _pairs_apart(x_units: Array, y_units: Array) -> int:
    """How many pairs are of different units."""
    most = 1 + max(int(x_units.max()), int(y_units.max()))
    together = np.bincount(x_units, minlength=most) @ np.bincount(y_units, minlength=most)
    return len(x_units) * len(y_units) - int(together)


def _strips(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, STRIP // columns)
    return (slice(first, first + step) for first in range(0, rows, step))


def _decomposed(pairs: Array, kinds: Sequence[Array]) -> tuple[Array, Array]:
    """The effect of each unit (g,) and the interaction of each two (g, g) on Σ pairs, centred.

    `kinds` are the units that are alike: only real pictures, only generated ones, both. Within
    two kinds this is a two-way analysis of variance. An effect is also made of the noise of its
    interactions, which counts them twice (Efron and Stein, 1981) and would make intervals near
    KID 0 wider by 40 %; so effects are shrunk by that part.
    """
    effects, interactions = np.zeros(len(pairs)), np.zeros_like(pairs)
    noise = 0.0
    for u, own in enumerate(kinds):
        for v, other in enumerate(kinds):
            block, n, m = pairs[np.ix_(own, other)], len(own), len(other)
            if u == v:
                apart = ~np.eye(n, dtype=bool)
                block = (block - block.sum() / max(n * (n - 1), 1)) * apart
                row = block.sum(axis=1) / max(n - 2, 1)
                rest = (block - row[:, None] - row) * apart
                effects[own] += 2 * (n - 1) * row
                noise += 2 * (n - 1) / max(n - 3, 1) * float(np.vdot(rest, rest))
            else:
                block = block - block.mean()
                row = block.mean(axis=1)
                rest = block - row[:, None] - block.mean(axis=0)
                effects[own] += 2 * m * row
                freedom = max((n - 1) * (m - 1), 1)
                noise += 2 * n * m / freedom * float(np.vdot(rest, rest))
            interactions[np.ix_(own, other)] = rest
    variance = 0.0
    for own in kinds:
        effects[own] -= effects[own].mean()
        variance += len(own) / max(len(own) - 1, 1) * float(np.vdot(effects[own], effects[own]))
    if variance > 0:
        effects *= max(0.0, 1 - 2 * noise / variance) ** 0.5
    return effects, interactions


_NORMAL = NormalDist()
_Z = _NORMAL.inv_cdf((1 + CONFIDENCE) / 2)


def _resampled(
    value: float,
    effects: Array,
    kinds: Sequence[Array],
    interactions: Array | None = None,
    smallest: int | None = None,
) -> Score:
    """The BCa interval (Efron, 1987) of value + Σ (w − 1) effect + Σ Σ (w − 1)(w' − 1) interaction.

    w says how often a unit is drawn, with replacement, from its kind. The ends are moved out as
    Student's quantile is beyond the normal one, for the `smallest` number of units on a side.
    """
    weights = _weights([len(own) for own in kinds])[:, np.argsort(np.concatenate(kinds))]
    shift, variance = weights @ effects, float(effects @ effects)
    if interactions is not None:
        shift += np.einsum("rg,rg->r", weights @ interactions, weights)
        variance += 2 * float(np.vdot(interactions, interactions))
    if variance == 0:
        return Score(value, value, value)
    skewness = float(np.sum(effects**3)) / variance**1.5
    below = (np.mean(shift < 0) + np.mean(shift <= 0)) / 2
    bias = _NORMAL.inv_cdf(min(max(float(below), 1 / RESAMPLES), 1 - 1 / RESAMPLES))
    n = smallest or len(effects)
    wider = _student(n - 1) * (n / (n - 1)) ** 0.5
    lower, upper = (
        value + wider * float(np.quantile(shift, _accelerated(z, bias, skewness / 6)))
        for z in (-_Z, _Z)
    )
    return Score(value, min(lower, value), max(upper, value))


def _weights(sizes: Sequence[int]) -> Array:
    """How often each unit of kinds of these sizes is drawn, less 1: (resamples, Σ sizes)."""
    random, found = generator(0, "resampling"), []
    for size in sizes:
        drawn = random.integers(size, size=(RESAMPLES, size)) + size * np.arange(RESAMPLES)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=RESAMPLES * size)
        found.append(counts.reshape(RESAMPLES, size) - 1.0)
    return np.concatenate(found, axis=1)


def _accelerated(z: float, bias: float, acceleration: float) -> float:
    """Which percentile of the resamples stands for the normal quantile z."""
    moved = bias + z
    return _NORMAL.cdf(bias + moved / max(1 - acceleration * moved, 0.1))


def _student(freedom: int) -> float:
    """Student's quantile over the normal one: Abramowitz and Stegun, 26.7.5, to 1 % from 3 on."""
    return (
        1
        + (_Z**2 + 1) / (4 * freedom)
        + (5 * _Z**4 + 16 * _Z**2 + 3) / (96 * freedom**2)
        + (3 * _Z**6 + 19 * _Z**4 + 17 * _Z**2 - 15) / (384 * freedom**3)
    )


def _units(sizes: Sequence[int], labels: Sequence[Labels | None]) -> list[Array]:
    """Numbers 0, 1, … of what is resampled; equal labels have equal ones, None is all different."""
    numbers: dict[Hashable, int] = {}
    found, free = [], 0
    for size, own in zip(sizes, labels):
        if own is None:
            found.append(np.arange(free, free + size))
            free += size
        else:
            if len(own) != size:
                raise MetricsError(f"there are {size} pictures, but groups for {len(own)}")
            rows = own.tolist() if isinstance(own, np.ndarray) else own
            for label in dict.fromkeys(rows):
                if label not in numbers:
                    numbers[label], free = free, free + 1
            found.append(np.array([numbers[label] for label in rows]))
        if len(np.unique(found[-1])) < 2:
            what = "picture" if own is None else "prompt"
            raise MetricsError(f"a score needs at least 2 {what}s on each side, and there is 1")
    return found


# ---- Fréchet distance


def _root(x: Array) -> Array:
    """R (k, d), k ≤ d, with RᵀR the covariance of x (n, d)."""
    n, d = x.shape
    mean = x.mean(axis=0, dtype=np.float64)
    root: Array
    if n <= d:
        root = (x - mean) / (n - 1) ** 0.5
        return root
    covariance: Array = np.zeros((d, d))
    for strip in _strips(n, d):
        rows = x[strip] - mean
        covariance += rows.T @ rows / (n - 1)
    eigenvalues, vectors = np.linalg.eigh(covariance)
    root = np.sqrt(np.maximum(eigenvalues, 0))[:, None] * vectors.T
    return root


# ---- nearest pictures


def _nearest(x: Array, y: Array, itself: Array) -> tuple[Array, Array]:
    """Row i of x is not compared with row itself[i] of y."""
    distance, index = np.empty(len(x)), np.empty(len(x), np.int64)
    for strip in _strips(len(x), len(y)):
        product = x[strip] @ y.T
        product[itself[strip, None] == np.arange(len(y))] = -np.inf
        index[strip] = product.argmax(axis=1)
        distance[strip] = 1 - product.max(axis=1)
    return np.maximum(distance, 0), index


# ---- what comes in


def _sides(fewest: int = 2, **features: Array) -> list[Array]:
    """The features as arrays; raises MetricsError if they are not fit to be compared."""
    sides = {name: np.asarray(side) for name, side in features.items()}
    first = next(iter(sides))
    for name, side in sides.items():
        if side.ndim != 2:
            raise MetricsError(f"{name} features are (n, d), not of shape {side.shape}")
        if len(side) < fewest:
            raise MetricsError(f"{name}: at least {fewest} pictures are needed, not {len(side)}")
        if side.shape[1] != sides[first].shape[1]:
            raise MetricsError(
                f"{first} features have {sides[first].shape[1]} dimensions, "
                f"but {name} ones {side.shape[1]}"
            )
        finite = np.isfinite(side).all(axis=1)
        if not finite.all():
            raise MetricsError(
                f"{name} features hold NaN or infinity, first in row {finite.argmin()}"
            )
    return list(sides.values())


def _rooted(sides: Sequence[Array]) -> list[Array]:
    """Over √d, so that an inner product is x·y/d."""
    return [side.astype(np.float64) / side.shape[1] ** 0.5 for side in sides]


def _normalised(sides: Sequence[Array]) -> list[Array]:
    found = []
    for side in sides:
        side = side.astype(np.float64)
        length = np.linalg.norm(side, axis=1, keepdims=True)
        if not length.all():
            raise MetricsError(f"the features in row {length.argmin()} have length 0: no direction")
        found.append(side / length)
    return found


def _values(values: Array) -> Array:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise MetricsError("scores of pictures are one finite number each")
    return values


def _paired(a: Array, b: Array, groups: Labels | None) -> Labels:
    """The prompts of two sets of pictures that pair; each pair is its own unless told otherwise."""
    if len(a) != len(b):
        raise MetricsError(f"pairs need equally many pictures, not {len(a)} and {len(b)}")
    return np.arange(len(a)) if groups is None else groups
