"""Randomness by address: what a sample shows depends on its number alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest

from diffusion import schedule
from trainer.batches import (
    Draws,
    Order,
    Sampling,
    assemble,
    training_draws,
    validation_draws,
)
from trainer.dataset import Dataset, Example

SAMPLING = Sampling(
    seed=3,
    prediction_type="v_prediction",
    caption_dropout=0.5,
    shuffle_captions=True,
    keep_tokens=1,
    flip=True,
    random_crop=True,
    min_snr_gamma=5.0,
    noise_offset=0.1,
    dropout=0.25,
    rank=4,
    modules=3,
)


def example(number: int, shape: tuple[int, int] = (64, 64), **values: object) -> Example:
    return Example(
        path=f"{number}.png",
        caption="sks, one, two, three, four, five",
        prefix="sks, ",
        sha256=f"{number:064x}",
        width=64,
        height=64,
        shape=shape,
        **values,
    )


def dataset(count: int, **values: object) -> Dataset:
    examples = tuple(example(number, **values) for number in range(count))
    return Dataset(examples, tuple(range(count)))


SEVEN = dataset(7)


def draws(first: int, count: int, data: Dataset = SEVEN, **changes: object) -> Draws:
    sampling = replace(SAMPLING, **changes)
    return training_draws(data, Order(data, sampling.seed, 8), sampling, first, count)


# ---- which example


def test_every_example_is_seen_once_an_epoch_in_an_order_of_its_own() -> None:
    ten = dataset(10)
    order = Order(ten, seed=1, global_batch=4)
    rows = order.rows(0, 30)
    epochs = [tuple(rows[start : start + 10]) for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 3
    assert (order.epoch_samples, order.repeated) == (10, 0)
    assert Order(ten, seed=2, global_batch=4).rows(0, 30) != rows
    assert order.rows(12, 5) == rows[12:17]


def test_repeats_are_seen_as_often() -> None:
    ten = dataset(10)
    repeated = Dataset(ten.examples, (*range(10), 3, 3))
    assert Counter(Order(repeated, 1, 4).rows(0, 12))[3] == 3


def test_a_global_batch_is_of_one_shape_and_no_image_is_left_out() -> None:
    wide, tall = dataset(9).examples, dataset(6, shape=(32, 128)).examples
    both = Dataset((*wide, *tall), tuple(range(15)))
    order = Order(both, seed=5, global_batch=4)
    assert (order.epoch_samples, order.repeated) == (12 + 8, 5)
    for epoch in range(3):
        rows = order.rows(20 * epoch, 20)
        batches = [rows[start : start + 4] for start in range(0, 20, 4)]
        assert all(len({both.examples[row].shape for row in batch}) == 1 for batch in batches)
        seen = Counter(rows)
        assert set(seen) == set(range(15))
        assert max(seen.values()) == 2
    first, second = ([both.examples[r].shape for r in order.rows(20 * e, 20)] for e in (0, 1))
    assert first != second


# ---- what of it


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_sample_is_the_same_alone_and_in_any_share_of_a_batch(workers: int) -> None:
    whole = draws(16, 8)
    size = 8 // workers
    for worker in range(workers):
        part = draws(16 + worker * size, size)
        rows = slice(worker * size, (worker + 1) * size)
        for field in fields(Draws):
            ours, theirs = getattr(part, field.name), getattr(whole, field.name)
            theirs = theirs[:, rows] if field.name == "masks" else theirs[rows]
            np.testing.assert_array_equal(ours, theirs, field.name)


def test_samples_differ_from_each_other_and_with_the_seed() -> None:
    found = draws(0, 64)
    assert len(set(found.timesteps.tolist())) > 50
    assert abs(float(found.noise.mean())) < 0.05
    assert (draws(0, 64, seed=4).timesteps != found.timesteps).mean() > 0.9
    assert 16 < sum(found.flips) < 48
    assert len(set(found.positions)) == 64


def test_captions_are_dropped_and_shuffled_behind_what_is_kept() -> None:
    captions = Counter(draws(0, 400).captions)
    assert 160 < captions.pop("") < 240
    assert len(captions) > 10
    for caption in captions:
        assert caption.startswith("sks, one, ")
        assert sorted(caption.split(", ")) == sorted(["sks", "one", "two", "three", "four", "five"])
    plain = draws(0, 8, caption_dropout=0.0, shuffle_captions=False).captions
    assert set(plain) == {"sks, one, two, three, four, five"}


def test_dropout_masks_keep_the_mean() -> None:
    masks = draws(0, 400).masks
    assert masks.shape == (3, 400, 4)
    np.testing.assert_allclose(np.unique(masks), [0, 4 / 3], rtol=1e-6)
    assert abs(float(masks.mean()) - 1) < 0.05


def test_a_set_counts_in_the_loss_what_its_weight_says() -> None:
    light = draws(0, 8, dataset(7, loss_weight=0.25))
    np.testing.assert_allclose(light.weights, 0.25 * draws(0, 8).weights)


def test_noise_offset_moves_whole_channels_and_nothing_else() -> None:
    moved, still = (draws(0, 64, noise_offset=strength) for strength in (0.5, 0.0))
    difference = moved.noise - still.noise
    np.testing.assert_allclose(
        difference, np.broadcast_to(difference[:, :, :1, :1], difference.shape), atol=1e-6
    )
    assert difference[:, :, 0, 0].std() == pytest.approx(0.5, rel=0.2)
    np.testing.assert_array_equal(moved.timesteps, still.timesteps)


def test_validation_samples_cover_the_schedule_in_quarters() -> None:
    found = validation_draws(SEVEN, SAMPLING, range(28))
    assert (found.timesteps // 250 == np.tile([0, 1, 2, 3], 7)).all()
    assert [e.path for e in found.examples[::4]] == [f"{n}.png" for n in range(7)]
    assert not found.spread.any()
    alone = validation_draws(SEVEN, replace(SAMPLING, seed=9), [13])
    np.testing.assert_array_equal(alone.noise[0], found.noise[13])


# ---- the batch


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_batch_is_noise_on_a_draw_from_the_latents(prediction_type: str) -> None:
    sampling = replace(SAMPLING, prediction_type=prediction_type, scaling_factor=0.5)
    found = draws(0, 4, prediction_type=prediction_type)
    draw = np.random.default_rng(0)
    mean, logvar = draw.standard_normal((2, 4, 4, 8, 8), np.float32)
    picture_weights = draw.random((4, 8, 8), np.float32)
    text = draw.standard_normal((4, 77, 6), np.float32)
    moments = np.concatenate((mean, logvar), 1)
    batch = assemble(found, moments, picture_weights, text, sampling)

    latents = 0.5 * (mean + np.exp(logvar / 2) * found.spread)
    alphas = schedule.ALPHAS_CUMPROD[found.timesteps][:, None, None, None]
    noisy = np.sqrt(alphas) * latents + np.sqrt(1 - alphas) * found.noise
    np.testing.assert_allclose(batch.noisy, noisy, rtol=1e-5, atol=1e-6)
    velocity = np.sqrt(alphas) * found.noise - np.sqrt(1 - alphas) * latents
    expected = found.noise if prediction_type == "epsilon" else velocity
    np.testing.assert_allclose(batch.target, expected, rtol=1e-5, atol=1e-6)
    assert batch.weights.shape == batch.target.shape
    weights = found.weights[:, None, None] * picture_weights
    for channel in range(4):
        np.testing.assert_allclose(batch.weights[:, channel], weights)
    for array in (batch.noisy, batch.target, batch.weights):
        assert array.dtype == np.float32


# ---- the noise schedule


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
