"""HCCL rank tables, version 1.0 (Atlas training servers, Atlas A2)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_ADDRESS = re.compile(r"^\s*address_(\d+)\s*=\s*(\S+)\s*$", re.MULTILINE)


def device_addresses(hccn_conf: str) -> dict[int, str]:
    """Network address of each NPU, by physical id, from the text of /etc/hccn.conf."""
    return {int(device_id): address for device_id, address in _ADDRESS.findall(hccn_conf)}


def rank_table(
    server_id: str, device_ids: Sequence[int], addresses: Mapping[int, str]
) -> dict[str, Any]:
    """The table of one server; `rank_id` follows the ascending physical ids."""
    # HCCL takes every scalar as a JSON string and refuses numbers (EI0017).
    devices = [
        {
            "device_id": str(device_id),
            "device_ip": addresses[device_id],
            "rank_id": str(rank_id),
        }
        for rank_id, device_id in enumerate(sorted(device_ids))
    ]
    return {
        "version": "1.0",
        "server_count": "1",
        "server_list": [{"server_id": server_id, "device": devices}],
        "status": "completed",
    }


def dump(table: Mapping[str, Any]) -> str:
    """The table as the text of its file."""
    return json.dumps(table, indent=2) + "\n"
