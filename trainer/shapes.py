"""The shapes of picture that images are sorted into, instead of being cropped to a square."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from diffusion.images import DataError

Size = tuple[int, int]
"""Width and height in pixels."""


def choose(
    sizes: Sequence[Size], resolution: int, unit: int, most: int, at_least: int
) -> list[Size]:
    """The shapes that suit images of these sizes, at most `most`, from upright to wide.

    `sizes` has an item for each sample of an epoch. Every image goes to the candidate nearest to
    it; the rarest candidate is dropped and its images assigned anew, until no more than `most` are
    left and each has `at_least` samples. One always stays, and a single one is the square if
    `most` is 1. Raises DataError as `candidates` does.
    """
    shapes = candidates(resolution, unit)
    if most == 1:
        return [(resolution, resolution)]
    counts = Counter(sizes)
    while len(shapes) > 1:
        found = dict.fromkeys(shapes, 0)
        for size, count in counts.items():
            found[nearest(size, shapes)] += count
        if len(shapes) <= most and min(found.values()) >= at_least:
            break
        # Of several that are as rare, the one furthest from the square.
        shapes.remove(min(shapes, key=lambda shape: (found[shape], -abs(_aspect(shape)), shape)))
    return shapes


def candidates(resolution: int, unit: int) -> list[Size]:
    """Every shape of about resolution² pixels and not more, from upright to wide.

    Sides are multiples of `unit` from resolution / 2 to 2 · resolution, and neither could be a
    unit longer. Raises DataError if resolution itself is no multiple.
    """
    if resolution % unit:
        below = max(unit, resolution // unit * unit)
        raise DataError(
            f"data.resolution: expected a multiple of {unit} pixels, found {resolution}; use "
            f"{below} or {below + unit}"
        )
    sides = range(math.ceil(resolution / 2 / unit) * unit, 2 * resolution + 1, unit)

    def longest(side: int) -> int:
        return min(resolution**2 // side // unit * unit, sides[-1])

    pairs = [(side, longest(side)) for side in sides]
    return [(w, h) for w, h in pairs if h >= sides[0] and w == longest(h)]


def nearest(size: Size, shapes: Sequence[Size]) -> Size:
    """The shape whose aspect ratio is nearest to an image's, by its logarithm."""
    return min(shapes, key=lambda shape: (abs(_aspect(shape) - _aspect(size)), shape))


def _aspect(size: Size) -> float:
    """Logarithm of width / height: 0 for a square, positive for what is wide."""
    return math.log(size[0] / size[1])
