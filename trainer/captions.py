"""Which images a folder has, and their captions; needs no MindSpore."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from diffusion.images import EXTENSIONS
from trainer.tables import TABLE, Row, csv_rows, json_rows, not_utf8

_MASK = ".mask.png"
_KINDS = ", ".join(EXTENSIONS)
_OF_THE_SYSTEM = ("thumbs.db", "desktop.ini", "__macosx")


@dataclass(frozen=True)
class Listing:
    """The images of one folder."""

    rows: list[tuple[Path, str]] = field(default_factory=list)
    """Images and their captions, sorted by file name."""
    problems: list[str] = field(default_factory=list)
    """A sentence for each fault."""
    notes: list[str] = field(default_factory=list)
    """A sentence for each thing that is odd but harmless."""
    refused: list[Path] = field(default_factory=list)
    """Images that are there, but of which `problems` speaks."""

    def all(self) -> list[tuple[Path, str]]:
        """The rows, and after them what is refused, with empty captions."""
        return [*self.rows, *((path, "") for path in self.refused)]


def listed(folder: Path) -> Listing:
    """The images of a folder with their captions, and every fault of it; raises nothing.

    Captions come from `metadata.jsonl` (`{"file_name": …, "text": …}` a line) if the folder has
    one, else from its one `.csv` (columns `file_name` or MindONE's `dir`, and `text`), else from a
    `.txt` beside each image. Hidden files are left out.
    """
    listing = Listing()
    try:
        found = sorted(path for path in folder.iterdir() if not _hidden(path))
    except OSError as error:
        fault = "there is no such data folder; check the path in the config"
        if not isinstance(error, FileNotFoundError):
            fault = f"expected a folder of images, found {error.strerror}; check the path"
        listing.problems.append(f"{folder}: {fault}")
        return listing
    images = [path for path in found if _is_image(path)]
    sheets = [path for path in found if path.suffix.lower() == ".csv"]
    if folder / TABLE in found:
        rows = json_rows(folder / TABLE, listing.problems)
        _take_rows(listing, folder, rows, images)
    elif len(sheets) == 1:
        rows = csv_rows(sheets[0], listing.problems)
        _take_rows(listing, folder, rows, images)
    elif sheets:
        names = ", ".join(sheet.name for sheet in sheets)
        listing.problems.append(
            f"{folder}: expected one .csv with captions, found {names}; keep one"
        )
    else:
        _take_captions(listing, images)
        _note_what_is_left_out(listing, folder, found, images)
    expected = {mask_of(path) for path in images}
    masks = [path for path in found if path.name.lower().endswith(_MASK)]
    if lonely := [path for path in masks if path not in expected]:
        listing.notes.append(
            f"{folder}: expected the image of each mask, found none for {_some(lonely)}; a mask is "
            "named like its image, NAME.mask.png"
        )
    if not (listing.rows or listing.problems):
        listing.problems.append(
            f"{folder}: expected images ({_KINDS}), found none; put images with captions there"
        )
    listing.rows.sort(key=lambda row: row[0].name)
    return listing


def mask_of(image: Path) -> Path:
    """Where the mask of an image is, if it has one."""
    return image.with_name(image.stem + _MASK)


def _take_rows(listing: Listing, folder: Path, rows: Iterable[Row], images: Iterable[Path]) -> None:
    """The images that a table lists."""
    seen: dict[Path, str] = {}
    for where, name, text in rows:
        place = Path(os.path.normpath(name))
        path, caption = folder / place, _one_line(text)
        fault = _fault(path)
        if place.is_absolute() or ".." in place.parts:
            fault = f"expected an image in the table's folder, found {name!r}; move it there"
        elif place in seen:
            fault = f"{name!r} is listed before, in {seen[place]}; take one of the lines out"
        elif fault:
            fault = f"{name!r}: {fault}"
        elif problem := _caption_fault(caption):
            fault = f"{name!r}: expected a caption, found {problem}; write one"
            listing.refused.append(path)
        else:
            listing.rows.append((path, caption))
        seen.setdefault(place, where.rpartition(", ")[2])
        if fault:
            listing.problems.append(f"{where}: {fault}")
    if rest := [path for path in images if Path(path.name) not in seen]:
        listing.notes.append(
            f"{folder}: images that the table does not list are left out ({_some(rest)}); add "
            "lines for them, or move them away"
        )


def _take_captions(listing: Listing, images: Iterable[Path]) -> None:
    """The images that have a .txt beside them."""
    sharing: dict[Path, list[Path]] = defaultdict(list)
    for path in images:
        if fault := _fault(path):
            listing.problems.append(f"{path}: {fault}")
        else:
            sharing[path.with_suffix(".txt")].append(path)
    for text, paths in sharing.items():
        path, *others = paths
        caption, fault = _read_caption(text)
        if others:
            names = ", ".join(path.name for path in paths)
            fault = f"expected one image for the caption {text.name}, found {names}; rename them"
        if fault:
            listing.problems.append(f"{path}: {fault}")
            listing.refused.extend(paths)
        else:
            listing.rows.append((path, caption))


def _read_caption(text: Path) -> tuple[str, str | None]:
    """A caption, and what is wrong with it."""
    caption = ""
    try:
        caption = _one_line(text.read_bytes().decode("utf-8-sig"))
        found = _caption_fault(caption)
    except UnicodeDecodeError as error:
        found = f"{not_utf8(error)}, which is not UTF-8; save it as UTF-8"
    except FileNotFoundError:
        found = "none"
    except OSError as error:
        found = f"{error.strerror}"
    if found is None:
        return caption, None
    remedy = "" if ";" in found else "; write one"
    return "", f"expected a caption in {text.name}, found {found}{remedy}"


def _caption_fault(caption: str) -> str | None:
    if not caption:
        return "an empty one"
    if any("\ud800" <= character <= "\udfff" for character in caption):
        return "half a character, which no text can hold"
    return None


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _fault(path: Path) -> str | None:
    """Why a file is no image that can be opened, if that shows without opening it."""
    if os.path.isdir(path):
        return "expected an image, found a folder; rename or remove it"
    if not os.path.isfile(path):
        found = "a link to nothing" if os.path.islink(path) else "no such file"
        return f"expected an image, found {found}; put the image there"
    if not _is_image(path):
        kind = "a mask" if path.name.lower().endswith(_MASK) else f"a {path.suffix} file"
        return f"expected an image ({_KINDS}), found {kind}; convert it or take it out"
    if any("\ud800" <= character <= "\udfff" for character in path.name):
        return "expected a file name in UTF-8, found another encoding; rename it"
    return None


def _note_what_is_left_out(
    listing: Listing, folder: Path, found: Iterable[Path], images: Iterable[Path]
) -> None:
    captions = {path.with_suffix(".txt") for path in images}
    left: dict[str, list[Path]] = defaultdict(list)
    for path in found:
        if path not in captions and path.suffix.lower() not in EXTENSIONS:
            left["folders" if path.is_dir() else path.suffix.lower()].append(path)
    for kind, paths in left.items():
        if kind == "folders":
            why = "folders in a folder are not looked into", "name them in data.train"
        elif kind == ".txt":
            why = "captions without an image are left out", "name them like their images"
        else:
            named = f"{kind} files" if kind else "files without an extension"
            why = f"{named} are left out", f"convert what is to be seen to one of {_KINDS}"
        listing.notes.append(f"{folder}: {why[0]} ({_some(paths)}); {why[1]}")


def _some(paths: list[Path]) -> str:
    """The first few names."""
    names = [path.name for path in paths[:3]]
    return ", ".join(names) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.lower().endswith(_MASK)


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in _OF_THE_SYSTEM
