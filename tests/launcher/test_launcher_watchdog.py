"""Who hangs, who is slow, and whether to start again: the decisions, without processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import Failure
from launcher.failures import innermost, of_hang
from launcher.restarts import HEALTHY_SECONDS, Failed, decide
from launcher.watchdog import ENDED, Hang, Sign, Stragglers, hang, read_signs
from trainer.config import ClusterConfig
from trainer.events import Events

LIMITS = ClusterConfig(start_seconds=100, step_seconds=10, checkpoint_seconds=50)


def training(mark: int, age: float) -> Sign:
    return Sign("training", mark, age, None)


@pytest.mark.parametrize(
    ("signs", "found"),
    [
        ({0: training(7, 9), 1: training(7, 9)}, None),
        # Rank 0 waits in the all-reduce for rank 1, which has not come to it.
        ({0: training(8, 11), 1: training(7, 11)}, (1,)),
        ({0: training(8, 99), 1: training(7, 9)}, None),
        ({0: training(7, 11), 1: training(7, 12)}, (0, 1)),
        # The others wait while rank 0 saves, for which it has more time.
        ({0: Sign("saving", 7, 40, None), 1: training(8, 40)}, None),
        ({0: Sign("saving", 7, 51, None), 1: training(8, 51)}, (0,)),
        ({0: Sign("compiling", 0, 99, None), 1: Sign("starting", 0, 101, None)}, (1,)),
        ({0: Sign("validating", 4, 101, None), 1: training(5, 101)}, (0,)),
        ({0: Sign("saving", 9, 20, None), 1: Sign(ENDED, 9, 999, None)}, None),
        ({0: Sign(ENDED, 9, 999, None)}, None),
        ({}, None),
    ],
)
def test_who_hangs(signs: dict[int, Sign], found: tuple[int, ...] | None) -> None:
    result = hang(signs, LIMITS)
    assert (result and result.rank_ids) == found


def test_a_hang_in_words(tmp_path: Path) -> None:
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "rank_2.txt").write_text(
        'Thread 0x1 (most recent call first):\n  File "/a/pool.py", line 5 in idle\n\n'
        'Current thread 0x2 (most recent call first):\n  File "/a/data.py", line 77 in read\n'
        '  File "/a/loop.py", line 3 in train\n'
    )
    failure = of_hang(Hang((2, 5), training(3, 12.4), "step_seconds"), tmp_path)
    assert failure.text.startswith(
        "ranks 2, 5 have shown no sign of life for 12 s while training (limit: "
        "cluster.step_seconds), in /a/data.py:77 (read); the stacks of all ranks are in "
    )
    assert innermost(tmp_path / "none.txt") is None


def test_signs_of_a_rank(tmp_path: Path) -> None:
    beats = tmp_path / "beats"
    before = read_signs(beats, [0, 1], started=100.0, now=103.0)
    assert before[1] == Sign("starting", 0, 3.0, None, None)
    events = Events(tmp_path, 1)
    events.phase("training")
    events.beat(mark=12, own=0.25)
    beat = json.loads((beats / "rank_1").read_text())
    found = read_signs(beats, [0, 1], started=100.0, now=beat["time"] + 4)
    assert found[1] == Sign("training", 12, 4.0, 0.25, beat["pid"])
    assert not (tmp_path / "events.jsonl").exists()  # rank 0's


def test_a_slow_rank_is_reported_once() -> None:
    stragglers = Stragglers(factor=1.5)

    def look(*own: float | None) -> list[str]:
        signs = {i: Sign("training", 0, 0, seconds) for i, seconds in enumerate(own)}
        return stragglers.found(signs)

    assert look(None, None, None) == []
    assert look(1.0, 1.1, 2.0) == []
    assert look(1.0, 1.1, 2.0) == []  # the same measurement once more
    assert look(1.01, 1.1, 2.1) == []
    (text,) = look(1.02, 1.1, 2.2)
    assert text.startswith(
        "rank 2 is slow: its own work for a step takes 2.2 s, that of the others"
    )
    assert look(1.03, 1.1, 2.3) == []
    assert look(1.04, 1.1, 1.0) == []
    assert Stragglers(1.5).found({0: Sign("training", 0, 0, 9.0)}) == []


CRASH = Failed(Failure("rank 1 was killed", 137, killed=True), 5)
ERROR = Failed(Failure("rank 1 failed", 1, 'File "a.py", line 3\nRuntimeError: 0x7f at step 12'), 5)
SAME = Failed(Failure("rank 1 failed", 1, 'File "a.py", line 3\nRuntimeError: 0x8a at step 90'), 5)
OTHER = Failed(Failure("rank 1 failed", 1, 'File "b.py", line 9\nOSError: gone'), 5)
BLAMED = Failed(Failure("a.png: no image", 2, "Traceback"), 5)
HEALTHY = Failed(CRASH.failure, HEALTHY_SECONDS)


@pytest.mark.parametrize(
    ("attempts", "most", "pause", "reason"),
    [
        ([CRASH], 0, None, ""),
        ([CRASH], 3, 1.0, ""),
        ([CRASH, CRASH, CRASH], 3, 4.0, ""),
        ([CRASH] * 4, 3, None, "started again 3 times already"),
        ([CRASH] * 40, 99, 60.0, ""),
        ([BLAMED], 3, None, "the input is to blame"),
        ([ERROR], 3, 1.0, ""),
        ([ERROR, SAME], 3, None, "the same error as before"),
        ([ERROR, OTHER], 3, 2.0, ""),
        ([ERROR, CRASH, SAME], 3, 4.0, ""),
        ([CRASH, CRASH, CRASH, HEALTHY], 3, 1.0, ""),
        ([CRASH, CRASH, HEALTHY, CRASH, CRASH], 3, 4.0, ""),
    ],
)
def test_whether_to_start_again(
    attempts: list[Failed], most: int, pause: float | None, reason: str
) -> None:
    decision = decide(attempts, most)
    assert (decision.pause, reason in decision.reason) == (pause, True), decision
