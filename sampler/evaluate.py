"""The whole of `lora-eval`: from a LoRA, prompts and real pictures to scores."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sampler.drawing import passes
from sampler.errors import SampleError
from sampler.judge import Judgement, Sides, on_clip, on_inception, on_plain_network
from sampler.metrics import MetricsError
from sampler.picture import read_record
from sampler.plan import Panel
from sampler.progress import shown
from sampler.sample import Drawn, Request, Where, draw_tasks, plan, write_sheet
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
class Pictures:
    """The pictures of a LoRA and of the base, of the same prompts and seeds, row by row."""

    lora: list[Path]
    base: list[Path] | None
    prompts: list[str] | None
    """Of each picture; None if nothing says them."""
    spec: Mapping[str, Any]
    """How they were drawn."""

    @property
    def groups(self) -> list[int] | None:
        """Which pictures share a prompt."""
        if self.prompts is None:
            return None
        known = {text: number for number, text in enumerate(dict.fromkeys(self.prompts))}
        return [known[text] for text in self.prompts]


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
        "prompts_sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
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
    )
    return pictures, drawn


def given_pictures(
    folder: Path, base: Path | None, prompts: Sequence[str] | None, per_prompt: int
) -> Pictures:
    """Pictures that are there already, in the order of their names; those of the base pair with
    them. Prompts are what the pictures say themselves, unless they are told.

    Raises SampleError if the numbers do not match.
    """
    lora = images_in(folder)
    of_base = images_in(base) if base else None
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
    return Pictures(lora, of_base, texts, {"pictures_sha256": digest_of(lora)})


def _said_prompts(paths: Sequence[Path]) -> list[str] | None:
    found = []
    for path in paths:
        values = read_record(path) if path.suffix == ".png" else None
        if values is None or not isinstance(values.get("prompt"), str):
            return None
        found.append(values["prompt"])
    return found


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, by name. Raises SampleError if there are none."""
    from diffusion.images import EXTENSIONS

    try:
        found = sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in EXTENSIONS
            and not path.name.startswith(".")
            and not path.stem.endswith(".mask")
        )
    except OSError as error:
        raise SampleError(
            f"{folder}: expected a folder of pictures, found {error.strerror}; check the path"
        ) from error
    if not found:
        raise SampleError(
            f"{folder}: expected pictures ({', '.join(EXTENSIONS)}), found none; check the path"
        )
    return found


def digest_of(paths: Sequence[Path]) -> str:
    """One SHA-256 for the bytes of all files, whatever their names and order."""
    from weights.files import sha256

    return hashlib.sha256("".join(sorted(sha256(path) for path in paths)).encode()).hexdigest()


def evaluate(pictures: Pictures, against: Against, out: Path, cache: Path) -> Evaluated:
    """Score pictures, and write scores.json and evaluation.json into `out`.

    Features are kept in `cache`, by what they follow from. Raises SampleError, WeightsError.
    """
    from diffusion.images import DataError

    try:
        return _evaluate(pictures, against, out, cache)
    except (DataError, MetricsError) as error:
        raise SampleError(str(error)) from error


def _evaluate(pictures: Pictures, against: Against, out: Path, cache: Path) -> Evaluated:
    from sampler import features

    real = images_in(against.real)
    training = [path for folder in against.training for path in images_in(folder)] or None
    _check_readable([*real, *(training or ())])
    judgement = Judgement()
    networks: list[dict[str, Any]] = []
    sets = {"real": real, "lora": pictures.lora, "base": pictures.base, "training": training}
    groups = pictures.groups

    def sides(extractor: Extractor, also_training: bool = False) -> Sides:
        networks.append(extractor.identity())
        found = {
            name: _features(extractor, paths, cache)
            for name, paths in sets.items()
            if paths is not None and (also_training or name != "training")
        }
        return Sides(found["real"], found["lora"], found.get("base"), found.get("training"))

    def name_of(side: str, row: int) -> str:
        paths = sets[side]
        return paths[row].name if paths else ""

    lite = features.efficientnet()
    on_plain_network(judgement, lite, sides(lite, True), groups, name_of)
    if against.inception:
        on_inception(judgement, sides(features.inception(against.inception)), groups)
    if against.clip:
        clip = features.clip(against.clip)
        known = sides(clip)
        scored = texts = None
        if pictures.prompts is not None and clip.captions is not None:
            from diffusion.prompts import emphasis

            scored = sides(features.for_clip_score(clip))
            plain = ["".join(text for text, _ in emphasis(one)) for one in pictures.prompts]
            texts = clip.captions(plain)
        on_clip(judgement, known, scored, texts, groups)
    spec: dict[str, Any] = {
        "metrics": [row.key for row in judgement.rows],
        **{key: value for key, value in pictures.spec.items() if value not in (None, "")},
        "pictures": len(pictures.lora),
        "real": {"pictures": len(real), "sha256": digest_of(real)},
        "networks": {
            f"{one['key']}{f'_{n}' if n else ''}": {k: v for k, v in one.items() if k != "key"}
            for n, one in _numbered(networks)
        },
    }
    if training:
        spec["training"] = {"pictures": len(training), "sha256": digest_of(training)}
    evaluated = Evaluated(judgement, {"pictures": spec}, out)
    _write(out / SCORES, judgement.as_metrics())
    _write(out / EVALUATION, evaluated.evaluation)
    return evaluated


def _numbered(networks: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """Each with how often its key has been there before."""
    seen: dict[str, int] = {}
    found = []
    for one in networks:
        found.append((seen.get(one["key"], 0), one))
        seen[one["key"]] = seen.get(one["key"], 0) + 1
    return found


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
    parts = []
    with shown(f"pictures seen by {extractor.name}", len(paths)) as progress:
        for start in range(0, len(paths), _AT_ONCE):
            pixels = [read_whole(path) for path in paths[start : start + _AT_ONCE]]
            parts.append(extractor(pixels, progress))
    found = np.concatenate(parts)
    cache.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as part, part.open("wb") as stream:
        np.save(stream, found, allow_pickle=False)
    return found


def _write(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:
        part.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")


def evaluate_lora(
    request: Request, where: Where, against: Against, drew: Callable[[], None] = lambda: None
) -> Evaluated:
    """Draw, score, and put the first pictures on a sheet. Raises as its parts do."""
    real = images_in(against.real)
    if len(real) < 2:
        raise SampleError(f"{against.real}: expected at least 2 real pictures, found {len(real)}")
    pictures, drawn = draw_pictures(request, where)
    drew()
    folder = pictures.lora[0].parent
    evaluated = evaluate(pictures, against, folder, where.out / "features")
    shown_panels = drawn.panels[: 2 * _ON_SHEET * request.per_prompt : 1]
    sheet = folder / SHEET
    write_sheet(replace(drawn, panels=shown_panels), sheet, True, False)
    evaluated.sheet = sheet
    return evaluated
