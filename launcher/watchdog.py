"""Which ranks still make progress. Each keeps a sign of life in a file; see trainer.events."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import ClusterConfig

ENDED = "ended"
"""Phase of a rank that has done all its work."""
_SLOW_IN_A_ROW = 3


@dataclass(frozen=True)
class Sign:
    """The last that was heard of a rank."""

    phase: str
    mark: int
    """Place in the training loop; the rank that the others wait for has the smallest."""
    age: float
    """Seconds since."""
    own: float | None
    """Seconds that it took for its last measured step, without waiting for the others."""
    pid: int | None = None
    """Of its process; None if it has not said so yet."""


@dataclass(frozen=True)
class Hang:
    """Ranks that have shown no sign of life for too long, and that the others wait for."""

    rank_ids: tuple[int, ...]
    sign: Sign
    """Of the first of them."""
    limit: str
    """The config key that says what too long is."""

    def __str__(self) -> str:
        several = len(self.rank_ids) > 1
        names = ", ".join(map(str, self.rank_ids))
        return (
            f"rank{'s' if several else ''} {names} {'have' if several else 'has'} shown no sign of "
            f"life for {self.sign.age:.0f} s while {self.sign.phase} (limit: cluster.{self.limit})"
        )


def read_signs(
    folder: Path, rank_ids: Iterable[int], started: float, now: float
) -> dict[int, Sign]:
    """The signs of ranks on this machine; times in seconds of time.monotonic().

    A rank that has not written any yet is as old as the run.
    """
    found = {}
    for rank_id in rank_ids:
        beat = _beat(folder, rank_id) or {"phase": "starting", "mark": 0, "own": None}
        beat.setdefault("time", started)
        found[rank_id] = Sign(
            beat["phase"], beat["mark"], now - beat["time"], beat["own"], beat.get("pid")
        )
    return found


def rank_of_process(folder: Path, rank_ids: Iterable[int], pid: int) -> int | None:
    """The rank that was this process; None if it had not come so far as to say so."""
    for rank_id in rank_ids:
        if (_beat(folder, rank_id) or {}).get("pid") == pid:
            return rank_id
    return None


def hang(signs: Mapping[int, Sign], limits: ClusterConfig) -> Hang | None:
    """The ranks that hang, if any do.

    The others wait for them in a collective and are silent as well; only those that are furthest
    behind are asked how long they have been silent.
    """
    at_work = {rank_id: sign for rank_id, sign in signs.items() if sign.phase != ENDED}
    if not at_work:
        return None
    last = min(sign.mark for sign in at_work.values())
    behind = {rank_id: sign for rank_id, sign in at_work.items() if sign.mark == last}
    late = {
        rank_id: sign
        for rank_id, sign in behind.items()
        if sign.age > getattr(limits, _limit(sign.phase))
    }
    if not late:
        return None
    first = late[min(late)]
    return Hang(tuple(sorted(late)), first, _limit(first.phase))


class Stragglers:
    """Finds ranks that are slow again and again, by what their own work takes."""

    def __init__(self, factor: float):
        self.factor = factor
        self._last: dict[int, float] = {}
        self._slow: dict[int, int] = {}

    def found(self, signs: Mapping[int, Sign]) -> list[str]:
        """A sentence for each rank that is slow for the third time in a row."""
        own = {rank_id: sign.own for rank_id, sign in signs.items() if sign.own is not None}
        texts = []
        for rank_id, seconds in own.items():
            others = [value for other, value in own.items() if other != rank_id]
            if not others or self._last.get(rank_id) == seconds:
                continue
            self._last[rank_id] = seconds
            usual = statistics.median(others)
            slow = seconds > self.factor * usual
            self._slow[rank_id] = self._slow.get(rank_id, 0) + 1 if slow else 0
            if self._slow[rank_id] == _SLOW_IN_A_ROW:
                texts.append(
                    f"rank {rank_id} is slow: its own work for a step takes {seconds:.2g} s, that "
                    f"of the others {usual:.2g} s, and they wait for it; look at its device, its "
                    "cores and what else runs there"
                )
        return texts


def _beat(folder: Path, rank_id: int) -> dict[str, Any] | None:
    try:
        beat: dict[str, Any] = json.loads((folder / f"rank_{rank_id}").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # not begun, or empty as yet
        return None
    return beat


def _limit(phase: str) -> str:
    return {"training": "step_seconds", "saving": "checkpoint_seconds"}.get(phase, "start_seconds")
