"""The command `lora-launch report`: reads a run's folder and writes what is to be looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from launcher.report_parts import Facts, Picture

_MOST_PICTURES = 48
_MOST_BYTES = 8_000_000
"""Of all pictures as they are; more are packed smaller."""
_SUFFIX = ".lora-launch"
"""Of the event files that this command has written, and may replace."""


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN_DIR")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where to write the page. Default: report.html in RUN_DIR.",
)
@click.option(
    "--tensorboard",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write curves and pictures as TensorBoard's event files there; a page only with --out.",
)
def report(run: Path, out: Path | None, tensorboard: Path | None) -> int:
    """Write a page about a run: plan, curves, pictures, scores, lineage and config.

    One HTML file that needs nothing else and can be sent as it is. The run may be at work still.
    Prints what was written.

    \b
    Example:
      lora-launch report runs/emoji-ink-20260101-120000
      lora-launch report --out emoji-ink.html runs/emoji-ink-20260101-120000
      lora-launch report --tensorboard build/board runs/emoji-ink-20260101-120000
    """
    import time

    from launcher.errors import LaunchError
    from launcher.report import report_html

    try:
        facts = read_facts(run, time.time())
        if tensorboard is not None:
            click.echo(_write_events(facts, run, tensorboard))
        if tensorboard is None or out is not None:
            click.echo(_write_page(report_html(facts), out or run / "report.html"))
    except LaunchError as error:
        raise click.ClickException(str(error)) from error
    return 0


def read_facts(folder: Path, now: float) -> Facts:
    """What is known of a run, at a time in Unix seconds.

    Raises LaunchError if the folder is none of a run.
    """
    from launcher.report_parts import Facts
    from launcher.status import course_of, read_attempts, state_of

    attempts = read_attempts(folder)
    last, remarks = attempts[-1].path, list[str]()
    config_text = _text(last / "config.yaml")
    config = _config(config_text) or _published_config(attempts[-1].push)
    steps = _steps_of(folder / "samples", "step_*.png")
    thinned = _thinned(sorted(steps), attempts[-1].result.get("published_step"))
    if len(thinned) < len(steps):
        remarks.append(f"{len(thinned)} of {len(steps)} pictures are shown.")
    pictures = _pictures({step: steps[step] for step in thinned}, remarks)
    prompts = _dict(config, "samples").get("prompts")
    return Facts(
        folder=str(folder),
        attempts=attempts,
        course=course_of(attempts),
        state=state_of(folder, attempts, now),
        config_text=config_text,
        config=config,
        command=_text(last / "command.txt").strip(),
        kept=frozenset(_steps_of(folder / "checkpoints", "step_*.safetensors")),
        pictures=pictures,
        prompts=[str(prompt) for prompt in prompts] if isinstance(prompts, list) else [],
        sheet=_sheet(attempts[-1].path, attempts[-1].scores.get("sheet"), remarks),
        remarks=remarks,
        made=now,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _config(text: str) -> dict[str, Any]:
    """The config; empty if it cannot be read, since its text is shown all the same."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def _published_config(push: dict[str, Any]) -> dict[str, Any]:
    return _dict(_dict(push, "metadata"), "config")


