"""Checkpoints of a run: everything that the next step depends on, and nothing of the base.

A safetensors file of flat float32 vectors: with AdamW the weights, their average and two moments,
so about four times the LoRA's size, and a few scalars. What a sample shows follows from its number,
so no state of a random generator is needed. Needs no MindSpore.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import RunConfig
from weights import files
from weights.files import WeightsError

FORMAT_VERSION = 2
_HEADER = "ascend_lora_checkpoint"
_NAME = re.compile(r"step_(\d{8})\.safetensors")

_FREE = re.compile(
    r"output|registry|cache|micro_batch|gradient_checkpointing|flash_attention|save_every"
    r"|keep_checkpoints|validate_every|patience|cluster.*|samples.*|evaluation.*|base\.weights|data\.validation"
    r"|data\.train\.\d+\.folder"
)
"""Config keys that do not change what is computed, or that digests speak for."""


@dataclass(frozen=True)
class Validation:
    """The validation losses so far; each None while nothing was measured."""

    before: float | None = None
    """Of the base."""
    last: float | None = None
    best: float | None = None
    best_step: int | None = None
    """Not counting the base."""
    not_better: int = 0
    """How many in a row were no better than the best."""

    def with_loss(self, loss: float, step: int) -> Validation:
        """With one more measurement; the first, at step 0, is of the base."""
        if step == 0:
            return Validation(before=loss, last=loss)
        if math.isfinite(loss) and (self.best is None or loss < self.best):
            return Validation(self.before, loss, loss, step)
        return replace(self, last=loss, not_better=self.not_better + 1)


@dataclass(frozen=True)
class State:
    """Where a run was, beside its vectors."""

    step: int
    """Optimizer steps done."""
    images: int
    """Samples seen."""
    parameters: tuple[tuple[str, int], ...]
    """Name and size of each trained tensor, in the vectors' order."""
    config: Mapping[str, Any]
    base_digest: str
    data_digest: str
    seconds: float
    """Of training, over all attempts."""
    validation: Validation
    format_version: int = FORMAT_VERSION


def save(folder: Path, state: State, vectors: Mapping[str, np.ndarray], keep: int) -> Path:
    """Write the checkpoint of a step, whole or not at all; the last `keep` and the best stay.

    Raises WeightsError if the disk is full; the ones before are then still there.
    """
    path = path_of(folder, state.step)
    files.dump(path, vectors, {_HEADER: json.dumps(asdict(state))})
    best = state.validation.best_step
    for old in all_of(folder)[:-keep]:
        if best is None or old != path_of(folder, best):
            old.unlink(missing_ok=True)
    return path


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return folder / f"step_{step:08d}.safetensors"


def all_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    return sorted(path for path in folder.glob("step_*") if _NAME.fullmatch(path.name))


def newest(folder: Path) -> tuple[Path, State] | None:
    """The last checkpoint that is complete; None if there is none."""
    for path in reversed(all_of(folder)):
        try:
            return path, read_state(path)
        except WeightsError:
            continue
    return None


def read_state(path: Path) -> State:
    """Everything of a checkpoint but its vectors; WeightsError if it is damaged or another file."""
    file = files.open_tensors(path)
    try:
        values = json.loads(file.metadata[_HEADER])
        parameters = tuple((str(name), int(size)) for name, size in values.pop("parameters"))
        validation = Validation(**values.pop("validation"))
        state = State(parameters=parameters, validation=validation, **values)
        size = file.entries["weights"].shape
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path}: expected a checkpoint of this program, found another file; name another one"
        ) from error
    if state.format_version != FORMAT_VERSION or size != (sum(s for _, s in parameters),):
        raise WeightsError(
            f"{path}: this checkpoint is of format {state.format_version}, or does not fit itself; "
            "resume with the version that wrote it"
        )
    return state


def read_vectors(path: Path) -> dict[str, np.ndarray]:
    """The vectors, by name, float32."""
    return files.load(path)


def changes(state: State, config: RunConfig, base_digest: str, data_digest: str) -> list[str]:
    """What would make a resumed run another one, in words: "lora.rank was 8, is 16"."""
    found = []
    before, now = _flat(state.config), _flat(config.model_dump(mode="json"))
    for key in sorted(before.keys() | now.keys()):
        if not _FREE.fullmatch(key) and before.get(key) != now.get(key):
            found.append(f"{key} was {before.get(key)!r}, is {now.get(key)!r}")
    if state.base_digest != base_digest:
        found.append(f"the base was {state.base_digest[:12]}…, is {base_digest[:12]}…")
    if state.data_digest != data_digest:
        found.append(f"the training data was {state.data_digest[:12]}…, is {data_digest[:12]}…")
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
