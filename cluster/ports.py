"""A TCP port for the scheduler."""

from __future__ import annotations

import errno
import os
import random
import socket

from cluster.errors import ClusterError

# Below the ephemeral ports (32768 and up on Linux): a worker that retries its connection to the
# scheduler before that listens could otherwise be given the scheduler's own port.
_CANDIDATES = range(20000, 30000)


def check_port(port: int, address: str) -> None:
    """Raise ClusterError unless a scheduler could listen on this port."""
    problem = _problem(port, address)
    if problem == errno.EADDRINUSE:
        raise ClusterError(
            f"--master-port {port}: the port is in use on {address}; choose another, or leave "
            "the option out and a free one is taken"
        )
    if problem:
        raise ClusterError(
            f"--master-port {port}: cannot listen on {address}: {os.strerror(problem)}; "
            "choose another port"
        )


def choose_port(address: str) -> int:
    """A port that nobody listens on. Raises ClusterError if there is none."""
    for port in random.sample(_CANDIDATES, 100):
        if not _problem(port, address):
            return port
    raise ClusterError(
        f"no free port found on {address} among {_CANDIDATES[0]} to {_CANDIDATES[-1]}; "
        "name one with --master-port"
    )


def next_port(port: int, address: str) -> int:
    """The first port above `port` that nobody listens on. Raises ClusterError if none is near."""
    for candidate in range(port + 1, min(port + 100, 65536)):
        if not _problem(candidate, address):
            return candidate
    raise ClusterError(
        f"--master-port {port}: expected a free port among the 99 above it on {address}, found "
        "none that can be listened on; is the address this machine's?"
    )


def is_taken(port: int, address: str) -> bool:
    """Does another process listen on this port?"""
    return _problem(port, address) == errno.EADDRINUSE


def _problem(port: int, address: str) -> int | None:
    """The errno of listening on the port; None if it works."""
    try:
        family, _, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        return errno.EADDRNOTAVAIL
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        # Connections that an earlier run has closed do not make a port taken.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(target)
            listener.listen(1)
        except OSError as error:
            return error.errno
    return None
