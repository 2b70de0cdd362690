"""Scores of pictures: which are measured on which network, and what to say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sampler import metrics
from sampler.metrics import Score

if TYPE_CHECKING:
    from sampler.features import Extractor

Groups = Sequence[Any] | None
"""Which pictures share a prompt; None if each stands alone."""
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
    real_groups: Groups
    """Of real pictures that show what a prompt says: its group; a label of its own for others."""
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

    def add(self, row: Row, metric: str, sides: Sides, groups: Groups) -> None:
        """A row, and what is to be said of numbers as small as these; pictures of one prompt count
        once. `metric` as `metrics.caution` wants it."""
        self.rows.append(row)
        drawn = len(sides.lora) if groups is None else len(set(groups))
        numbers = len(sides.real), drawn
        score = row.lora if isinstance(row.lora, Score) else None
        self.say(metrics.caution(metric, *numbers, score))
        if row.difference is not None:
            self.say(metrics.caution("difference", *numbers, row.difference))

    def say(self, text: str | None) -> None:
        """Add a caution, once."""
        if text and text not in self.cautions:
            self.cautions.append(text)


def _kid(judgement: Judgement, key: str, title: str, sides: Sides, groups: Groups) -> None:
    base = difference = None
    if sides.base is not None:
        base = metrics.kid(sides.real, sides.base, groups, sides.real_groups)
        difference = metrics.kid_difference(
            sides.real, sides.base, sides.lora, groups, sides.real_groups
        )
    score = metrics.kid(sides.real, sides.lora, groups, sides.real_groups)
    judgement.add(Row(key, f"{title} × 10³", score, base, difference, 1000.0), "kid", sides, groups)


def on_plain_network(
    judgement: Judgement, extractor: Extractor, sides: Sides, groups: Groups
) -> None:
    """KID and variety on a network of general use. Raises MetricsError."""
    key, on = extractor.key, f"on {extractor.name}"
    _kid(judgement, f"kid_{key}", f"KID {on}", sides, groups)
    base = difference = None
    if sides.base is not None:
        base = metrics.diversity(sides.base, groups)
        difference = metrics.diversity_difference(sides.base, sides.lora, groups)
    variety = metrics.diversity(sides.lora, groups)
    note = f"real pictures {metrics.diversity(sides.real).value:.3g}"
    row = Row(f"diversity_{key}", f"Diversity {on}", variety, base, difference, 1.0, "", note)
    judgement.add(row, "diversity", sides, groups)


def nearest_training(
    judgement: Judgement,
    extractor: Extractor,
    sides: Sides,
    groups: Groups,
    pictures: Sequence[str],
    images: Sequence[str],
) -> None:
    """Closeness to training images. `pictures` and `images` name the rows of LoRA and training.
    Raises MetricsError."""
    assert sides.training is not None
    distances, which = metrics.nearest(sides.lora, sides.training)
    normal, _ = metrics.nearest_other(sides.training)
    close = int((metrics.closeness(distances, normal) < _RARE).sum())
    base = difference = None
    if sides.base is not None:
        of_base, _ = metrics.nearest(sides.base, sides.training)
        base = metrics.mean_score(of_base, groups)
        difference = metrics.paired_difference(of_base, distances, groups)
    row = Row(
        f"nearest_{extractor.key}",
        f"Distance to the nearest training image on {extractor.name}",
        metrics.mean_score(distances, groups),
        base,
        difference,
        better="",
        note=f"training images of each other {normal.mean():.3g}; {close} of {len(distances)} "
        f"pictures are nearer to one than {100 - 100 * _RARE:.0f} % of these are",
    )
    judgement.add(row, "nearest", sides, groups)
    for closest in np.argsort(distances)[:_SHOWN_NEAREST]:
        judgement.nearest.append(
            {
                "picture": pictures[closest],
                "training_image": images[which[closest]],
                "distance": float(distances[closest]),
                "network": extractor.key,
            }
        )


def on_inception(
    judgement: Judgement, extractor: Extractor, published: bool, sides: Sides, groups: Groups
) -> None:
    """FID and KID as they are published; `published` says whether the weights are. Raises
    MetricsError."""
    if not published:
        judgement.say(
            f"{extractor.path.name} (sha256 {extractor.digest[:12]}…) is not a published Inception "
            "of FID, so FID and KID cannot be compared with published ones"
        )
    _kid(judgement, "kid", "KID", sides, groups)
    fid = metrics.frechet_distance(sides.real, sides.lora)
    base = None if sides.base is None else metrics.frechet_distance(sides.real, sides.base)
    note = (
        f"of {len(sides.lora)} and {len(sides.real)} pictures, clean-fid resize, weights "
        f"{extractor.digest[:8]}"
    )
    judgement.add(Row("fid", "FID", fid, base, note=note), "fid", sides, groups)
    if len(sides.real) >= 4:
        halves = metrics.fid_of_halves(sides.real)
        text = "what a perfect LoRA would get of half as many"
        judgement.rows.append(
            Row("fid_of_halves", "FID of two halves of the real", halves, better="", note=text)
        )


def on_cmmd(judgement: Judgement, sides: Sides, groups: Groups) -> None:
    """CMMD of CLIP embeddings. Raises MetricsError."""
    labels = groups, sides.real_groups
    base = difference = None
    if sides.base is not None:
        base = metrics.cmmd(sides.real, sides.base, *labels)
        difference = metrics.cmmd_difference(sides.real, sides.base, sides.lora, *labels)
    score = metrics.cmmd(sides.real, sides.lora, *labels)
    row = Row("cmmd", "CMMD (unbiased)", score, base, difference)
    judgement.add(row, "cmmd", sides, groups)


def on_clip_score(judgement: Judgement, sides: Sides, texts: np.ndarray, groups: Groups) -> None:
    """How pictures and prompts fit: `texts` are the embeddings of the prompts. Raises
    MetricsError."""
    values = metrics.clip_scores(sides.lora, texts)
    base = difference = None
    if sides.base is not None:
        of_base = metrics.clip_scores(sides.base, texts)
        base = metrics.mean_score(of_base, groups)
        difference = metrics.paired_difference(of_base, values, groups)
    score = metrics.mean_score(values, groups)
    row = Row("clip_score", "CLIP score", score, base, difference, better="higher")
    judgement.add(row, "clip_score", sides, groups)


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
