"""HCCL rank tables: version 1.0 (910A, A2, an A3 as a plain server) and 1.2 (super pods of A3)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError
from cluster.files import write_whole
from cluster.host import is_loopback


@dataclass(frozen=True)
class Device:
    """An NPU of a run."""

    device_id: int
    """Physical."""
    device_ip: str | None = None
    """HCCL needs none on a single server, nor within one super pod."""
    super_device_id: int | None = None
    """SDID, for version 1.2."""


@dataclass(frozen=True)
class Server:
    """A machine and those of its NPUs that the run uses."""

    server_id: str
    """Unique, at most 64 characters; by custom its address."""
    devices: tuple[Device, ...]
    host_ip: str | None = None
    super_pod_id: str | None = None


def server_of(values: Mapping[str, Any]) -> Server:
    """The server of which dataclasses.asdict made these values."""
    devices = tuple(Device(**device) for device in values["devices"])
    return Server(**{**values, "devices": devices})


def rank_table(servers: Sequence[Server]) -> dict[str, Any]:
    """The table of a run. Ranks count through the servers in their order, and through the devices
    of each by ascending id, which is the order msrun gives them.

    Version 1.2 if the servers are in super pods, else 1.0. Raises ClusterError if server ids are
    not unique, or only some servers are in a super pod, or those of one are not side by side.
    """
    _check_server_ids(servers)
    entries, rank_id = [], 0
    for server in servers:
        devices = []
        for device in sorted(server.devices, key=lambda device: device.device_id):
            devices.append(_device(device, rank_id))
            rank_id += 1
        host = {"host_ip": server.host_ip} if server.host_ip else {}
        entries.append({"server_id": server.server_id, **host, "device": devices})
    pods = _super_pods(servers)
    # Who waits for the file must not take a part of it for the whole: `status` comes last.
    return {
        "version": "1.2" if pods else "1.0",
        "server_count": str(len(servers)),
        "server_list": entries,
        **({"super_pod_list": pods} if pods else {}),
        "status": "completed",
    }


def dump(table: Mapping[str, Any]) -> str:
    """The table as the text of its file."""
    return json.dumps(table, indent=2) + "\n"


def write(path: Path, table: Mapping[str, Any]) -> None:
    """Write the table, whole or not at all.

    Raises ClusterError if that fails or HCCL would not take the path.
    """
    problem = path_problem(path)
    if problem:
        raise ClusterError(f"{path}: {problem}")
    write_whole(path, dump(table))


def path_problem(path: Path) -> str | None:
    """Why HCCL would refuse a table by its path; None if it would not.

    It looks for the first `.json` in the path, which must be its end.
    """
    text = str(path)
    if not text.endswith(".json"):
        return f"expected a name that ends in .json, found {path.name}; rename the file"
    if text.index(".json") != len(text) - len(".json"):
        return (
            "expected .json only at the end, because HCCL takes its first occurrence for the end; "
            "rename the folder or file that has it in its middle"
        )
    return None


def _device(device: Device, rank_id: int) -> dict[str, str]:
    # HCCL takes every scalar as a JSON string and refuses numbers (EI0017).
    entry = {"device_id": str(device.device_id)}
    if device.super_device_id is not None:
        entry["super_device_id"] = str(device.super_device_id)
    if device.device_ip is not None:
        entry["device_ip"] = device.device_ip
    return {**entry, "rank_id": str(rank_id)}


def _super_pods(servers: Sequence[Server]) -> list[dict[str, Any]]:
    outside = [s.server_id for s in servers if s.super_pod_id is None]
    if len(outside) == len(servers):
        return []
    if outside:
        raise ClusterError(
            f"server {outside[0]}: expected a super_pod_id as the other servers have one, found "
            "none; give it to all servers or to none"
        )
    pods = [
        (str(pod), [{"server_id": s.server_id} for s in members])
        for pod, members in groupby(servers, key=lambda s: s.super_pod_id)
    ]
    names = [name for name, _ in pods]
    torn = next((name for name in names if names.count(name) > 1), None)
    if torn is not None:
        raise ClusterError(
            f"super pod {torn}: expected its servers side by side, found others between them; list "
            "the servers of each super pod together"
        )
    for server in servers:
        lacking = [d.device_id for d in server.devices if d.super_device_id is None]
        if lacking:
            raise ClusterError(
                f"server {server.server_id}, device {lacking[0]}: expected a super_device_id, "
                "found none; it is the SDID that npu-smi info -t spod-info prints"
            )
    return [{"super_pod_id": name, "server_list": members} for name, members in pods]


def _check_server_ids(servers: Sequence[Server]) -> None:
    ids = [server.server_id for server in servers]
    for server_id in ids:
        if is_loopback(server_id):
            raise ClusterError(
                f"server_id {server_id}: expected a name that no other server has, found a "
                "loopback address; it is what its own name stands for on many a host, and every "
                "server would have it: give the address of a network interface"
            )
    for number, server_id in enumerate(ids):
        first = ids.index(server_id)
        if first != number:
            raise ClusterError(
                f"server_id {server_id}: expected each server to have its own, found it on servers "
                f"{first} and {number}; give each another, such as its address"
            )
