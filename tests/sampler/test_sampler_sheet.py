"""The contact sheet: what stands where."""

from __future__ import annotations

import numpy as np

from sampler.sheet import CELL, MARGIN, contact_sheet

RED, BLUE = (255, 0, 0), (0, 0, 255)


def plain(colour: tuple[int, int, int], count: int) -> np.ndarray:
    return np.tile(np.array(colour, np.uint8), (count, 8, 8, 1))


def columns_of(sheet: np.ndarray, colour: tuple[int, int, int]) -> tuple[int, int]:
    """Width and height of all pixels of a colour."""
    rows, columns = np.nonzero((sheet == colour).all(axis=2))
    return int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1


def test_rows_stand_below_each_other_and_columns_side_by_side() -> None:
    rows = [("base", plain(RED, 2)), ("LoRA", plain(BLUE, 2))]
    sheet = np.asarray(contact_sheet(rows, ["a fox", "an owl"]))
    assert columns_of(sheet, RED) == (2 * CELL + MARGIN, CELL)
    assert columns_of(sheet, BLUE) == (2 * CELL + MARGIN, CELL)
    top = np.nonzero((sheet == RED).all(axis=2))[0].min()
    assert np.nonzero((sheet == BLUE).all(axis=2))[0].min() == top + CELL + MARGIN


def test_more_pictures_than_columns_go_on_below() -> None:
    rows = [("base", plain(RED, 3))]
    one, two = (
        contact_sheet(rows, ["x"] * 3, columns=3),
        contact_sheet(rows, ["x"] * 3, columns=2),
    )
    assert two.width < one.width
    assert columns_of(np.asarray(two), RED)[1] > 2 * CELL


def test_a_long_caption_is_wrapped_and_not_cut() -> None:
    rows = [("base", plain(RED, 1))]
    short = contact_sheet(rows, ["fox"])
    long = contact_sheet(rows, ["a fox that jumps over " * 4])
    assert long.width == short.width
    assert long.height > short.height
