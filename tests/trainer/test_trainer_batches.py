"""Randomness by address: what a sample shows depends on its number alone."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion import schedule
from trainer.batches import Batch, Sampling, sample_order, training_batch, validation_batch
from trainer.data import EncodedData

SAMPLING = Sampling(
    seed=3,
    prediction_type="v_prediction",
    caption_dropout=0.5,
    min_snr_gamma=5.0,
    dropout=0.25,
    rank=4,
    modules=3,
)


@pytest.fixture(scope="module")
def data() -> EncodedData:
    draw = np.random.default_rng(0)
    shape = (7, 4, 8, 8)
    return EncodedData(
        mean=draw.standard_normal(shape, np.float32),
        std=draw.random(shape, np.float32),
        text=draw.standard_normal((4, 77, 6), np.float32),
        caption=np.array([0, 1, 2, 0, 1, 2, 0]),
    )


def rows(batch: Batch, index: int) -> list[np.ndarray]:
    arrays = [batch.noisy, batch.timesteps, batch.text, batch.target, batch.weights]
    return [array[index] for array in arrays] + [batch.masks[:, index]]


def test_every_example_is_seen_once_an_epoch_in_an_order_of_its_own() -> None:
    order = sample_order(seed=1, examples=10, first=0, count=30)
    epochs = [tuple(order[start : start + 10]) for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 3
    assert sample_order(seed=2, examples=10, first=0, count=30) != order


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_sample_is_the_same_alone_and_in_any_share_of_a_batch(
    data: EncodedData, workers: int
) -> None:
    whole = training_batch(data, SAMPLING, first=16, count=8)
    size = 8 // workers
    for worker in range(workers):
        part = training_batch(data, SAMPLING, first=16 + worker * size, count=size)
        for index in range(size):
            for ours, theirs in zip(
                rows(part, index), rows(whole, worker * size + index), strict=True
            ):
                np.testing.assert_array_equal(ours, theirs)


def test_samples_differ_from_each_other_and_with_the_seed(data: EncodedData) -> None:
    batch = training_batch(data, SAMPLING, 0, 64)
    assert len(set(batch.timesteps.tolist())) > 50
    assert abs(float(batch.target.mean())) < 0.05
    other = training_batch(data, Sampling(**{**vars(SAMPLING), "seed": 4}), 0, 64)
    assert (other.timesteps != batch.timesteps).mean() > 0.9


def test_dropped_captions_are_the_empty_one(data: EncodedData) -> None:
    batch = training_batch(data, SAMPLING, 0, 400)
    dropped = (batch.text == data.text[-1]).all(axis=(1, 2)).mean()
    assert 0.4 < dropped < 0.6


def test_dropout_masks_keep_the_mean(data: EncodedData) -> None:
    masks = training_batch(data, SAMPLING, 0, 400).masks
    assert masks.shape == (3, 400, 4)
    np.testing.assert_allclose(np.unique(masks), [0, 4 / 3], rtol=1e-6)
    assert abs(float(masks.mean()) - 1) < 0.05


def test_validation_samples_cover_the_schedule_in_quarters(data: EncodedData) -> None:
    batch = validation_batch(data, "epsilon", range(28))
    assert (batch.timesteps // 250 == np.tile([0, 1, 2, 3], 7)).all()
    alone = validation_batch(data, "epsilon", [13])
    np.testing.assert_array_equal(alone.noisy[0], batch.noisy[13])
    np.testing.assert_array_equal(alone.target[0], batch.target[13])


def test_published_values_of_the_noise_schedule() -> None:
    alphas, sigmas = schedule.ALPHAS_CUMPROD, schedule.SIGMAS
    published = [0.99915, 0.9982960278, 0.2776696505, 0.004660098513]
    np.testing.assert_allclose(alphas[[0, 1, 499, 999]], published, rtol=1e-9)
    np.testing.assert_allclose(sigmas[[0, 999]], [0.0291671582, 14.6146412293], rtol=1e-8)
    snr = sigmas**-2.0
    np.testing.assert_allclose(snr[[0, 999]], [1175.47, 0.0046819], rtol=1e-4)
    assert (np.argmax(snr < 5), np.argmax(snr < 1)) == (147, 354)


@pytest.mark.parametrize(("prediction_type", "mean"), [("epsilon", 0.917), ("v_prediction", 0.294)])
def test_min_snr_weights(prediction_type: str, mean: float) -> None:
    weights = schedule.min_snr_weights(np.arange(1000), 5.0, prediction_type)
    assert float(weights.mean()) == pytest.approx(mean, abs=5e-4)
    assert weights[0] == pytest.approx(5 / (1175.47 + (prediction_type != "epsilon")), rel=1e-4)
    assert (schedule.min_snr_weights(np.arange(9), None, prediction_type) == 1).all()


def test_noise_offset_moves_whole_channels_and_nothing_else(data: EncodedData) -> None:
    offset = Sampling(**{**vars(SAMPLING), "prediction_type": "epsilon", "noise_offset": 0.5})
    plain = Sampling(**{**vars(SAMPLING), "prediction_type": "epsilon"})
    moved, still = (training_batch(data, sampling, 0, 64) for sampling in (offset, plain))
    difference = moved.target - still.target
    np.testing.assert_allclose(
        difference, np.broadcast_to(difference[:, :, :1, :1], difference.shape), atol=1e-6
    )
    assert difference[:, :, 0, 0].std() == pytest.approx(0.5, rel=0.2)
    np.testing.assert_array_equal(moved.timesteps, still.timesteps)
    half = training_batch(data, offset, 32, 32)
    np.testing.assert_array_equal(half.noisy, moved.noisy[32:])
