"""Checkpoints: whole or not at all, the last ones kept, and what makes a run another one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainer import checkpoint
from trainer.checkpoint import State, Validation
from trainer.config import RunConfig
from weights.files import WeightsError

ROOT = Path(__file__).parents[2]
CONFIG = RunConfig.model_validate(
    {
        "name": "x",
        "base": {"weights": "base"},
        "data": {"train": "images"},
        "epochs": 3,
        "global_batch": 4,
    }
)


def state(step: int, best: int | None = None) -> State:
    return State(
        step=step,
        images=4 * step,
        parameters=(("unet.a.lora_down.weight", 6), ("unet.a.lora_up.weight", 4)),
        config=CONFIG.model_dump(mode="json"),
        base_digest="b" * 64,
        data_digest="d" * 64,
        seconds=1.5,
        validation=Validation(before=0.5, last=0.4, best=0.3, best_step=best),
    )


def vectors(value: float) -> dict[str, np.ndarray]:
    names = ("weights", "average", "moment1", "moment2")
    return {name: np.full(10, value + i, np.float32) for i, name in enumerate(names)}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(3), vectors(1), keep=2)
    assert checkpoint.newest(tmp_path) == (path, state(3))
    for name, vector in checkpoint.read_vectors(path).items():
        np.testing.assert_array_equal(vector, vectors(1)[name])


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        checkpoint.save(tmp_path, state(step), vectors(step), keep=2)
    names = [path.name for path in checkpoint.all_of(tmp_path)]
    assert names == ["step_00000010.safetensors", "step_00000012.safetensors"]


def test_the_best_one_is_kept_as_well(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        checkpoint.save(tmp_path, state(step, best=4 if step >= 4 else None), vectors(step), keep=2)
    assert [int(path.stem[5:]) for path in checkpoint.all_of(tmp_path)] == [4, 8, 10]
    checkpoint.save(tmp_path, state(12, best=12), vectors(12), keep=2)
    assert [int(path.stem[5:]) for path in checkpoint.all_of(tmp_path)] == [10, 12]


def test_validation_remembers_the_best_and_counts_what_is_no_better() -> None:
    seen = Validation()
    for step, loss in enumerate([0.9, 0.8, 0.85, 0.8, 0.7, 0.9]):
        seen = seen.with_loss(loss, 10 * step)
    assert seen == Validation(before=0.9, last=0.9, best=0.7, best_step=40, not_better=1)
    assert Validation(before=0.9).with_loss(float("nan"), 10).best is None


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """A real write that the kernel refuses half-way, in a process whose files may not grow."""
    script = f"""
import resource, signal, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_trainer_checkpoint import state
from trainer import checkpoint
from weights.files import WeightsError
big = {{"weights": np.ones(10, np.float32), "moment1": np.ones(1 << 20, np.float32)}}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoint.save(Path({str(tmp_path)!r}), state(2), big, keep=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    checkpoint.save(Path({str(tmp_path)!r}), state(4), big, keep=1)
except WeightsError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "step_00000004" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002.safetensors"]


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_damaged_one_is_passed_over(length: int, tmp_path: Path) -> None:
    good = checkpoint.save(tmp_path, state(2), vectors(2), keep=2)
    bad = checkpoint.save(tmp_path, state(4), vectors(4), keep=2)
    bad.write_bytes(bad.read_bytes()[:length])
    found = checkpoint.newest(tmp_path)
    assert found is not None and found[0] == good


def test_none_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere") is None


def test_vectors_of_another_size_are_refused(tmp_path: Path) -> None:
    wrong = vectors(1) | {"weights": np.zeros(9, np.float32)}
    path = checkpoint.save(tmp_path, state(2), wrong, keep=2)
    with pytest.raises(WeightsError, match="does not fit itself"):
        checkpoint.read_state(path)


def test_changes_are_named() -> None:
    values = CONFIG.model_dump()
    values["lora"]["rank"] = 8
    values["epochs"] = 6.0
    values["output"] = "elsewhere"
    values["base"]["weights"] = "moved"
    values["save_every"] = 7
    changed = RunConfig.model_validate(values)
    assert checkpoint.changes(state(2), changed, "b" * 64, "e" * 64) == [
        "epochs was 3.0, is 6.0",
        "lora.rank was 4, is 8",
        "the training data was dddddddddddd…, is eeeeeeeeeeee…",
    ]
    assert checkpoint.changes(state(2), CONFIG, "b" * 64, "d" * 64) == []
    assert checkpoint.changes(state(2), CONFIG, "c" * 64, "d" * 64) == [
        "the base was bbbbbbbbbbbb…, is cccccccccccc…"
    ]
