"""The whole of `lora-eval`: from a LoRA, prompts and real pictures to scores."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion.prompts import emphasis
from sampler.drawing import passes, use_device
from sampler.errors import SampleError
from sampler.judge import (
    Judgement,
    Sides,
    nearest_training,
    on_clip_score,
    on_cmmd,
    on_inception,
    on_plain_network,
)
from sampler.metrics import MetricsError
from sampler.picture import is_sheet, make_folder, read_record
from sampler.plan import Panel
from sampler.progress import shown
from sampler.sample import Drawn, Request, Where, draw_tasks, plan, write_sheet
from sampler.telemetry import counted
from weights.files import atomic_path

if TYPE_CHECKING:
    from sampler.features import Extractor

SCORES, EVALUATION, SHEET = "scores.json", "evaluation.json", "sheet.png"
_AT_ONCE = 64
"""Pictures in memory."""
_ON_SHEET = 8


@dataclass(frozen=True)
class Against:
    """What pictures are compared with, and on what."""

    real: Path
    training: Sequence[Path] = ()
    inception: Path | None = None
    clip: Path | None = None


@dataclass(frozen=True)
class Images:
    """Image files, and of each what it shows, where that is known."""

    paths: tuple[Path, ...]
    captions: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __add__(self, other: Images) -> Images:
        return Images(self.paths + other.paths, self.captions + other.captions)


@dataclass(frozen=True)
class Pictures:
    """The pictures of a LoRA and of the base, of the same prompts and seeds, row by row."""

    lora: list[Path]
    base: list[Path] | None
    prompts: list[str] | None
    """Of each picture; None if nothing says them."""
    spec: Mapping[str, Any]
    """How they were drawn."""
    device_target: str | None = None
    """Where; None if not here."""

    @property
    def groups(self) -> list[str] | None:
        """Which pictures share a prompt; None if nothing says it, or all do."""
        if self.prompts is None or len(set(self.prompts)) < 2:
            return None
        return self.prompts


@dataclass
class Evaluated:
    """What came of it."""

    judgement: Judgement
    evaluation: dict[str, Any]
    folder: Path
    sheet: Path | None = None
    files: list[Path] = field(default_factory=list)


def draw_pictures(request: Request, where: Where) -> tuple[Pictures, Drawn]:
    """Draw every prompt with the LoRA and with the base alone, but for what is there already.

    The base's pictures go to OUT/base, and serve all LoRAs. Raises as `sample` does, and
    SampleError if a picture came out as NaN.
    """
    planned = plan(replace(request, compare=False), where)
    panels, loras = planned.panels, list(planned.loras.values())
    name = re.sub(r"[^A-Za-z0-9@._-]+", "-", panels[0].row)
    with_lora = [(panel.picture, where.out / name / panel.file) for panel in panels]
    without = [
        (replace(panel.picture, loras=()), where.out / "base" / panel.file) for panel in panels
    ]
    tasks = [*passes(without), *passes(with_lora)]
    bad = draw_tasks(tasks, planned.setup, loras, where)
    if bad:
        raise SampleError(
            f"{len(bad)} pictures came out as NaN, the first being {bad[0]}; use --precision fp32, "
            "or a smaller weight of the LoRA"
        )
    lines = [json.dumps([line.text, dict(line.settings)]) for line in request.prompts]
    setup = planned.setup
    spec = {
        "prompts": len(request.prompts),
        "prompts_sha256": _text_digest(lines),
        "images_per_prompt": request.per_prompt,
        "seed": request.seed,
        "steps": request.steps,
        "solver": request.solver,
        "spacing": request.spacing,
        "eta": request.eta,
        "scale": request.scale,
        "rescale": request.rescale,
        "negative": request.negative,
        "width": panels[0].picture.width,
        "height": panels[0].picture.height,
        "weights": [weight for _, weight in request.loras],
        "base_digest": setup.base_digest,
        "precision": setup.precision,
    }
    drawn = replace(
        planned,
        panels=[
            Panel(picture, os.path.relpath(path, where.out), "", row, panel.block)
            for panel, plain, full in zip(panels, without, with_lora, strict=True)
            for row, (picture, path) in (("base", plain), (panel.row, full))
        ],
    )
    pictures = Pictures(
        [path for _, path in with_lora],
        [path for _, path in without],
        [panel.picture.prompt for panel in panels],
        spec,
        setup.device_target,
    )
    return pictures, drawn


def given_pictures(
    folder: Path, base: Path | None, prompts: Sequence[str] | None, per_prompt: int
) -> Pictures:
    """Pictures that are there already, in the order of their names; those of the base pair with
    them. Prompts are what the pictures say themselves, unless they are told.

    Raises SampleError if the numbers do not match.
    """
    lora = list(images_in(folder).paths)
    of_base = list(images_in(base).paths) if base else None
    if of_base is not None and len(of_base) != len(lora):
        raise SampleError(
            f"{base} has {len(of_base)} pictures and {folder} has {len(lora)}; they are compared "
            "one by one, so draw the same prompts and seeds with both"
        )
    if prompts is not None and len(prompts) * per_prompt != len(lora):
        raise SampleError(
            f"{len(prompts)} prompts with {per_prompt} pictures each do not match the {len(lora)} "
            f"pictures in {folder}; give the prompts they were drawn from, or leave them out"
        )
    texts = [text for text in prompts for _ in range(per_prompt)] if prompts is not None else None
    if texts is None:
        texts = _said_prompts(lora)
    spec = {"prompts_sha256": _text_digest(texts)} if texts else {}
    return Pictures(lora, of_base, texts, spec)


def _text_digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _said_prompts(paths: Sequence[Path]) -> list[str] | None:
    found = []
    for path in paths:
        values = read_record(path) if path.suffix == ".png" else None
        if values is None or not isinstance(values.get("prompt"), str):
            return None
        found.append(values["prompt"])
    return found


def images_in(place: Path) -> Images:
    """The images of a folder, by name, each with what the .txt beside it says; sheets and masks are
    left out. Or those that a JSON file lists, as [{"file": …, "caption": …}]. Raises SampleError
    if there are none."""
    if place.suffix == ".json":
        return _listed(place)
    from diffusion.images import EXTENSIONS

    try:
        found = sorted(place.iterdir())
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        problem = "there is no such folder" if missing else error.strerror
        raise SampleError(f"{place}: {problem}; name a folder of pictures") from error
    paths = [
        path
        for path in found
        if path.suffix.lower() in EXTENSIONS
        and not path.name.startswith(".")
        and not path.stem.endswith(".mask")
        and not (path.suffix == ".png" and is_sheet(path))
    ]
    if not paths:
        raise SampleError(
            f"{place}: expected pictures ({', '.join(EXTENSIONS)}), found none; check the path"
        )
    return Images(tuple(paths), tuple(map(_caption, paths)))


def _caption(path: Path) -> str | None:
    try:
        return " ".join(path.with_suffix(".txt").read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        return None


def _listed(place: Path) -> Images:
    try:
        rows = json.loads(place.read_text(encoding="utf-8"))
        found = [(Path(row["file"]), row.get("caption")) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SampleError(
            f'{place}: expected a JSON list of {{"file": …, "caption": …}}; write it as one'
        ) from error
    if not found:
        raise SampleError(f"{place}: it lists no pictures; name some")
    return Images(tuple(path for path, _ in found), tuple(text for _, text in found))


def digest_of(paths: Sequence[Path]) -> str:
    """One SHA-256 for the bytes of all files, whatever their names and order."""
    from weights.files import sha256

    return hashlib.sha256("".join(sorted(sha256(path) for path in paths)).encode()).hexdigest()


@dataclass(frozen=True)
class Judge:
    """What pictures are compared with, read and looked at, and the networks to do it on."""

    real: Images
    training: Images | None
    inception: Path | None
    clip: Path | None


def judge_of(against: Against) -> Judge:
    """Look at everything that is compared with, before hours of drawing and not after.

    Raises SampleError with what is missing or does not decode, WeightsError for files of weights
    that are not what they should be.
    """
    from sampler import features

    real = images_in(against.real)
    if len(real) < 2:
        raise SampleError(f"{against.real}: expected at least 2 real pictures, found {len(real)}")
    training = None
    for folder in against.training:
        training = images_in(folder) if training is None else training + images_in(folder)
    _check_readable([*real.paths, *(training.paths if training else ())])
    if against.inception:
        features.check_inception(against.inception)
    if against.clip:
        features.check_clip(against.clip)
    return Judge(real, training, against.inception, against.clip)


def evaluate(pictures: Pictures, judge: Judge, out: Path, cache: Path) -> Evaluated:
    """Score pictures, and write scores.json and evaluation.json into `out`.

    Features are kept in `cache`, by what they follow from. Raises SampleError, WeightsError.
    """
    from diffusion.images import DataError

    try:
        return _evaluate(pictures, judge, out, cache)
    except (DataError, MetricsError) as error:
        raise SampleError(str(error)) from error


def _evaluate(pictures: Pictures, judge: Judge, out: Path, cache: Path) -> Evaluated:
    from sampler import features
    from sampler.inception import PUBLISHED

    use_device("CPU" if pictures.device_target is None else pictures.device_target)
    judgement = Judgement()
    common = {
        **{key: value for key, value in pictures.spec.items() if value not in (None, "")},
        "pictures": len(pictures.lora),
        "real": {"pictures": len(judge.real), "sha256": digest_of(judge.real.paths)},
    }
    evaluation: dict[str, Any] = {}
    groups = pictures.groups
    alone = [f"\0{number}" for number in range(len(judge.real))]
    shown_too = set(groups or ())
    real_groups = [
        text if text is not None and text in shown_too else own
        for text, own in zip(judge.real.captions, alone, strict=True)
    ]

    def sides(extractor: Extractor, training: Images | None = None) -> Sides:
        real, lora, base, trained_on = (
            None if paths is None else _features(extractor, paths, cache)
            for paths in (
                judge.real.paths,
                pictures.lora,
                pictures.base,
                training.paths if training else None,
            )
        )
        assert real is not None and lora is not None
        return Sides(real, None if groups is None else real_groups, lora, base, trained_on)

    def measured(before: int, extractor: Extractor, **facts: Any) -> None:
        """Say of the rows since `before` how they were measured."""
        keys = [row.key for row in judgement.rows[before:]]
        if keys:
            network = {k: v for k, v in extractor.identity().items() if k != "key"}
            evaluation[keys[0]] = {"metrics": keys, **common, "network": network, **facts}

    lite = features.efficientnet()
    seen = sides(lite, judge.training)
    on_plain_network(judgement, lite, seen, groups)
    measured(0, lite)
    if judge.training is not None and len(judge.training) > 1:
        before = len(judgement.rows)
        names = [[path.name for path in paths] for paths in (pictures.lora, judge.training.paths)]
        nearest_training(judgement, lite, seen, groups, *names)
        digest = digest_of(judge.training.paths)
        about = {"pictures": len(judge.training), "sha256": digest}
        measured(before, lite, training=about)
    if judge.inception:
        before, inception = len(judgement.rows), features.inception(judge.inception)
        published = any(inception.digest.startswith(prefix) for prefix, _ in PUBLISHED.values())
        on_inception(judgement, inception, published, sides(inception), groups)
        measured(before, inception)
    if judge.clip:
        before, clip = len(judgement.rows), features.clip(judge.clip)
        on_cmmd(judgement, sides(clip), groups)
        measured(before, clip)
        if pictures.prompts is not None and clip.captions is not None:
            before, scorer = len(judgement.rows), features.for_clip_score(clip)
            plain = ["".join(text for text, _ in emphasis(one)) for one in pictures.prompts]
            on_clip_score(judgement, sides(scorer), clip.captions(plain), groups)
            measured(before, scorer)
    evaluated = Evaluated(judgement, evaluation, out)
    _write(out / SCORES, judgement.as_metrics())
    _write(out / EVALUATION, evaluated.evaluation)
    return evaluated


def _check_readable(paths: Sequence[Path]) -> None:
    """Raise SampleError with every file that does not decode, before anything is computed."""
    from diffusion.images import DataError, open_image

    problems = []
    for path in paths:
        try:
            open_image(path)
        except DataError as error:
            problems.append(str(error))
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise SampleError("; ".join(problems[:3]) + more)


def _features(extractor: Extractor, paths: Sequence[Path], cache: Path) -> np.ndarray:
    """Features (len(paths), d), from the cache if they are there."""
    from diffusion.images import read_whole
    from weights.files import sha256

    digests = [sha256(path) for path in paths]
    facts = json.dumps([extractor.identity(), digests], sort_keys=True)
    file = cache / f"{hashlib.sha256(facts.encode()).hexdigest()}.npy"
    if file.is_file():
        try:
            found: np.ndarray = np.load(file, allow_pickle=False)
            if found.shape == (len(paths), extractor.dimensions):
                return found
        except (ValueError, OSError):
            pass  # cut off by a power failure: computed anew
    parts, count = [], counted("judged")
    with shown(f"pictures seen by {extractor.name}", len(paths)) as progress:

        def tell(more: int) -> None:
            count(more)
            progress(more)

        for start in range(0, len(paths), _AT_ONCE):
            pixels = [read_whole(path) for path in paths[start : start + _AT_ONCE]]
            parts.append(extractor(pixels, tell))
    found = np.concatenate(parts)
    make_folder(cache)
    with atomic_path(file) as part, part.open("wb") as stream:
        np.save(stream, found, allow_pickle=False)
    return found


def _write(path: Path, values: Any) -> None:
    make_folder(path.parent)
    with atomic_path(path) as part:
        part.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")


def evaluate_lora(request: Request, where: Where, against: Against) -> Evaluated:
    """Draw, score, and put the first pictures on a sheet. Raises as its parts do."""
    judge = judge_of(against)
    pictures, drawn = draw_pictures(request, where)
    folder = pictures.lora[0].parent
    evaluated = evaluate(pictures, judge, folder, where.out / "features")
    evaluated.sheet = folder / SHEET
    first = drawn.panels[: 2 * _ON_SHEET * request.per_prompt]
    write_sheet(replace(drawn, panels=first), evaluated.sheet, True, False)
    return evaluated
