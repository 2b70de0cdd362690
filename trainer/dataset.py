"""What a run trains on: every image looked at once, with its caption, shape and digest."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from diffusion.images import DataError, open_image
from trainer.captions import listed, mask_of
from trainer.config import DataConfig, SetConfig
from trainer.remarks import remarks
from trainer.shapes import candidates, choose, nearest
from weights import files


@dataclass(frozen=True)
class Example:
    """One image, its caption, and how it is seen."""

    path: str
    caption: str
    """With its prefix."""
    prefix: str
    """What stands before the caption, and stays there when its parts are shuffled."""
    sha256: str
    """Of the image file."""
    width: int
    """Pixels, of the image as it is shown: after EXIF rotation."""
    height: int
    shape: tuple[int, int]
    """Width and height in pixels that it is trained at."""
    mask: str | None = None
    """The file that says what counts."""
    mask_sha256: str | None = None
    loss_weight: float = 1.0


@dataclass(frozen=True)
class Dataset:
    """Examples, and which of them one epoch shows."""

    examples: tuple[Example, ...]
    epoch: tuple[int, ...]
    """Rows of `examples`."""

    def shapes(self) -> list[tuple[tuple[int, int], int]]:
        """The shapes and how many samples of an epoch have each, the most frequent first."""
        counts = Counter(self.examples[row].shape for row in self.epoch)
        return sorted(counts.items(), key=lambda item: (-item[1], item[0]))

    def digest(self) -> str:
        """sha256 over all that training sees; where the files lie is no part of it."""
        seen = [(e.sha256, e.mask_sha256, e.caption, e.loss_weight, e.shape) for e in self.examples]
        return hashlib.sha256(json.dumps([seen, self.epoch]).encode()).hexdigest()


@dataclass(frozen=True)
class Scan:
    """All data of a run, and what is wrong with it."""

    training: Dataset
    validation: Dataset
    problems: list[str]
    """A sentence for each thing that must be put right; examples lack what they are about."""
    notes: list[str]
    """A sentence for each thing that is odd but harmless."""


def load(config: DataConfig, resolution: int, unit: int, global_batch: int) -> Scan:
    """As `scan`; raises DataError, with a line for each problem, if there are any."""
    found = scan(config, resolution, unit, global_batch)
    if found.problems:
        raise DataError("\n".join(found.problems))
    return found


def scan(config: DataConfig, resolution: int, unit: int, global_batch: int) -> Scan:
    """Decode every image and mask of all sets once, and say what is found.

    Sides of shapes are multiples of `unit` pixels, and each shape has at least `global_batch`
    samples in an epoch. Bad files are in `problems`; DataError is raised only for a resolution
    that is no multiple.
    """
    candidates(resolution, unit)  # refused before the work and not after it
    square = (resolution, resolution)
    problems: list[str] = []
    notes: list[str] = []
    sets = [*config.train]
    if config.validation is not None:
        sets.append(SetConfig(folder=config.validation))
    found = []
    with ThreadPoolExecutor() as pool:
        for one in sets:
            listing = listed(Path(one.folder))
            looks = list(pool.map(partial(_look, one, config, square), listing.all()))
            problems += listing.problems + [fault for _, faults in looks for fault in faults]
            notes += listing.notes
            if config.masks != "file" and any(mask_of(path).is_file() for path, _ in listing.rows):
                notes.append(f"{one.folder}: its masks are not looked at; data.masks: file does")
            found.append([example for example, _ in looks[: len(listing.rows)] if example])
    held_out = found.pop() if config.validation is not None else []
    examples = [example for part in found for example in part]
    epoch = _epoch(config.train, [len(part) for part in found])
    sizes = [(examples[row].width, examples[row].height) for row in epoch]
    shapes = choose(sizes, resolution, unit, config.shapes, global_batch)
    training = Dataset(_shaped(examples, shapes), epoch)
    validation = Dataset(_shaped(held_out, shapes), tuple(range(len(held_out))))
    notes += remarks(training.examples, validation.examples)
    return Scan(training, validation, [*map(printable, problems)], [*map(printable, notes)])


def dump_scan(scan: Scan) -> str:
    """A scan as JSON, which `read_scan` reads back to an equal value."""
    return json.dumps(asdict(scan), indent=1) + "\n"


def read_scan(text: str) -> Scan:
    """The scan that `dump_scan` wrote."""
    values = json.loads(text)
    for name in ("training", "validation"):
        rows = values[name]["examples"]
        examples = tuple(Example(**{**row, "shape": tuple(row["shape"])}) for row in rows)
        values[name] = Dataset(examples, tuple(values[name]["epoch"]))
    return Scan(**values)


def _look(
    one: SetConfig, config: DataConfig, shape: tuple[int, int], row: tuple[Path, str]
) -> tuple[Example | None, list[str]]:
    """An image of a set as it is found, or what is wrong with its files."""
    path, caption = row
    mask = mask_of(path)
    has_mask = config.masks == "file" and mask.is_file()
    sizes, faults = [], []
    for file in (path, mask) if has_mask else (path,):
        try:
            sizes.append(open_image(file).size)
        except DataError as error:
            faults.append(str(error))
    if faults:
        return None, faults
    prefix = config.prefix if one.prefix is None else one.prefix
    if one.regularisation:
        prefix = ""
    example = Example(
        path=str(path),
        caption=prefix + caption,
        prefix=prefix,
        sha256=files.sha256(path),
        width=sizes[0][0],
        height=sizes[0][1],
        shape=shape,
        mask=str(mask) if has_mask else None,
        mask_sha256=files.sha256(mask) if has_mask else None,
        loss_weight=one.loss_weight,
    )
    return example, []


def _epoch(sets: Sequence[SetConfig], lengths: Sequence[int]) -> tuple[int, ...]:
    """The rows that one epoch shows, `lengths` being how many examples each set has.

    Regularisation images fill up as many places as the others have, over and over in the same
    order; where they are more than that, each comes once.
    """
    shown: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    row = 0
    for one, length in zip(sets, lengths, strict=True):
        for turn in range(one.repeats):
            shown[one.regularisation] += [(turn, row + i) for i in range(length)]
        row += length
    learnt, kept = ([row for _, row in sorted(shown[kind])] for kind in (False, True))
    places = max(len(learnt), len(set(kept)))
    return (*learnt, *islice(cycle(kept), places))


def _shaped(examples: Iterable[Example], shapes: Sequence[tuple[int, int]]) -> tuple[Example, ...]:
    return tuple(replace(e, shape=nearest((e.width, e.height), shapes)) for e in examples)


def printable(sentence: str) -> str:
    """Without what a file's name may hold that would disturb a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence)
