"""Checkpoints of a run: everything that the next step depends on, and nothing of the base.

A safetensors file of four flat float32 vectors (weights, their average, AdamW's two moments), so
about four times the LoRA's size. What a sample shows follows from its number, so no state of a
random generator is needed. Needs no MindSpore.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import RunConfig
from weights import files
from weights.files import WeightsError

FORMAT_VERSION = 1
VECTORS = ("weights", "average", "moment1", "moment2")
_HEADER = "ascend_lora_checkpoint"
_NAME = re.compile(r"step_(\d{8})\.safetensors")

_FREE = {"output", "registry", "micro_batch", "save_every", "keep_checkpoints"}
"""Config keys that do not change what is computed."""


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
    validation_loss_before: float | None
    seconds: float
    """Of training, over all attempts."""
    format_version: int = FORMAT_VERSION


def save(folder: Path, state: State, vectors: Mapping[str, np.ndarray], keep: int) -> Path:
    """Write the checkpoint of a step, whole or not at all, then remove all but the last `keep`.

    Raises WeightsError if the disk is full; the ones before are then still there.
    """
    path = folder / f"step_{state.step:08d}.safetensors"
    files.dump(path, vectors, {_HEADER: json.dumps(asdict(state))})
    for old in all_of(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


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
        state = State(parameters=parameters, **values)
        sizes = {file.entries[name].shape for name in VECTORS}
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path}: expected a checkpoint of this program, found another file; name another one"
        ) from error
    if state.format_version != FORMAT_VERSION or sizes != {(sum(s for _, s in parameters),)}:
        raise WeightsError(
            f"{path}: this checkpoint is of format {state.format_version}, or does not fit itself; "
            "resume with the version that wrote it"
        )
    return state


def read_vectors(path: Path) -> dict[str, np.ndarray]:
    """The four vectors, by name, float32."""
    return files.load(path)


def changes(state: State, config: RunConfig, base_digest: str, data_digest: str) -> list[str]:
    """What would make a resumed run another one, in words: "lora.rank was 8, is 16"."""
    found = []
    before, now = _flat(state.config), _flat(config.model_dump(mode="json"))
    for key in sorted(before.keys() | now.keys()):
        if key.partition(".")[0] in _FREE or key == "base.weights":
            continue
        if before.get(key) != now.get(key):
            found.append(f"{key} was {before.get(key)!r}, is {now.get(key)!r}")
    if state.base_digest != base_digest:
        found.append(f"the base was {state.base_digest[:12]}…, is {base_digest[:12]}…")
    if state.data_digest != data_digest:
        found.append(f"the training data was {state.data_digest[:12]}…, is {data_digest[:12]}…")
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
