"""KID and FID beside torchmetrics, CMMD beside the formula of its authors: `make parity`."""

from __future__ import annotations

import numpy as np
import pytest

from sampler import metrics

pytestmark = pytest.mark.parity


def features(seed: int, count: int, dimensions: int, moved: float = 0.0) -> np.ndarray:
    """As those of Inception: at least 0, correlated, some dimensions much larger than others."""
    random = np.random.default_rng(seed)
    mixed = np.random.default_rng(0).standard_normal((32, dimensions)) / 32**0.5
    hidden = random.standard_normal((count, 32)) + moved
    noise = 0.3 * random.standard_normal((count, dimensions))
    return np.maximum(hidden @ mixed + noise, 0) / np.arange(1, dimensions + 1) ** 0.25


def identity(dimensions: int):
    """A network that takes features for pictures; torchmetrics asks it for their number."""
    import torch

    class Identity(torch.nn.Module):
        num_features = dimensions

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return pictures

    return Identity()


def scored(metric, real: np.ndarray, generated: np.ndarray):
    """What a metric of torchmetrics computes, in float64."""
    import torch

    metric.set_dtype(torch.float64)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(generated), real=False)
    return metric.compute()


@pytest.mark.parametrize("dimensions", [64, 2048])
def test_kid_is_that_of_torchmetrics_on_one_subset_of_all(dimensions: int) -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    real, generated = features(1, 90, dimensions), features(2, 90, dimensions, 0.2)
    metric = KernelInceptionDistance(identity(dimensions), subsets=1, subset_size=90)
    expected, _ = scored(metric, real, generated)
    found = metrics.kid(real, generated)
    assert found.value == pytest.approx(float(expected), rel=1e-10)
    assert found.lower < found.value < found.upper


def test_kid_subsets_of_torchmetrics_scatter_around_the_value_of_all_pairs() -> None:
    """Their mean is the same statistic; their spread is not its error, so there is an interval."""
    import torch
    from torchmetrics.image.kid import KernelInceptionDistance

    real, generated = features(1, 90, 64), features(2, 90, 64, 0.2)
    torch.manual_seed(0)
    metric = KernelInceptionDistance(identity(64), subsets=400, subset_size=45)
    mean, spread = (float(x) for x in scored(metric, real, generated))
    assert mean == pytest.approx(metrics.kid(real, generated).value, abs=4 * spread / 400**0.5)


# torchmetrics takes square roots of the eigenvalues of Σ₁Σ₂, which is not symmetric: where they
# should be 0, for fewer pictures than dimensions, each is √ of a rounding error.
@pytest.mark.parametrize(
    ("count", "dimensions", "within"), [(400, 64, 1e-9), (2000, 256, 1e-9), (100, 512, 1e-5)]
)
def test_fid_is_that_of_torchmetrics(count: int, dimensions: int, within: float) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, generated = features(1, count, dimensions), features(2, count + 10, dimensions, 0.2)
    metric = FrechetInceptionDistance(identity(dimensions))
    expected = float(scored(metric, real, generated))
    assert metrics.frechet_distance(real, generated) == pytest.approx(expected, rel=within)


def authors_cmmd(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """The three means of google-research/cmmd, distance.py: with the pairs (i, i), k(x, x) = 1."""
    gamma = 1 / (2 * 10**2)
    x_square, y_square = (np.diag(side @ side.T) for side in (x, y))
    return (
        np.mean(np.exp(-gamma * (-2 * x @ x.T + x_square[:, None] + x_square[None]))),
        np.mean(np.exp(-gamma * (-2 * x @ y.T + x_square[:, None] + y_square[None]))),
        np.mean(np.exp(-gamma * (-2 * y @ y.T + y_square[:, None] + y_square[None]))),
    )


@pytest.mark.parametrize(("n", "m"), [(30, 30), (80, 120)])
def test_cmmd_is_that_of_its_authors_without_the_pairs_of_a_picture_with_itself(
    n: int, m: int
) -> None:
    real, generated = features(1, n, 768), features(2, m, 768, 0.2)
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (real, generated)]
    xx, xy, yy = authors_cmmd(*unit)
    biased = 1000 * (xx + yy - 2 * xy)
    xx, yy = (n * xx - 1) / (n - 1), (m * yy - 1) / (m - 1)
    found = metrics.cmmd(real, generated).value
    # Their kernel is within 0.02 of 1, so of its 16 digits some are lost in the differences.
    assert found == pytest.approx(1000 * (xx + yy - 2 * xy), abs=1e-10)
    assert biased > 2 * found
