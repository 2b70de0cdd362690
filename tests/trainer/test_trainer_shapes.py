"""Into which shapes images are sorted."""

from __future__ import annotations

import pytest

from diffusion.images import DataError
from trainer.shapes import candidates, choose, nearest

SQUARE, UPRIGHT, WIDE = (512, 512), (384, 640), (640, 384)


def test_the_shapes_of_512_pixels() -> None:
    upright = [(256, 1024), (320, 768), (384, 640), (448, 576)]
    wide = [(h, w) for w, h in reversed(upright)]
    assert candidates(512, 64) == [*upright, SQUARE, *wide]


@pytest.mark.parametrize(
    ("resolution", "unit"), [(64, 16), (64, 64), (192, 64), (320, 64), (768, 64), (1024, 8)]
)
def test_shapes_are_as_large_as_the_square_and_no_larger(resolution: int, unit: int) -> None:
    found = candidates(resolution, unit)
    assert (resolution, resolution) in found
    assert found == sorted({(w, h) for h, w in found})
    for width, height in found:
        assert width % unit == height % unit == 0
        assert resolution / 2 <= min(width, height) <= max(width, height) <= 2 * resolution
        assert width * height <= resolution**2
        assert min((width + unit) * height, width * (height + unit)) > resolution**2


@pytest.mark.parametrize(
    ("resolution", "use"), [(500, "448 or 512"), (70, "64 or 128"), (30, "64 or 128")]
)
def test_a_resolution_between_two_multiples_is_refused(resolution: int, use: str) -> None:
    with pytest.raises(DataError) as caught:
        choose([SQUARE], resolution, 64, 1, 1)
    assert str(caught.value) == (
        f"data.resolution: expected a multiple of 64 pixels, found {resolution}; use {use}"
    )


def test_one_shape_is_the_square() -> None:
    assert choose([(100, 400)] * 50, 512, 64, 1, 1) == [SQUARE]


def test_images_of_two_aspects_have_two_shapes() -> None:
    sizes = [(3000, 5000)] * 10 + [(1200, 720)] * 20
    assert choose(sizes, 512, 64, 7, 4) == [UPRIGHT, WIDE]


def test_the_rarest_shapes_are_dropped_until_few_enough_are_left() -> None:
    sizes = [UPRIGHT] * 9 + [SQUARE] * 10 + [WIDE] * 8
    assert choose(sizes, 512, 64, 3, 1) == [UPRIGHT, SQUARE, WIDE]
    assert choose(sizes, 512, 64, 2, 1) == [UPRIGHT, SQUARE]


def test_a_shape_has_a_whole_batch_of_images() -> None:
    sizes = [UPRIGHT] * 3 + [SQUARE] * 10 + [WIDE] * 4
    assert choose(sizes, 512, 64, 7, 4) == [SQUARE, WIDE]
    assert choose(sizes, 512, 64, 7, 5) == [SQUARE]


def test_what_is_dropped_goes_to_its_neighbour() -> None:
    sizes = [(320, 768)] * 3 + [UPRIGHT] * 4 + [SQUARE] * 5
    assert choose(sizes, 512, 64, 7, 5) == [UPRIGHT, SQUARE]


def test_the_last_shape_stays_however_few_images_there_are() -> None:
    assert choose([WIDE], 512, 64, 7, 100) == [WIDE]
    assert choose([], 512, 64, 7, 100) == [SQUARE]


def test_the_choice_does_not_depend_on_the_order() -> None:
    sizes = [(w, 500) for w in range(150, 1500, 7)]
    assert choose(sizes, 512, 64, 4, 16) == choose(sizes[::-1], 512, 64, 4, 16)


def test_nearest_is_by_ratio_and_not_by_size() -> None:
    shapes = [UPRIGHT, SQUARE, WIDE]
    assert nearest((60, 100), shapes) == UPRIGHT
    assert nearest((9000, 8800), shapes) == SQUARE
    assert nearest((40, 1), shapes) == WIDE
