"""What a run does about steps that fail, wishes to stop, and processes that drift apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest

from trainer.events import Events
from trainer.journal import MOST_SKIPPED, DivergedError, Journal
from trainer.loop import _check_agreement


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    plan = SimpleNamespace(steps=100, global_batch=4)
    return Journal(plan, Events(tmp_path, 0), seconds_before=0.0)


def result(loss: float = 0.5, applied: bool = True, stop: int = 0) -> ms.Tensor:
    return ms.Tensor([loss, 1.0, float(applied), 1e-4, 1.0, stop], ms.float32)


def steps(journal: Journal) -> list[dict]:
    lines = journal.events.path.read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "step"]


def test_a_step_is_reported_when_the_next_is_under_way(journal: Journal) -> None:
    journal.add(0, result(0.5), compiled=True)
    journal.settle(1)
    assert not journal.events.path.exists()
    journal.add(1, result(0.25))
    journal.settle(1)
    assert [event["step"] for event in steps(journal)] == [1]
    with journal.apart("validating"):
        assert [event["loss"] for event in steps(journal)] == [0.5, 0.25]


def test_a_few_bad_steps_are_passed_over(journal: Journal) -> None:
    for number in range(3 * MOST_SKIPPED):
        journal.add(number, result(np.nan, applied=number % MOST_SKIPPED == 0))
    journal.settle(0)
    assert journal.skipped == 3 * (MOST_SKIPPED - 1)


def test_too_many_in_a_row_end_the_run(journal: Journal) -> None:
    journal.add(0, result())
    for number in range(1, MOST_SKIPPED + 1):
        journal.add(number, result(np.nan, applied=False))
    with pytest.raises(DivergedError, match=f"not finite for {MOST_SKIPPED} steps in a row"):
        journal.settle(0)


def test_one_process_that_is_asked_to_stop_stops_all(journal: Journal) -> None:
    journal.add(0, result())
    journal.add(1, result(stop=1))
    journal.settle(1)
    assert not journal.stop
    journal.settle(0)
    assert journal.stop


def test_ranks_that_hold_other_weights_are_named() -> None:
    """One of four processes lost a bit; the rows are what they would gather."""
    good, bad = np.ones(3, np.float32), np.array([1, 1, 1.0000001], np.float32)
    rows = [
        np.frombuffer(hashlib.sha256(w.tobytes()).digest(), np.uint8)
        for w in (good, bad, good, good)
    ]
    group = SimpleNamespace(gather=lambda row: np.stack(rows).astype(np.float32))
    with pytest.raises(DivergedError, match="after step 7 the weights of rank 1 are not those"):
        _check_agreement(group, good, 7)
    rows[1] = rows[0]
    _check_agreement(group, good, 7)
