"""Whether a run that failed is started once more."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.errors import Failure

HEALTHY_SECONDS = 600.0
"""Training for so long gives all restarts back."""
_LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Failed:
    """An attempt that did not end well."""

    failure: Failure
    trained: float
    """Seconds between its first step and its end."""


@dataclass(frozen=True)
class Decision:
    """What to do after a failure."""

    pause: float | None
    """Seconds until the next attempt; None for no further one."""
    reason: str = ""
    """Why there is none, if restarts were asked for."""


def decide(attempts: Sequence[Failed], max_restarts: int) -> Decision:
    """What to do after these attempts, the last one just ended.

    Input that is to blame stays so, and the same error twice in a row is one that comes back.
    """
    last = attempts[-1]
    if not max_restarts:
        return Decision(None)
    if last.failure.user:
        return Decision(None, "not started again, because the input is to blame")
    if len(attempts) > 1 and _same(attempts[-2].failure, last.failure):
        return Decision(None, "not started again, because it is the same error as before")
    used = 0
    for attempt in attempts:
        used = 1 if attempt.trained >= HEALTHY_SECONDS else used + 1
    if used > max_restarts:
        count = "once" if max_restarts == 1 else f"{max_restarts} times"
        return Decision(None, f"started again {count} already, which is what --max-restarts allows")
    return Decision(min(_LONGEST_PAUSE, 2.0 ** (used - 1)))


def _same(one: Failure, other: Failure) -> bool:
    """Did both fail at the same place with the same words, but for numbers?"""
    if one.traceback is None or other.traceback is None:
        return False
    return _without_numbers(one.traceback) == _without_numbers(other.traceback)


def _without_numbers(text: str) -> str:
    # Ports, addresses, process and step numbers differ; a line of source stays what it is.
    return re.sub(r"0x[0-9a-f]+|\d+", "", text)
