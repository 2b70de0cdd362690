"""What a look at the data has found, in words and as plain values; needs no MindSpore."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.dataset import Dataset, Example, Scan, printable

MOST_TOKENS = 77
"""What the text encoder sees of a caption, with the marks at both ends."""


@dataclass(frozen=True)
class ShapeCount:
    """A shape that images are trained at."""

    width: int
    height: int
    samples: int
    """Of one epoch."""
    repeated: int
    """Samples that are seen again, to fill the last batch of this shape."""


@dataclass(frozen=True)
class Report:
    """The data of one run."""

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    examples: int
    epoch_samples: int
    validation_examples: int
    sizes: tuple[tuple[int, int], ...]
    """Width and height of the smallest, the median and the largest training image."""
    shapes: tuple[ShapeCount, ...]
    long_captions: tuple[tuple[str, int], ...]
    """Images whose caption is above 77 tokens, and its tokens."""

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def report(scan: Scan, tokens: Callable[[Sequence[str]], list[int]], global_batch: int) -> Report:
    """What a scan comes to; `tokens` counts those of captions, with begin and end marks, uncut."""
    training, validation = scan.training, scan.validation
    sizes = sorted(
        ((e.width, e.height) for e in training.examples), key=lambda size: (size[0] * size[1], size)
    )
    return Report(
        problems=tuple(scan.problems),
        notes=tuple(scan.notes),
        examples=len(training.examples),
        epoch_samples=len(training.epoch),
        validation_examples=len(validation.examples),
        sizes=(sizes[0], sizes[len(sizes) // 2], sizes[-1]) if sizes else (),
        shapes=_shape_counts(training, global_batch),
        long_captions=_long_captions([*training.examples, *validation.examples], tokens),
    )


def report_text(found: Report) -> str:
    """The report, a fact a line."""
    epoch = f"{found.epoch_samples:,} samples in an epoch"
    held_out = f"{found.validation_examples:,} held out" if found.validation_examples else ""
    lines = ["images", "  " + "; ".join(filter(None, (f"{found.examples:,}", epoch, held_out)))]
    if found.sizes:
        words = ("smallest", "median", "largest")
        sizes = zip(words, found.sizes, strict=True)
        lines += ["sizes", "  " + ", ".join(f"{word} {w} × {h}" for word, (w, h) in sizes)]
        lines += ["shapes", *map(_shape_text, found.shapes)]
    if found.long_captions:
        lines += [f"captions above {MOST_TOKENS} tokens, of which the rest is not seen"]
        lines += [f"  {printable(path)}: {count} tokens" for path, count in found.long_captions]
    if found.notes:
        lines += ["notes", *(f"  {note}" for note in found.notes)]
    count = len(found.problems)
    if count:
        lines += [f"{count} problem{'' if count == 1 else 's'}, to be put right before training"]
        lines += [f"  {problem}" for problem in found.problems]
    else:
        lines += ["no problems"]
    return "\n".join(lines)


def _shape_counts(dataset: Dataset, global_batch: int) -> tuple[ShapeCount, ...]:
    """The shapes; with several of them a batch is of one, so that each has a last one to fill."""
    shapes = dataset.shapes()
    return tuple(
        ShapeCount(*shape, count, -count % global_batch if len(shapes) > 1 else 0)
        for shape, count in shapes
    )


def _shape_text(shape: ShapeCount) -> str:
    repeated = f", {shape.repeated:,} more to fill the last batch" if shape.repeated else ""
    return f"  {shape.width} × {shape.height}: {shape.samples:,} samples{repeated}"


def _long_captions(
    examples: Sequence[Example], tokens: Callable[[Sequence[str]], list[int]]
) -> tuple[tuple[str, int], ...]:
    counts = tokens([example.caption for example in examples])
    pairs = zip(examples, counts, strict=True)
    return tuple((example.path, count) for example, count in pairs if count > MOST_TOKENS)
