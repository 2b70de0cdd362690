"""Drawing with networks that exist already, in training or not; the networks here are formulas."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from diffusion.config import load_model_config
from diffusion.models import compile_graphs, in_batches
from diffusion.pipeline import Pipeline, Settings
from diffusion.schedule import ALPHAS_CUMPROD, zero_terminal

CONFIG = load_model_config("emoji")
SETTINGS = Settings(steps=5, scale=2.0)
SEEDS = (3, 4, 5, 6, 7)


class Velocity(nn.Cell):
    """v of a picture that is one colour all over, which the text says; at ᾱ = 0 exactly −x₀. There
    may be several texts for each of the latents."""

    def construct(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        colour = text[:, :1, :1].expand_dims(-1)
        if self.training:
            colour = colour + 100
        zeros = 0 * latents + 0 * timesteps.reshape(-1, 1, 1, 1)
        return ops.concat((zeros,) * (len(text) // len(latents))) - colour


class Decoder(nn.Cell):
    def construct(self, latents: Tensor) -> Tensor:
        return latents[:, :3]


@pytest.fixture(autouse=True, scope="module")
def graph_mode() -> None:
    compile_graphs()


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    """Five prompts and the negative one."""
    colours = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.0], np.float32)
    return np.tile(colours[:, None, None], (1, 77, 64))


def drawn(pipeline: Pipeline, text: np.ndarray, settings: Settings, rows: slice = slice(5)):
    """Latents of the prompts in these rows, each with its seed."""
    positive = text[rows]
    negative = np.repeat(text[-1:], len(positive), axis=0)
    return pipeline.latents(positive, negative, SEEDS[rows], settings)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_latents_of_every_seed_without_text_encoder_and_vae(text: np.ndarray, scale: float) -> None:
    unet = Velocity()
    pipeline = Pipeline(CONFIG, unet, None, None)
    assert pipeline.latent_shape() == (4, 16, 16)
    settings = Settings(steps=5, scale=scale, batch=4)
    done: list[int] = []
    negative = text[[5] * 5]
    found = pipeline.latents(text[:5], negative, SEEDS, settings, done.append)
    assert found.shape == (5, 4, 16, 16)
    assert done == [4, 5]
    alone = drawn(pipeline, text, Settings(steps=5, scale=scale), slice(2, 3))
    np.testing.assert_allclose(alone[0], found[2], rtol=1e-6, atol=1e-6)
    wide = Settings(steps=5, scale=scale, size=(64, 32))
    assert drawn(pipeline, text, wide, slice(1)).shape == (1, 4, 8, 16)


def test_fresh_noise_is_of_the_picture_and_the_step(text: np.ndarray) -> None:
    """Alone, in another order or in a batch, a picture gets the same noise in every step."""
    pipeline = Pipeline(CONFIG, Velocity(), None, None)
    settings = Settings(steps=4, scale=1.0, solver="euler-a")
    found = drawn(pipeline, text, settings)
    np.testing.assert_array_equal(drawn(pipeline, text, settings, slice(3, 4))[0], found[3])
    without = drawn(pipeline, text, Settings(steps=4, scale=1.0, solver="euler-a", eta=0.0))
    plain = drawn(pipeline, text, Settings(steps=4, scale=1.0, solver="euler"))
    np.testing.assert_allclose(without, plain, rtol=1e-9)
    assert np.abs(found - plain).max() > 1e-3


def test_a_network_in_training_draws_without_dropout_and_stays_in_training(
    text: np.ndarray,
) -> None:
    unet = Velocity()
    wanted = drawn(Pipeline(CONFIG, unet, None, None), text, SETTINGS)
    unet.set_train()
    found = drawn(Pipeline(CONFIG, unet, None, None), text, SETTINGS)
    np.testing.assert_array_equal(found, wanted)
    assert unet.training


def test_in_batches_is_without_dropout() -> None:
    class Noisy(nn.Cell):
        def construct(self, rows: Tensor) -> Tensor:
            return rows + 100 if self.training else rows

    cell, rows = Noisy().set_train(), np.arange(5, dtype=np.float32)
    np.testing.assert_array_equal(in_batches(cell, rows, 2), rows)
    assert cell.training


def test_zero_terminal_snr_starts_where_nothing_but_the_text_counts(text: np.ndarray) -> None:
    """After one step of the solver the picture is −v of pure noise: the colour, guided."""
    alphas = zero_terminal(ALPHAS_CUMPROD)
    pipeline = Pipeline(CONFIG, Velocity(), None, Decoder(), alphas)
    one = Settings(steps=1, scale=2.0)
    found = drawn(pipeline, text, one)
    wanted = 2 * text[:5, 0, 0][:, None, None, None] * np.ones((1, 4, 16, 16))
    # At the σ of 4096 in place of infinity, x₀ has 1/4096 of the noise.
    np.testing.assert_allclose(found, wanted, atol=2e-3)
    ordinary = drawn(Pipeline(CONFIG, Velocity(), None, None), text, one)
    assert np.abs(ordinary - wanted).max() > 0.1
    pixels = pipeline.decode(found)
    assert pixels.shape == (5, 16, 16, 3)
    assert pixels.dtype == np.uint8
    level = (np.clip(wanted / CONFIG.vae.scaling_factor, -1, 1) + 1) * 127.5
    assert np.abs(pixels - level[:, :3].transpose(0, 2, 3, 1)).max() <= 1
