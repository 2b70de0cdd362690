"""Prompts with emphasis and of any length."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion.prompts import chunks, emphasis, weighted
from diffusion.tokenizer import Tokenizer, clip_vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(clip_vocabulary())


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a fox", [("a fox", 1)]),
        ("", [("", 1)]),
        ("a (red:1.3) fox", [("a ", 1), ("red", 1.3), (" fox", 1)]),
        ("(very (good)) [bad]", [("very ", 1.1), ("good", 1.21), (" ", 1), ("bad", 1 / 1.1)]),
        ("a \\(real\\) fox", [("a (real) fox", 1)]),
        ("at 10:30) [", [("at 10:30) ", 1)]),
        ("((never closed", [("never closed", 1.21)]),
        ("(a:b:0.5)", [("a:b", 0.5)]),
        ("(minus:-1)", [("minus", -1)]),
        ("nothing (:1.5) here", [("nothing  here", 1)]),
    ],
)
def test_emphasis(prompt: str, pieces: list[tuple[str, float]]) -> None:
    found = emphasis(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    np.testing.assert_allclose([weight for _, weight in found], [weight for _, weight in pieces])


def test_a_short_plain_prompt_is_what_the_tokenizer_makes_of_it(tokenizer: Tokenizer) -> None:
    for prompt in ("", "a fox, sitting on a hill", "Größe — 100 %"):
        (chunk,) = chunks(tokenizer, prompt)
        np.testing.assert_array_equal(chunk.ids, tokenizer([prompt])[0])
        assert chunk.is_plain


def test_nothing_of_a_long_prompt_is_lost(tokenizer: Tokenizer) -> None:
    prompt = ", ".join(f"thing number {n}" for n in range(60))
    found = chunks(tokenizer, prompt)
    assert len(found) > 2
    ids = [i for chunk in found for i in chunk.ids[1:].tolist() if i != 49407]
    assert ids == tokenizer.ids(prompt)
    comma = tokenizer.ids(",")[0]
    for chunk in found[:-1]:  # each ends with a comma
        end = chunk.ids.tolist().index(49407, 1)
        assert chunk.ids[end - 1] == comma
    no_comma = chunks(tokenizer, "word " * 76)
    assert [int((chunk.ids == tokenizer.ids("word")[0]).sum()) for chunk in no_comma] == [75, 1]


def test_weights_stand_at_their_words(tokenizer: Tokenizer) -> None:
    (chunk,) = chunks(tokenizer, "a (red:1.5) fox")
    red = chunk.ids.tolist().index(tokenizer.ids("red")[0])
    assert chunk.weights[red] == 1.5
    assert (np.delete(chunk.weights, red) == 1).all()


def test_weighing_keeps_the_mean(tokenizer: Tokenizer) -> None:
    states = np.random.default_rng(0).normal(0.5, 1, (77, 8)).astype(np.float32)
    (plain,) = chunks(tokenizer, "a red fox")
    assert weighted(states, plain) is states
    (chunk,) = chunks(tokenizer, "a (red:1.5) fox")
    found = weighted(states, chunk)
    assert found.mean() == pytest.approx(states.mean(), rel=1e-5)
    ratio = found / states
    red = int(np.argmax(chunk.weights))
    np.testing.assert_allclose(ratio[red] / ratio[0], 1.5, rtol=1e-5)
