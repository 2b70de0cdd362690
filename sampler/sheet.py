"""Contact sheets: pictures in labelled rows, with a caption under each column."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 160
MARGIN = 12
TEXT_SIZE = 14
LINE = 18
INK, PAPER = (30, 30, 30), (255, 255, 255)


def contact_sheet(
    rows: Sequence[tuple[str, np.ndarray]], captions: Sequence[str], columns: int = 8
) -> Image.Image:
    """Rows of pictures, (label, uint8 (n, h, w, 3)) each, with n captions.

    More pictures than `columns` continue in a further band of rows below.
    """
    font = ImageFont.load_default(TEXT_SIZE)
    bands = [range(i, min(i + columns, len(captions))) for i in range(0, len(captions), columns)]
    wrapped = [_wrap(caption, font, CELL) for caption in captions]
    label_width = int(max(font.getlength(label) for label, _ in rows)) + 2 * MARGIN
    heights = [
        len(rows) * (CELL + MARGIN) + LINE * max(len(wrapped[i]) for i in band) + 2 * MARGIN
        for band in bands
    ]
    width = label_width + min(columns, len(captions)) * (CELL + MARGIN)
    sheet = Image.new("RGB", (width, sum(heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for band, height in zip(bands, heights, strict=True):
        for r, (label, pictures) in enumerate(rows):
            y = top + r * (CELL + MARGIN)
            draw.text((MARGIN, y + CELL // 2), label, INK, font, anchor="lm")
            for c, index in enumerate(band):
                picture = Image.fromarray(pictures[index])
                x = label_width + c * (CELL + MARGIN)
                sheet.paste(picture.resize((CELL, CELL), Image.Resampling.BICUBIC), (x, y))
        y = top + len(rows) * (CELL + MARGIN)
        for c, index in enumerate(band):
            x = label_width + c * (CELL + MARGIN) + CELL // 2
            for line, text in enumerate(wrapped[index]):
                draw.text((x, y + line * LINE), text, INK, font, anchor="ma")
        top += height
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of whole words that fit the width."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(candidate) > width:
            lines.append(word)
        else:
            lines[-1] = candidate
    return lines
