"""Machines within this one: two that reach each other, or one with no processes but its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ADDRESSES = ("10.99.0.1", "10.99.0.2")


@contextmanager
def two_namespaces() -> Iterator[tuple[str, str]]:
    """The names of both; skips the test where the kernel refuses them."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("namespaces need root, ip (iproute2) and unshare (util-linux)")
    names = f"lora{os.getpid()}a", f"lora{os.getpid()}b"
    links = f"l{os.getpid()}a", f"l{os.getpid()}b"
    try:
        try:
            for name in names:
                _run("ip", "netns", "add", name)
            _run("ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1])
            for name, link, address in zip(names, links, ADDRESSES, strict=True):
                _run("ip", "link", "set", link, "netns", name)
                _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", link)
                _run("ip", "-n", name, "link", "set", link, "up")
                _run("ip", "-n", name, "link", "set", "lo", "up")
                _run(*within(name, "test"), "true")
        except OSError as error:
            pytest.skip(f"the kernel refuses network namespaces here: {error}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def within(space: str, host: str) -> tuple[str, ...]:
    """What a command begins with to run there, on a machine of that name."""
    named = ("unshare", "-u", "sh", "-c", f'hostname {host} && exec "$@"', "-")
    return ("ip", "netns", "exec", space, *named)


def alone() -> bool:
    """Is there no other process than this one and those it starts?"""
    return os.getpid() == 1


def run_alone(test: pytest.Item, folder: Path) -> None:
    """Run that test, in that folder, where `alone` is true; skips it where the kernel refuses."""
    space = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
    space += ("--mount-proc",)
    if not shutil.which("unshare"):
        pytest.skip("a process namespace needs unshare (util-linux)")
    refused = subprocess.run([*space, "true"], capture_output=True, text=True)
    if refused.returncode:
        pytest.skip(f"the kernel refuses process namespaces here: {refused.stderr.strip()}")
    pytest_of_one = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    words = [f"--basetemp={folder}", f"{test.path}::{test.name}"]
    done = subprocess.run([*space, *pytest_of_one, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
