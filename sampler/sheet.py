"""Contact sheets: pictures in labelled rows and columns, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 160
MARGIN = 12
TEXT_SIZE = 14
LINE = 18
INK, PAPER, MISSING = (30, 30, 30), (255, 255, 255), (225, 225, 225)
_WIDEST_LABEL = 180

Pixels = np.ndarray | None
"""uint8 (height, width, 3); None where there is no picture."""
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Block:
    """A table of pictures with a title: its rows have a picture for each column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Pixels, ...]], ...]


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Pixels]]], captions: Sequence[str], columns: int = 8
) -> Image.Image:
    """Rows of pictures, (label, pictures), each with n captions below the last row.

    More pictures than `columns` continue in a further band of rows below.
    """
    bands = [slice(i, i + columns) for i in range(0, len(captions), columns)]
    blocks = [
        Block("", tuple(captions[band]), tuple((label, tuple(row[band])) for label, row in rows))
        for band in bands
    ]
    return sheet(blocks, captions_below=True)


def sheet(blocks: Sequence[Block], captions_below: bool = False) -> Image.Image:
    """Blocks one below the other. Their columns are named above them, or below."""
    font = ImageFont.load_default(TEXT_SIZE)
    widest = max((font.getlength(label) for b in blocks for label, _ in b.rows), default=0)
    label_width = int(min(widest, _WIDEST_LABEL)) + 2 * MARGIN
    count = max(len(block.columns) for block in blocks)
    page_width = label_width + count * (CELL + MARGIN)
    captions = [[wrap(text, font, CELL) for text in block.columns] for block in blocks]
    titles = [
        wrap(block.title, font, page_width - 2 * MARGIN) if block.title else [] for block in blocks
    ]
    heights = [
        LINE * (len(title) + max(map(len, lines)))
        + sum(_height(block) + MARGIN for _ in block.rows)
        + 2 * MARGIN
        for block, title, lines in zip(blocks, titles, captions, strict=True)
    ]
    page = Image.new("RGB", (page_width, sum(heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    top = MARGIN
    for block, title, lines, height in zip(blocks, titles, captions, heights, strict=True):
        y, side = top, _height(block)
        for line in title:
            draw.text((MARGIN, y), line, INK, font)
            y += LINE
        if not captions_below:
            y = _captions(draw, font, lines, label_width, y)
        for label, pictures in block.rows:
            label_lines = wrap(label, font, _WIDEST_LABEL)
            start = y + side // 2 - LINE * len(label_lines) // 2
            for number, line in enumerate(label_lines):
                draw.text((MARGIN, start + number * LINE), line, INK, font)
            for column, pixels in enumerate(pictures):
                _paste(page, pixels, label_width + column * (CELL + MARGIN), y, side)
            y += side + MARGIN
        if captions_below:
            _captions(draw, font, lines, label_width, y)
        top += height
    return page


def _height(block: Block) -> int:
    """Of a row: as high as its highest picture when that is as wide as a cell, at most so."""
    shapes = [p.shape for _, row in block.rows for p in row if p is not None]
    return max((min(CELL, round(CELL * h / w)) for h, w, _ in shapes), default=CELL)


def _captions(
    draw: ImageDraw.ImageDraw, font: Font, captions: Sequence[Sequence[str]], left: int, y: int
) -> int:
    for column, lines in enumerate(captions):
        x = left + column * (CELL + MARGIN) + CELL // 2
        for number, text in enumerate(lines):
            draw.text((x, y + number * LINE), text, INK, font, anchor="ma")
    return y + LINE * max(map(len, captions))


def _paste(page: Image.Image, pixels: Pixels, x: int, y: int, height: int) -> None:
    """The picture in the middle of its cell, as large as fits."""
    if pixels is None:
        page.paste(MISSING, (x, y, x + CELL, y + height))
        return
    picture = Image.fromarray(pixels)
    scale = min(CELL / picture.width, height / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    corner = x + (CELL - size[0]) // 2, y + (height - size[1]) // 2
    page.paste(picture.resize(size, Image.Resampling.BICUBIC), corner)


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Lines that fit the width, of whole words but for those that are too long themselves."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(candidate) > width:
            lines.append("")
            candidate = word
        while len(candidate) > 1 and font.getlength(candidate) > width:
            cut = len(candidate) - 1
            while cut > 1 and font.getlength(candidate[:cut]) > width:
                cut -= 1
            lines[-1], candidate = candidate[:cut], candidate[cut:]
            lines.append("")
        lines[-1] = candidate
    return lines
