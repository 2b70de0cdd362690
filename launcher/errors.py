"""How a launch can end other than well."""

from __future__ import annotations

import signal
from dataclasses import asdict, dataclass
from typing import Any


class LaunchError(ValueError):
    """Nothing was started, because of the input; the message is one sentence."""


@dataclass(frozen=True)
class Failure:
    """What ended an attempt, as far as it can be told."""

    text: str
    """One sentence that names the rank and its error."""
    exit_code: int = 1
    """The rank's own, 128 + n if signal n ended it; 2 if the input is to blame."""
    traceback: str | None = None
    """The rank's."""
    killed: bool = False
    """By a signal, and so not by what happened to another rank."""
    port_taken: bool = False
    """Somebody else took the scheduler's port before the scheduler did."""

    @property
    def user(self) -> bool:
        """Is the input to blame, so that another attempt would end the same way?"""
        return self.exit_code == 2

    def as_dict(self) -> dict[str, Any]:
        """As plain values, of which Failure(**values) makes it again."""
        return asdict(self)


class RunFailed(Exception):
    """A run that was started did not end well."""

    def __init__(self, failure: Failure):
        super().__init__(failure.text)
        self.failure = failure


class Stopped(Exception):
    """The run ended before its last step, and can go on from a checkpoint of that moment."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: try again later."""


class Interrupted(Exception):
    """A signal ended the run; `saved` says where it can go on, None if it cannot."""

    def __init__(self, number: int, saved: str | None = None):
        end = saved or "nothing was published"
        super().__init__(f"interrupted by {signal.Signals(number).name}; {end}")
        self.exit_code = 128 + number
