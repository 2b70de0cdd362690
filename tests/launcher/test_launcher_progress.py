from __future__ import annotations

import dataclasses
import io
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from launcher.job import Job, prepare
from launcher.progress import shown_progress
from launcher.request import Request
from launcher.screen import ranks_text, sparkline
from launcher.watchdog import Sign
from launcher.words import clock, plan_text, seconds_left, step_text

VALIDATION = {"event": "validation", "step": 0, "loss": 0.5, "quarters": [0.2, 0.4, 0.6, 0.8]}
SAID = (
    "validation loss 0.5000 at step 0 (by quarter of the timesteps: 0.2000, 0.4000, 0.6000, 0.8000)"
)
STEP = {"event": "step", "step": 100, "steps": 400, "loss": 0.12345, "images_per_second": 20.0}


@pytest.fixture
def job(config: Path) -> Job:
    return prepare(Request(config, device_target="CPU"), datetime(2025, 1, 2))


def test_step_in_words() -> None:
    assert seconds_left(STEP, 16) == 240
    assert step_text(STEP, 16) == "loss 0.1235, 20 images/s, 4:00 left"
    assert step_text({**STEP, "images_per_second": 0.0}, 16).endswith("time unknown")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.6, "1:02"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def steps(job: Job, count: int) -> list[dict[str, Any]]:
    return [{**STEP, "step": number + 1, "steps": count} for number in range(count)]


def test_lines_where_there_is_no_terminal(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress(job.plan, job.start) as progress:
        progress.show({"event": "phase", "phase": "training"})
        progress.show(VALIDATION)
        for event in steps(job, 100):
            progress.show(event)
        progress.show({"event": "unknown to this version"})
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[:2] == ["training", SAID]
    assert [line.split(":")[0] for line in lines[2:]] == [
        f"step {number} of 100" for number in range(10, 101, 10)
    ]


def test_a_view_that_stays_on_a_terminal(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with shown_progress(job.plan, job.start) as progress:
        progress.show({"event": "phase", "phase": "training"})
        progress.show(VALIDATION)
        for event in steps(job, job.plan.steps):
            progress.show(event)
        progress.note("a [note]")
    shown = terminal.getvalue()
    assert "validation loss" in shown
    assert "a [note]" in shown
    assert "training" in shown
    assert f"{job.plan.steps}/{job.plan.steps}" in shown
    assert "loss 0.1235" in shown
    assert "rank 0 starting" in shown


def test_the_losses_in_blocks() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([]) == ""
    assert sparkline([1, float("nan"), 2]) == "▁ █"
    falling = sparkline([1 / (n + 1) for n in range(1000)])
    assert (len(falling), falling[0], falling[-1]) == (32, "█", "▁")


def test_ranks_of_one_kind_are_told_together() -> None:
    signs = {n: Sign("training", 1, 0.1, 0.5 + n / 100) for n in range(8)}
    assert ranks_text(signs) == "ranks 0-7 training; 0.50 to 0.57 s of own work a step"
    signs[3] = Sign("training", 1, 34.2, 0.5)
    assert ranks_text(signs).startswith(
        "ranks 0-2 training; rank 3 training, silent for 34 s; ranks 4-7 training; "
    )


def test_plan_in_words(job: Job) -> None:
    plan = dataclasses.replace(job.plan, devices=2, accumulation=3)
    text = plan_text(dataclasses.replace(job, plan=plan))
    assert "over all 2 devices = 2 × 4 at once × 3 accumulated" in text
    assert "61,448 bytes each step" in text
