"""One launcher at a time on a run's folder."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.errors import LaunchError


@contextmanager
def locked(folder: Path, node_rank: int = 0) -> Iterator[None]:
    """Hold the folder of a run, on this node; the kernel lets go of it when this process ends.

    Raises LaunchError if another process holds it, or it cannot be written.
    """
    path = folder / f"node_{node_rank}.lock"
    try:
        file = path.open("a+")
    except OSError as error:
        raise LaunchError(
            f"{path}: cannot be written: {error.strerror}; see to the permissions of the run's "
            "folder and the free space"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise LaunchError(
                f"{folder}: {file.read().strip() or 'another process'} is at work on this run; "
                "wait for it, or end it"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
