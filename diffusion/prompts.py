"""Prompts with emphasis, of any length: text in, rows of token ids with a weight for each in.

The notation is that of AUTOMATIC1111's web UI, which most prompts are written in: `(word)` counts
1.1 times, `[word]` 1/1.1 times, `(word:1.3)` 1.3 times, nested ones multiply, and a backslash makes
a bracket a bracket.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from diffusion.tokenizer import Tokenizer

_STRONGER = 1.1
_LOOK_BACK = 20
"""Tokens; a comma among the last so many of a full chunk is where the next one begins."""
_PIECES = re.compile(
    r"\\[()\[\]\\]"
    r"|\(|\["
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|\)|\]"
    r"|[^\\()\[\]:]+|:|\\"
)


@dataclass(frozen=True)
class Chunk:
    """What the text encoder reads at once: ids (77,) int32, and weights (77,) float32, which are
    1 at marks and padding."""

    ids: np.ndarray
    weights: np.ndarray

    @property
    def is_plain(self) -> bool:
        """Does every token count alike?"""
        return bool((self.weights == 1).all())


def emphasis(prompt: str) -> list[tuple[str, float]]:
    """The prompt's text in pieces, with the weight of each. Brackets that are never closed count
    to the end; those that were never opened are text."""
    pieces: list[tuple[str, float]] = []
    round_, square = [], []

    def multiply(start: int, factor: float) -> None:
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for match in _PIECES.finditer(prompt):
        text = match[0]
        if text[0] == "\\" and len(text) == 2:
            pieces.append((text[1], 1.0))
        elif text == "(":
            round_.append(len(pieces))
        elif text == "[":
            square.append(len(pieces))
        elif match["weight"] is not None and round_:
            multiply(round_.pop(), float(match["weight"]))
        elif text == ")" and round_:
            multiply(round_.pop(), _STRONGER)
        elif text == "]" and square:
            multiply(square.pop(), 1 / _STRONGER)
        else:
            pieces.append((text, 1.0))
    for start in round_:
        multiply(start, _STRONGER)
    for start in square:
        multiply(start, 1 / _STRONGER)
    joined: list[tuple[str, float]] = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined or [("", 1.0)]


def chunks(tokenizer: Tokenizer, prompt: str) -> list[Chunk]:
    """The prompt in as many chunks of at most 75 tokens as it needs, at least one.

    A chunk that is full ends after a comma near its end, if there is one.
    """
    length = tokenizer.context_length - 2
    comma = tokenizer.ids(",")[0]
    tokens: list[tuple[int, float]] = []
    for text, weight in emphasis(prompt):
        tokens += [(token, weight) for token in tokenizer.ids(text)]
    found = []
    while len(tokens) > length:
        ends = [n for n in range(length - _LOOK_BACK, length) if tokens[n][0] == comma]
        end = ends[-1] + 1 if ends else length
        found.append(tokens[:end])
        tokens = tokens[end:]
    if tokens or not found:
        found.append(tokens)
    return [_chunk(tokenizer, part) for part in found]


def weighted(states: np.ndarray, chunk: Chunk) -> np.ndarray:
    """Hidden states (77, width) of a chunk with each token's counted as often as its weight says,
    and their mean as it was."""
    if chunk.is_plain:
        return states
    scaled = states * chunk.weights[:, None]
    mean = scaled.mean()
    return scaled * (states.mean() / mean) if mean else scaled


def _chunk(tokenizer: Tokenizer, tokens: list[tuple[int, float]]) -> Chunk:
    weights = np.ones(tokenizer.context_length, np.float32)
    weights[1 : len(tokens) + 1] = [weight for _, weight in tokens]
    return Chunk(tokenizer.row([token for token, _ in tokens]), weights)
