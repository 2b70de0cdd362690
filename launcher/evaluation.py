"""Scores of what was trained: `lora-eval` as the last stage of a run.

What it is to do is written into the attempt's folder first, so that `--resume` can do it later.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.errors import Interrupted, LaunchError
from launcher.job import METRICS_FOLDER, METRICS_VARIABLE, Job
from launcher.processes import end_with_parent
from trainer.config import RunConfig
from trainer.dataset import Example
from trainer.events import write_json

_ARGUMENTS, _SCORES = "evaluate.json", "evaluated.json"
_PROMPTS, _REAL, _TRAINING = "prompts.json", "real.json", "training.json"
FOLDER = "evaluation"
"""In the attempt's folder: pictures, sheets and features."""
_END_SECONDS = 20.0
_FEWEST_PICTURES = 16
"""Of few captions several pictures are drawn, so that there is something to score."""


def problem(config: RunConfig, validation_images: int | None) -> str | None:
    """Why a run is not evaluated; None if it is. `validation_images` is None if they are not at
    hand."""
    wanted = config.evaluation
    if config.train != "lora":
        return "not with `train: all`"
    if wanted is None:
        return "`evaluation` is null"
    if config.data.validation is None and not (wanted.prompts and wanted.real):
        return "there is no `data.validation`, nor `evaluation.prompts` and `real`"
    if wanted.real is None and validation_images is not None and validation_images < 2:
        return f"`data.validation` has {validation_images} images, and 2 are the fewest"
    return None


def prompts_of(captions: Sequence[str], most: int) -> list[str]:
    """The first different captions, as prompts: brackets are no emphasis."""
    return [as_prompt(text) for text in dict.fromkeys(captions)][:most]


def as_prompt(caption: str) -> str:
    """A caption as a prompt, whose brackets are brackets."""
    text = " ".join(caption.split())
    for bracket in "\\()[]":
        text = text.replace(bracket, f"\\{bracket}")
    return text


def arguments(job: Job, artifact: str) -> list[str]:
    """The command line of `lora-eval` for what a run has trained."""
    config, plan, attempt = job.config, job.plan, job.attempt
    wanted = config.evaluation
    assert wanted is not None
    prompts = wanted.prompts or str(attempt / _PROMPTS)
    captions = [example.caption for example in job.data.validation.examples]
    count = len(prompts_of(captions, wanted.most_prompts)) if wanted.prompts is None else 0
    enough = math.ceil(_FEWEST_PICTURES / count) if count else 1
    options: dict[str, object] = {
        "lora": attempt / artifact,
        "base": config.base.weights,
        "model": plan.model,
        "real": wanted.real or attempt / _REAL,
        "prompts": prompts,
        "images-per-prompt": max(wanted.images_per_prompt, enough),
        "seed": wanted.seed,
        "steps": wanted.steps,
        "scale": wanted.scale,
        "batch": wanted.batch,
        "size": config.data.resolution,
        "inception": wanted.inception,
        "clip": wanted.clip,
        "out": attempt / FOLDER,
        "precision": plan.precision,
        "device-target": plan.device_target,
        "devices": ",".join(map(str, job.start.device_ids)),
    }
    given = [f"--{key}={value}" for key, value in options.items() if value is not None]
    return [*given, f"--train={attempt / _TRAINING}", "--json"]


def ask_for(job: Job, artifact: str) -> None:
    """Write down what `evaluate` is to do for a job, if it is to do anything."""
    config, attempt = job.config, job.attempt
    held_out = job.data.validation.examples
    if problem(config, len(held_out)) is not None:
        return
    assert config.evaluation is not None
    captions = [example.caption for example in held_out]
    found = prompts_of(captions, config.evaluation.most_prompts)
    write_json(attempt / _PROMPTS, found)
    write_json(attempt / _REAL, _rows(held_out))
    write_json(attempt / _TRAINING, _rows(job.data.training.examples))
    write_json(attempt / _ARGUMENTS, {"arguments": arguments(job, artifact)})


def _rows(examples: Sequence[Example]) -> list[dict[str, str]]:
    """Images for lora-eval, each once, and what they show."""
    found = {example.path: as_prompt(example.caption) for example in examples}
    return [{"file": str(Path(path).absolute()), "caption": text} for path, text in found.items()]


def is_asked_for(attempt: Path) -> bool:
    """Is an evaluation still to be made?"""
    return (attempt / _ARGUMENTS).is_file() and not (attempt / _SCORES).is_file()


def forget(attempt: Path) -> None:
    """Let there be nothing asked for."""
    (attempt / _ARGUMENTS).unlink(missing_ok=True)


def evaluate(folder: Path, attempt: Path, signals: Sequence[int] = ()) -> dict[str, Any] | None:
    """What `lora-eval --json` says of a run; None if nothing was asked for. It is done once.

    Its progress goes to stderr. `signals` grows with each that this process receives. Raises
    LaunchError if it fails, Interrupted after a signal.
    """
    if is_asked_for(attempt):
        given = json.loads((attempt / _ARGUMENTS).read_text(encoding="utf-8"))["arguments"]
        part = attempt / f"{_SCORES}.part"
        (attempt / METRICS_FOLDER).mkdir(exist_ok=True)
        with part.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "sampler.eval_cli", *given],
                stdin=subprocess.DEVNULL,
                stdout=output,
                env={**os.environ, METRICS_VARIABLE: str(attempt / METRICS_FOLDER)},
                preexec_fn=end_with_parent,
            )
            code = _awaited(process, signals)
        later = f"the LoRA is trained and lies in {attempt}: lora-launch --resume {folder}"
        if signals:
            raise Interrupted(signals[0], f"{later} goes on")
        if code:
            raise LaunchError(
                f"the evaluation ended with exit code {code}; {later} tries again, and with --set "
                "evaluation=null leaves it out"
            )
        json.loads(part.read_text(encoding="utf-8"))
        part.replace(attempt / _SCORES)
    return scores_of(attempt)


def _awaited(process: subprocess.Popen[bytes], signals: Sequence[int]) -> int:
    """Its exit code; after a signal it is asked to end, and then made to."""
    while True:
        try:
            return process.wait(0.2)
        except subprocess.TimeoutExpired:
            if not signals:
                continue
        process.send_signal(signal.SIGINT)
        try:
            return process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def scores_of(attempt: Path) -> dict[str, Any] | None:
    """What `evaluate` has found; None if it has not."""
    path = attempt / _SCORES
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
