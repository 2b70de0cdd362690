"""What is odd about the images of a run, but does no harm; needs no MindSpore."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

_CROPPED = 0.5


class Picture(Protocol):
    """What is looked at of an example."""

    @property
    def path(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def shape(self) -> tuple[int, int]: ...


def remarks(training: Sequence[Picture], validation: Sequence[Picture]) -> list[str]:
    """A sentence for each image that is there twice or mostly cropped away, one for all small."""
    return [
        *_twice(training, validation),
        *_enlarged([*training, *validation]),
        *_cropped([*training, *validation]),
    ]


def _twice(training: Sequence[Picture], validation: Sequence[Picture]) -> list[str]:
    trained: dict[str, list[str]] = defaultdict(list)
    held_out: dict[str, list[str]] = defaultdict(list)
    for pictures, paths in ((training, trained), (validation, held_out)):
        for picture in pictures:
            paths[picture.sha256].append(picture.path)
    notes = [
        f"{', '.join(same)}: the same image {len(same)} times; it counts as often"
        for paths in (trained, held_out)
        for same in paths.values()
        if len(same) > 1
    ]
    return notes + [
        f"{held_out[digest][0]}: held out, but trained on as {same[0]}; the validation loss will "
        "look better than it is"
        for digest, same in trained.items()
        if digest in held_out
    ]


def _enlarged(pictures: Sequence[Picture]) -> list[str]:
    small = [p for p in pictures if p.width < p.shape[0] or p.height < p.shape[1]]
    if not small:
        return []
    least = min(small, key=lambda p: (p.width * p.height, p.path))
    count = "1 image is" if len(small) == 1 else f"{len(small)} images are"
    return [
        f"{count} smaller than what is trained on, and so enlarged and not sharp; the smallest is "
        f"{least.path} with {_by(least.width, least.height)} for {_by(*least.shape)}"
    ]


def _cropped(pictures: Sequence[Picture]) -> list[str]:
    notes = []
    for picture in pictures:
        width, height = picture.shape
        scale = max(width / picture.width, height / picture.height)
        seen = width * height / (picture.width * picture.height * scale**2)
        if seen < _CROPPED:
            notes.append(
                f"{picture.path}: {_by(picture.width, picture.height)} is seen as "
                f"{_by(width, height)}, {1 - seen:.0%} of it cropped away"
            )
    return notes


def _by(width: int, height: int) -> str:
    return f"{width} × {height}"
