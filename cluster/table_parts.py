"""One rank table out of the parts that several machines have written.

Each node of a run writes its part into a folder that all of them see and that belongs to this run
alone. Who finds all parts there and gets the lock merges them; the others wait for the table.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import ClusterError
from cluster.files import write_whole
from cluster.ranktable import Device, Server, dump, rank_table
from cluster.table_check import check_text
from cluster.table_reading import Table, decimal, read

TABLE = "rank_table.json"
LOCK = "merge.lock"
STALE = 30.0
"""Seconds after which who holds the lock must have died: merging takes milliseconds."""
_PAUSE = 0.2


def servers(path: Path) -> tuple[Server, ...]:
    """The servers of a table that somebody has written, numbers in it taken for strings.

    Raises ClusterError if one lacks its server_id or a device its device_id.
    """
    table, problems = read(path)
    if table is None:
        raise ClusterError(f"{path}: {problems[0].message}")
    if not table.servers:
        raise ClusterError(
            f"{path}: expected servers in server_list, found none; name the rank table of a server"
        )
    pods = _pods(table)
    found = []
    for server in table.servers:
        server_id = server.values.get("server_id")
        if not server_id:
            raise ClusterError(
                f"{path}: {server.where}.server_id: expected one, found none; add it"
            )
        devices = []
        for device in server.parts:
            numbers = {key: device.values.get(key, "") for key in ("device_id", "super_device_id")}
            for key, text in numbers.items():
                if not decimal(text) and (text or key == "device_id"):
                    raise ClusterError(
                        f"{path}: {device.where}.{key}: expected a number, found “{text}”; add it"
                    )
            sdid = numbers["super_device_id"]
            address = device.values.get("device_ip") or None
            devices.append(Device(int(numbers["device_id"]), address, int(sdid) if sdid else None))
        host = server.values.get("host_ip")
        found.append(Server(server_id, tuple(devices), host, pods.get(server_id)))
    return tuple(found)


def checked_table(members: Sequence[Server], product: str | None = None) -> str:
    """The text of the table of these servers.

    Raises ClusterError with the first problem if HCCL would refuse it.
    """
    text = dump(rank_table(members))
    problems = check_text(text, product).problems
    if problems:
        first, more = problems[0], len(problems) - 1
        others = f" (and {more} more such problems)" if more else ""
        raise ClusterError(f"{first.where}: {first.message}{others} [{first.code}]")
    return text


def gather(
    folder: Path,
    nodes: int,
    node_rank: int,
    server: Server,
    seconds: float,
    product: str | None = None,
) -> Path:
    """Add this node's part and return the table of all, when it is there.

    Raises ClusterError on every node if the parts do not fit each other, and after `seconds` with
    the nodes that are missing. The part stays, so that a node can try again.
    """
    deadline = time.monotonic() + seconds
    _add_part(folder, node_rank, server)
    table = folder / TABLE
    while True:
        missing = [rank for rank in range(nodes) if not _part(folder, rank).is_file()]
        if not missing:
            members = [servers(_part(folder, rank))[0] for rank in range(nodes)]
            text = checked_table(members, product)
            if not table.is_file() and _lock(folder / LOCK):
                try:
                    write_whole(table, text)
                finally:
                    (folder / LOCK).unlink(missing_ok=True)
            if table.is_file():
                return _same(table, text)
        if time.monotonic() > deadline:
            waited = f"{folder}: expected the parts of {nodes} nodes within {seconds:g} s, found "
            if missing:
                names = ", ".join(map(str, missing))
                raise ClusterError(
                    f"{waited}none of node {names}; start lora-launch there too, with the same "
                    "folder"
                )
            raise ClusterError(
                f"{waited}all of them and no {TABLE}: {_holder(folder / LOCK)} is merging them; "
                f"remove {LOCK} if it no longer runs"
            )
        time.sleep(_PAUSE)


def _part(folder: Path, node_rank: int) -> Path:
    return folder / f"part_{node_rank}.json"


def _add_part(folder: Path, node_rank: int, server: Server) -> None:
    part, text = _part(folder, node_rank), dump(rank_table([server]))
    if part.is_file():
        if part.read_text(encoding="utf-8") != text:
            raise ClusterError(
                f"{part}: expected no part of another machine or run, found that of "
                f"{servers(part)[0].server_id}; give each node its own --node-rank and each run "
                "its own folder"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClusterError(
            f"{folder}: cannot make it: {error.strerror}; name a folder that all nodes can write to"
        ) from error
    write_whole(part, text)


def _same(table: Path, text: str) -> Path:
    if table.read_text(encoding="utf-8") != text:
        raise ClusterError(
            f"{table}: expected the table of the parts beside it, found another; give each run its "
            "own folder"
        )
    return table


def _lock(lock: Path) -> bool:
    """Make the lock file; False if another has it. One that is too old is taken over."""
    try:
        handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        _remove_if_stale(lock)
        return False
    except OSError as error:
        raise ClusterError(
            f"{lock}: cannot make it: {error.strerror}; check the folder and its permissions"
        ) from error
    with os.fdopen(handle, "w") as file:
        file.write(f"{socket.gethostname()}, process {os.getpid()}\n")
    return True


def _remove_if_stale(lock: Path) -> None:
    """Remove the lock of one that has died.

    Ages are compared by the clock of the shared folder. Two nodes may both remove it, the second
    one a new lock; then two write the same table, each of them whole, which does no harm.
    """
    probe = lock.with_name(f".now.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch()
        if probe.stat().st_mtime - lock.stat().st_mtime > STALE:
            lock.unlink()
    except FileNotFoundError:
        pass  # it has just been given back
    finally:
        probe.unlink(missing_ok=True)


def _holder(lock: Path) -> str:
    try:
        return lock.read_text(encoding="utf-8").strip() or "another node"
    except OSError:
        return "another node"


def _pods(table: Table) -> dict[str, str]:
    """Super pod of each server."""
    return {
        member.values["server_id"]: pod.values["super_pod_id"]
        for pod in table.pods or ()
        for member in pod.parts
        if "server_id" in member.values and "super_pod_id" in pod.values
    }
