"""Scores of pictures: which are measured on which network, and what to say of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sampler import metrics
from sampler.metrics import Score

if TYPE_CHECKING:
    from sampler.features import Extractor

_RARE = 0.05
"""Of training images are nearer to another one than a picture that is called close."""
_SHOWN_NEAREST = 3


@dataclass(frozen=True)
class Row:
    """One score of the LoRA, and of the base with the same prompts and seeds."""

    key: str
    title: str
    lora: Score | float
    base: Score | float | None = None
    difference: Score | None = None
    """LoRA minus base, paired."""
    factor: float = 1.0
    """By which it is shown."""
    better: str = "lower"
    """"lower", "higher", or "" if neither is."""
    note: str = ""


@dataclass(frozen=True)
class Sides:
    """The features of one network: (n, d) each, rows of `lora` and `base` pair."""

    real: np.ndarray
    lora: np.ndarray
    base: np.ndarray | None
    training: np.ndarray | None = None


@dataclass
class Judgement:
    """All scores, and what to keep in mind."""

    rows: list[Row] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)
    nearest: list[dict[str, Any]] = field(default_factory=list)
    """Pictures and the training images that they are nearest to."""

    def as_metrics(self) -> dict[str, Any]:
        """For a manifest: values, and intervals where there are any."""
        found: dict[str, Any] = {}
        for row in self.rows:
            sides = {"": row.lora, "_base": row.base, "_difference": row.difference}
            for suffix, score in sides.items():
                if isinstance(score, Score):
                    found[row.key + suffix] = {
                        "value": score.value,
                        "lower": score.lower,
                        "upper": score.upper,
                    }
                elif score is not None:
                    found[row.key + suffix] = score
        return found

    def add(self, row: Row, metric: str, sides: Sides) -> None:
        self.rows.append(row)
        score = row.lora if isinstance(row.lora, Score) else None
        numbers = len(sides.real), len(sides.lora)
        said = [metrics.caution(metric, *numbers, score)]
        if row.difference is not None:
            said.append(metrics.caution("difference", *numbers, row.difference))
        self.cautions += [text for text in said if text and text not in self.cautions]


def _kid(
    judgement: Judgement, key: str, title: str, sides: Sides, groups: Sequence[Any] | None
) -> None:
    base = difference = None
    if sides.base is not None:
        base = metrics.kid(sides.real, sides.base, groups)
        difference = metrics.kid_difference(sides.real, sides.base, sides.lora, groups)
    score = metrics.kid(sides.real, sides.lora, groups)
    judgement.add(Row(key, f"{title} × 10³", score, base, difference, 1000.0), "kid", sides)


def on_plain_network(
    judgement: Judgement,
    extractor: Extractor,
    sides: Sides,
    groups: Sequence[Any] | None,
    names: Callable[[str, int], str],
) -> None:
    """KID, variety and closeness to training images on a network of general use. Raises
    MetricsError. `names(side, row)` says the file of a row of "lora" or "training"."""
    key, on = extractor.key, f"on {extractor.name}"
    _kid(judgement, f"kid_{key}", f"KID {on}", sides, groups)
    base = difference = None
    if sides.base is not None:
        base = metrics.diversity(sides.base, groups)
        difference = metrics.diversity_difference(sides.base, sides.lora, groups)
    variety = metrics.diversity(sides.lora, groups)
    of_real = metrics.diversity(sides.real).value
    judgement.rows.append(
        Row(
            f"diversity_{key}",
            f"Diversity {on}",
            variety,
            base,
            difference,
            better="",
            note=f"real pictures {of_real:.3g}",
        )
    )
    if sides.training is not None and len(sides.training) > 1:
        _nearest(judgement, extractor, sides, groups, names)


def _nearest(
    judgement: Judgement,
    extractor: Extractor,
    sides: Sides,
    groups: Sequence[Any] | None,
    names: Callable[[str, int], str],
) -> None:
    assert sides.training is not None
    distances, which = metrics.nearest(sides.lora, sides.training)
    normal, _ = metrics.nearest_other(sides.training)
    close = int((metrics.closeness(distances, normal) < _RARE).sum())
    base = difference = None
    if sides.base is not None:
        of_base, _ = metrics.nearest(sides.base, sides.training)
        base = metrics.mean_score(of_base, groups)
        difference = metrics.paired_difference(of_base, distances, groups)
    judgement.rows.append(
        Row(
            f"nearest_{extractor.key}",
            f"Distance to the nearest training image on {extractor.name}",
            metrics.mean_score(distances, groups),
            base,
            difference,
            better="",
            note=f"training images of each other {normal.mean():.3g}; {close} of {len(distances)} "
            f"pictures are nearer to one than {100 - 100 * _RARE:.0f} % of these are",
        )
    )
    for row in np.argsort(distances)[:_SHOWN_NEAREST]:
        judgement.nearest.append(
            {
                "picture": names("lora", int(row)),
                "training_image": names("training", int(which[row])),
                "distance": float(distances[row]),
                "network": extractor.key,
            }
        )


def on_inception(judgement: Judgement, sides: Sides, groups: Sequence[Any] | None) -> None:
    """FID and KID as they are published. Raises MetricsError."""
    _kid(judgement, "kid", "KID", sides, groups)
    fid = metrics.frechet_distance(sides.real, sides.lora)
    base = None if sides.base is None else metrics.frechet_distance(sides.real, sides.base)
    halves = "unknown"
    if len(sides.real) >= 4:
        halves = f"{metrics.fid_of_halves(sides.real):.4g}"
    note = (
        f"of {len(sides.lora)} and {len(sides.real)} pictures, clean-fid resize; two halves of the "
        f"real ones {halves}"
    )
    judgement.add(Row("fid", "FID", fid, base, note=note), "fid", sides)


def on_clip(
    judgement: Judgement,
    sides: Sides,
    scored: Sides | None,
    texts: np.ndarray | None,
    groups: Sequence[Any] | None,
) -> None:
    """CMMD, and the CLIP score where the prompts are known: `scored` holds the embeddings with its
    preprocessing, `texts` those of the prompts. Raises MetricsError."""
    base = difference = None
    if sides.base is not None:
        base = metrics.cmmd(sides.real, sides.base, groups)
        difference = metrics.cmmd_difference(sides.real, sides.base, sides.lora, groups)
    score = metrics.cmmd(sides.real, sides.lora, groups)
    judgement.add(Row("cmmd", "CMMD (unbiased)", score, base, difference), "cmmd", sides)
    if scored is None or texts is None:
        return
    values = metrics.clip_scores(scored.lora, texts)
    base = difference = None
    if scored.base is not None:
        of_base = metrics.clip_scores(scored.base, texts)
        base = metrics.mean_score(of_base, groups)
        difference = metrics.paired_difference(of_base, values, groups)
    row = Row(
        "clip_score",
        "CLIP score",
        metrics.mean_score(values, groups),
        base,
        difference,
        better="higher",
    )
    judgement.rows.append(row)


def table(judgement: Judgement) -> list[tuple[str, str, str, str, str]]:
    """Rows of text: score, LoRA, base, difference, note."""
    found = [("", "LoRA", "base", "difference", "")]
    for row in judgement.rows:
        cells = [_text(score, row.factor) for score in (row.lora, row.base, row.difference)]
        note = row.note or {"lower": "lower is better", "higher": "higher is better"}.get(
            row.better, ""
        )
        found.append((row.title, cells[0], cells[1], cells[2], note))
    return found


def _text(score: Score | float | None, factor: float) -> str:
    if score is None:
        return "–"
    if isinstance(score, Score):
        value, lower, upper = (
            f"{factor * number:.4g}" for number in (score.value, score.lower, score.upper)
        )
        return f"{value} ({lower} to {upper})"
    return f"{factor * score:.4g}"