def _dict(values: dict[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _steps_of(folder: Path, pattern: str) -> dict[int, Path]:
    """Files by the step in their names."""
    found = {}
    for path in folder.glob(pattern):
        digits = path.stem.removeprefix("step_")
        if digits.isdigit():
            found[int(digits)] = path
    return found


def _thinned(steps: Sequence[int], published: object) -> list[int]:
    """At most so many steps, evenly, with the first, the last and the published one."""
    if len(steps) <= _MOST_PICTURES:
        return list(steps)
    last = len(steps) - 1
    chosen = {steps[place * last // (_MOST_PICTURES - 1)] for place in range(_MOST_PICTURES)}
    return sorted(chosen | {step for step in steps if step == published})


# ---- pictures


def _pictures(paths: dict[int, Path], remarks: list[str]) -> list[Picture]:
    """The files, or smaller ones where they would be much together."""
    size = sum(path.stat().st_size for path in paths.values() if path.is_file())
    found = []
    for step, path in paths.items():
        picture = _picture(step, path, size > _MOST_BYTES)
        if picture is None:
            remarks.append(f"{path.name} could not be read as a picture.")
        else:
            found.append(picture)
    return found


def _picture(step: int, path: Path, pack: bool) -> Picture | None:
    """A picture whose every pixel could be read."""
    import io

    from PIL import Image

    from launcher.report_parts import Picture

    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            size, kind = image.size, f"image/{str(image.format).lower()}"
            if pack:
                packed = io.BytesIO()
                image.convert("RGB").save(packed, "WEBP", quality=85)
                data, kind = packed.getvalue(), "image/webp"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return Picture(step, kind, data, *size)


def _sheet(attempt: Path, named: object, remarks: list[str]) -> Picture | None:
    """The evaluation's sheet. It is looked for in the attempt alone, wherever the run has been
    when it was drawn: a run that somebody has sent shows no other file of this machine."""
    if not isinstance(named, str):
        return None
    parts = Path(named).parts
    if attempt.name not in parts:
        return None
    path = attempt.joinpath(*parts[parts.index(attempt.name) + 1 :])
    if ".." in parts or not path.is_file():
        return None
    picture = _picture(0, path, path.stat().st_size > 400_000)
    if picture is None:
        remarks.append(f"{path.name} could not be read as a picture.")
    return picture


# ---- writing


def _write_page(text: str, path: Path) -> Path:
    """Write the page, whole or not at all. Raises LaunchError."""
    from launcher.errors import LaunchError
    from registry.files import written_beside

    if path.is_dir():
        raise LaunchError(f"--out {path}: this is a folder, expected the name of a file; change it")
    try:
        with written_beside(path, lambda file: file.write(text.encode())) as part:
            part.replace(path)
    except OSError as error:
        raise LaunchError(
            f"{path}: cannot be written: {error.strerror}; name another file with --out"
        ) from error
    return path


def scalars(facts: Facts) -> Iterator[tuple[str, int, float, float]]:
    """(tag, step, value, Unix time) of every curve."""
    import math

    from launcher.status import number

    names = {
        "loss": "loss/training",
        "learning_rate": "learning_rate",
        "gradient_norm": "gradient_norm",
        "loss_scale": "loss_scale",
        "images_per_second": "images_per_second",
        "memory_bytes": "memory_bytes",
    }
    for event in facts.course.steps:
        for key, tag in names.items():
            if key in event and not math.isnan(number(event, key)):
                yield tag, int(event["step"]), number(event, key), number(event, "time")
    for event in facts.course.validations:
        loss = number(event, "loss")
        if not math.isnan(loss):
            yield "loss/validation", int(event["step"]), loss, number(event, "time")


def _write_events(facts: Facts, run: Path, folder: Path) -> Path:
    """Write event files in place of those of an earlier call. Raises LaunchError."""
    import importlib
    import io
    import math

    import numpy as np
    from PIL import Image

    from launcher.errors import LaunchError

    try:
        tensorboard = importlib.import_module("tensorboardX")
    except ImportError as error:
        raise LaunchError(
            "--tensorboard: needs tensorboardX; install it with: pip install "
            "'ascend-lora[tensorboard]'"
        ) from error
    if folder.exists() and not folder.is_dir():
        raise LaunchError(f"--tensorboard {folder}: expected a folder, found a file; change it")
    earlier = list(folder.glob(f"events.out.tfevents.*{_SUFFIX}"))
    try:
        with tensorboard.SummaryWriter(str(folder), filename_suffix=_SUFFIX) as writer:
            written = Path(writer.file_writer.event_writer._ev_writer._file_name)
            for tag, step, value, when in scalars(facts):
                writer.add_scalar(tag, value, step, when if math.isfinite(when) else facts.made)
            for picture in facts.pictures:
                with Image.open(io.BytesIO(picture.data)) as image:
                    pixels = np.asarray(image.convert("RGB"))
                when = _drawn(run, picture.step) or facts.made
                writer.add_image("samples", pixels, picture.step, when, dataformats="HWC")
            if facts.config_text:
                writer.add_text("config", f"```\n{facts.config_text}\n```", 0, facts.made)
        for path in earlier:
            if path != written:
                path.unlink()
    except OSError as error:
        raise LaunchError(
            f"{folder}: cannot be written: {error.strerror}; name another folder"
        ) from error
    return folder


def _drawn(run: Path, step: int) -> float | None:
    try:
        return (run / "samples" / f"step_{step:08d}.png").stat().st_mtime
    except OSError:
        return None
