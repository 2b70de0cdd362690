"""The rank table that MindCluster's operator mounts into the pods of a job, as far as nodes go."""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError

PATH = Path("/user/serverid/devindex/config/hccl.json")
"""Where the operator's jobs find it."""


def read_when_complete(path: Path = PATH, seconds: float = 300) -> str | None:
    """The text of the mounted table once it is complete; None if none is mounted.

    Raises ClusterError if it is not complete after so many seconds.
    """
    if not path.is_file():
        return None
    deadline = time.monotonic() + seconds
    while '"completed"' not in (text := path.read_text(encoding="utf-8")):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{path}: expected status completed within {seconds:g} s, found {text.strip()!r}; "
                "see whether the operator that writes it runs, or do not mount it: HCCL finds the "
                "other devices without a table"
            )
        time.sleep(min(1.0, seconds / 10))
    return text


def servers(text: str) -> list[Mapping[str, Any]]:
    """The servers, node 0's first. Raises ClusterError if the table is not complete."""
    try:
        table = json.loads(text)
        status, found = table["status"], list(table["server_list"])
    except (ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            "hccl.json: expected status and server_list, found neither; do not mount it, or let "
            "the operator write it"
        ) from error
    if status != "completed" or not found:
        raise ClusterError(
            f"hccl.json: expected status completed and a server, found {status!r} and "
            f"{len(found)} servers; wait until the operator has written it"
        )
    return found


def place(servers: Sequence[Mapping[str, Any]], environment: Mapping[str, str]) -> int | None:
    """Position of this node; on the pod's address first, which is its own on any network."""
    for key in ("POD_IP", "XDL_IP"):
        own = environment.get(key)
        for position, server in enumerate(servers):
            if own and own in (server.get(k) for k in ("container_ip", "host_ip", "server_id")):
                return position
    return None


def address(server: Mapping[str, Any]) -> str:
    """An address of a server. Raises ClusterError if the table holds none."""
    for key in ("container_ip", "host_ip", "server_id"):
        try:
            return str(ipaddress.ip_address(str(server.get(key))))
        except ValueError:
            continue
    raise ClusterError(
        f"hccl.json: expected an address of server {server.get('server_id')!r}, found none; name "
        "it with --nnodes, --node-rank and --master-addr"
    )
