"""Programs that answer a question about the machine, with a limit of time and of output."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from cluster.errors import ClusterError

_DRIVER_FOLDERS = ("/usr/local/Ascend/driver/tools", "/usr/local/sbin", "/usr/local/bin")
"""Where the driver puts its programs; they are seldom on PATH."""
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Answer:
    """What a program has said."""

    command: str
    """As a user would type it."""
    exit_code: int
    text: str
    """stdout and stderr."""

    @property
    def found(self) -> str:
        """Its exit code and first words, for a sentence that ends in "found …"."""
        words = " ".join(self.text.split())
        words = "".join(letter if letter.isprintable() else "�" for letter in words)
        said = f"“{words[:60]}{'…' if len(words) > 60 else ''}”" if words else "no word"
        return f"exit code {self.exit_code} and {said}" if self.exit_code else said


def ask(command: Sequence[str], seconds: float) -> Answer | None:
    """The answer of a program; None if there is no such program.

    Raises ClusterError if it has not ended after `seconds` or prints more than 1 MiB. Then it and
    what it has started in its session are killed.
    """
    typed = " ".join(command)
    path = os.pathsep.join((os.environ.get("PATH", ""), *_DRIVER_FOLDERS))
    program = shutil.which(command[0], path=path)
    if program is None:
        return None
    deadline = time.monotonic() + seconds
    try:
        process = subprocess.Popen(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise ClusterError(
            f"{typed}: cannot start {program}: {error.strerror}; install the driver anew"
        ) from error
    assert process.stdout is not None
    try:
        output = _read(process.stdout, deadline)
        if output is None:
            raise ClusterError(
                f"{typed}: expected a few lines, found more than {_MOST_BYTES:,} bytes; check what "
                f"{program} is"
            )
        exit_code = process.wait(max(0.0, deadline - time.monotonic()))
    except (TimeoutError, subprocess.TimeoutExpired):
        raise ClusterError(
            f"{typed}: expected an answer within {seconds:g} s, found none; the driver or the "
            "device hangs: see dmesg, and reset the device or restart the machine"
        ) from None
    finally:
        _end(process)
    return Answer(typed, exit_code, output.decode(errors="replace"))


def _read(stream: IO[bytes], deadline: float) -> bytes | None:
    """All that is written until the stream is closed; None if it is too much.

    Raises TimeoutError at the deadline, of time.monotonic().
    """
    output = b""
    while len(output) <= _MOST_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([stream], [], [], left)[0]:
            raise TimeoutError
        chunk = os.read(stream.fileno(), 1 << 16)
        if not chunk:
            return output
        output += chunk
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of it; one that the kernel cannot kill is not waited for."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
    if process.stdout is not None:
        process.stdout.close()
