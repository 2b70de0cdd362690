"""Images and captions on disk → arrays; every bad file is named before training starts."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class DataError(ValueError):
    """Images or captions that cannot be trained on; the message is one sentence."""


@dataclass(frozen=True)
class Example:
    """One image file and its caption."""

    path: Path
    caption: str


def find_examples(folder: str | Path, prefix: str = "") -> list[Example]:
    """The examples of a folder, sorted by file name; `prefix` goes before every caption.

    Captions come from `metadata.jsonl` (`{"file_name": …, "text": …}` a line) if the folder has
    one, else from its one `.csv` file (columns `file_name` or MindONE's `dir`, and `text`), else
    from a `.txt` file beside each image. Raises DataError if the folder is missing or empty, or
    if a caption or a listed image is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such data folder; check the path in the config")
    table, sheets = folder / "metadata.jsonl", sorted(folder.glob("*.csv"))
    if table.is_file():
        examples = _from_table(table)
    elif sheets:
        examples = _from_csv(folder, sheets)
    else:
        examples = _from_captions(folder)
    if not examples:
        raise DataError(
            f"{folder}: expected images ({', '.join(EXTENSIONS)}), found none; "
            "put images with captions there"
        )
    return [Example(example.path, prefix + example.caption) for example in examples]


def _from_table(table: Path) -> list[Example]:
    examples = []
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            path, caption = table.parent / row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{table}, line {number}: expected {{"file_name": …, "text": …}}, found '
                f"{line[:60]!r}; correct the line"
            ) from error
        examples.append(_listed(f"{table}, line {number}", path, caption))
    return sorted(examples, key=lambda example: example.path.name)


def _from_csv(folder: Path, sheets: Sequence[Path]) -> list[Example]:
    if len(sheets) > 1:
        names = ", ".join(sheet.name for sheet in sheets)
        raise DataError(f"{folder}: expected one .csv with captions, found {names}; keep one")
    (sheet,) = sheets
    try:
        with open(sheet, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or []
            place = next((name for name in ("file_name", "dir") if name in columns), None)
            if place is None or "text" not in columns:
                raise DataError(
                    f"{sheet}: expected the columns file_name (or dir) and text in its first "
                    f"line, found {', '.join(columns) or 'nothing'}; correct the line"
                )
            examples = [
                _listed(f"{sheet}, line {rows.line_num}", folder / (row[place] or ""), row["text"])
                for row in rows
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{sheet}: expected UTF-8 CSV, found {error}; save it as that") from error
    return sorted(examples, key=lambda example: example.path.name)


def _listed(where: str, path: Path, caption: object) -> Example:
    """A row of a table; DataError if the image or its caption is missing."""
    if not path.is_file():
        raise DataError(f"{where}: image {path.name!r} is missing")
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(f"{where}: the caption of {path.name!r} is empty")
    return Example(path, caption.strip())


def _from_captions(folder: Path) -> list[Example]:
    examples = []
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
    for path in paths:
        caption = path.with_suffix(".txt")
        text = caption.read_text(encoding="utf-8").strip() if caption.is_file() else ""
        if not text:
            found = "an empty one" if caption.is_file() else "none"
            raise DataError(
                f"{path}: expected a caption in {caption.name}, found {found}; write one"
            )
        examples.append(Example(path, text))
    return examples


def read_image(path: Path, resolution: int) -> np.ndarray:
    """One image as float32 (3, resolution, resolution) in [-1, 1].

    EXIF rotation is applied, transparency is laid on white, the shorter side is scaled to
    `resolution` and the middle kept. Raises DataError if the file does not decode.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips at 255
                levels = np.asarray(image, np.float64) / 257
                image = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
            image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: expected an image, found a file that does not decode ({error}); "
            "replace or remove it"
        ) from error
    image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1


def read_images(examples: Sequence[Example], resolution: int) -> np.ndarray:
    """All images as float32 (n, 3, resolution, resolution); names every bad file at once."""
    images, problems = [], []
    for example in examples:
        try:
            images.append(read_image(example.path, resolution))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return np.stack(images)
