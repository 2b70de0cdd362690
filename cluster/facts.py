"""What one machine is found to be: files read, programs asked, nothing judged.

A program that is missing, hangs or fails is a fact too: its answer is None.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

HCCL_PORTS = range(60000, 60032)
"""HCCL_IF_BASE_PORT and the 31 after it, by default."""

_SECONDS = 10.0
_TOOLS = "/usr/local/Ascend/driver/tools:/usr/local/sbin:/usr/local/bin"
_DRIVER = Path("/usr/local/Ascend/driver/version.info")


@dataclass(frozen=True)
class HostFacts:
    """What holds for any machine."""

    mindspore: str | None
    """Version that is installed; None if none is."""
    numpy: str | None
    hostname: str
    address: str | None
    """What the host name resolves to; None if it does not."""
    nofile: int
    """Most open files; -1 is no limit."""
    memlock: int
    """Most locked bytes; -1 is no limit."""
    shared_memory: int | None
    """Bytes of /dev/shm."""


@dataclass(frozen=True)
class FolderFacts:
    """A folder that a run writes to, or the existing one that it would be made in."""

    key: str
    """The config key that names it."""
    folder: str
    free: int | None
    """Bytes."""
    skew: float | None
    """Seconds by which the clock of its file system is ahead; None if it cannot be written."""


@dataclass(frozen=True)
class NpuFacts:
    """What holds for a machine with NPUs; answers by device id, as the tools print them."""

    driver: str | None
    """Text of the driver's version.info."""
    cann: str | None
    """Text of CANN's version.info."""
    cann_home: str | None
    """ASCEND_HOME_PATH."""
    health: Mapping[int, str | None]
    link: Mapping[int, str | None]
    tls: Mapping[int, str | None]
    busy_ports: Sequence[int]
    """Those of HCCL_PORTS that another program listens on."""
    ephemeral_ports: range
    """What the kernel gives to outgoing connections."""
    reserved_ports: str
    """What it leaves out of them, as in ip_local_reserved_ports."""


def host_facts() -> HostFacts:
    """The facts about this machine."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = None
    try:
        shared_memory = shutil.disk_usage("/dev/shm").total
    except OSError:
        shared_memory = None
    return HostFacts(
        mindspore=_installed("mindspore"),
        numpy=_installed("numpy"),
        hostname=socket.gethostname(),
        address=address,
        nofile=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        memlock=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        shared_memory=shared_memory,
    )


def folder_facts(key: str, folder: Path) -> FolderFacts:
    """The facts about a folder; a file is made in it for a moment, to see its clock."""
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        free: int | None = shutil.disk_usage(existing).free
    except OSError:
        free = None
    skew = None
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".clock-") as file:
            before = time.time()
            file.write(b"0")
            file.flush()
            os.fsync(file.fileno())
            written, after = os.stat(file.name).st_mtime, time.time()
            # A file system stamps in steps of some milliseconds; within the call is in step.
            skew = min(0.0, written - before) + max(0.0, written - after)
    except OSError:
        pass
    return FolderFacts(key, str(folder), free, skew)


def npu_facts(device_ids: Sequence[int], environment: Mapping[str, str]) -> NpuFacts:
    """The facts about these NPUs and their software."""
    home = environment.get("ASCEND_HOME_PATH")
    chips = _chips(ask("npu-smi", "info", "-m") or "")
    ephemeral = (_text(Path("/proc/sys/net/ipv4/ip_local_port_range")) or "0 0").split()
    return NpuFacts(
        driver=_text(_DRIVER),
        cann=None if home is None else _text(Path(home) / "compiler" / "version.info"),
        cann_home=home,
        health={
            device_id: ask("npu-smi", "info", "-t", "health", "-i", chip[0], "-c", chip[1])
            if (chip := chips.get(device_id))
            else None
            for device_id in device_ids
        },
        link={n: ask("hccn_tool", "-i", str(n), "-link", "-g") for n in device_ids},
        tls={n: ask("hccn_tool", "-i", str(n), "-tls", "-g") for n in device_ids},
        busy_ports=[port for port in HCCL_PORTS if _is_busy(port)],
        ephemeral_ports=range(int(ephemeral[0]), int(ephemeral[1]) + 1),
        reserved_ports=(_text(Path("/proc/sys/net/ipv4/ip_local_reserved_ports")) or "").strip(),
    )


def ask(*command: str) -> str | None:
    """What a program prints; None if it is missing, fails or takes longer than ten seconds."""
    program = shutil.which(command[0]) or shutil.which(command[0], path=_TOOLS)
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _chips(table: str) -> dict[int, tuple[str, str]]:
    """NPU and chip by device id, from `npu-smi info -m`: rows of NPU, chip and logic id."""
    rows = re.findall(r"^\s*(\d+)\s+(\d+)\s+(\d+)\b", table, re.MULTILINE)
    return {int(device_id): (npu, chip) for npu, chip, device_id in rows}


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _is_busy(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return True
    return False
