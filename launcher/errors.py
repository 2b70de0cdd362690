"""How a launch can end other than well."""

from __future__ import annotations

import signal


class LaunchError(ValueError):
    """Nothing was started, because of the input; the message is one sentence."""


class RunFailed(Exception):
    """A run that was started did not end well; the message names the rank and its error.

    `user` tells that the input is to blame and not the program; `traceback` is the worker's.
    """

    def __init__(self, message: str, *, user: bool = False, traceback: str | None = None):
        super().__init__(message)
        self.user = user
        self.traceback = traceback


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
