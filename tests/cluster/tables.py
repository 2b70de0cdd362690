"""Rank tables for tests: those of golden/rank_tables, and an independent reading of HCCL's rules.

`python tests/cluster/tables.py` writes the golden files anew.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.ranktable import Device, Server, dump, rank_table

GOLDEN = Path(__file__).parent / "golden" / "rank_tables"


def server(number: int, ids: Sequence[int], pod: str | None = None) -> Server:
    """Server `number` with these devices and addresses of its own."""
    devices = [
        Device(
            i,
            f"192.168.{100 + number}.{i + 1}",
            None if pod is None else 16777216 + 32 * number + i,
        )
        for i in ids
    ]
    return Server(f"10.0.0.{number + 1}", tuple(devices), super_pod_id=pod)


def both_modules(count: int) -> list[int]:
    """The same places of both modules of a 16-card A2."""
    return [*range(count // 2), *range(8, 8 + count // 2)]


def tables() -> dict[str, tuple[str, list[Server]]]:
    """Name, product and servers of each golden table."""
    found = {f"910a_{n}": ("910A", [server(0, range(n))]) for n in (1, 2, 4, 8)}
    found |= {f"a2_{n}": ("A2", [server(0, range(n))]) for n in range(1, 9)}
    found |= {f"a2_{n}": ("A2", [server(0, both_modules(n))]) for n in (10, 12, 14, 16)}
    found["910a_second_ring"] = "910A", [server(0, range(4, 8))]
    found["a2_2x8"] = "A2", [server(0, range(8)), server(1, range(8))]
    found["a3_super_pod_2x16"] = "A3", [server(0, range(16), "0"), server(1, range(16), "0")]
    found["a3_two_super_pods"] = "A3", [server(n, range(16), str(n // 2)) for n in range(4)]
    return found


def objections(text: str, product: str) -> list[str]:
    """What HCCL would say to a table, read from the rules once more and by other means."""
    table: dict[str, Any] = json.loads(text)
    found: list[str] = []

    def need(condition: object, rule: str) -> None:
        if not condition:
            found.append(rule)

    def scalars(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [leaf for item in value.values() for leaf in scalars(item)]
        if isinstance(value, list):
            return [leaf for item in value for leaf in scalars(item)]
        return [value]

    need(all(isinstance(leaf, str) for leaf in scalars(table)), "1: all strings")
    servers = table["server_list"]
    devices = [device for s in servers for device in s["device"]]
    need(table["version"] in ("1.0", "1.2"), "2: version")
    need(list(table)[-1] == "status" and table["status"] == "completed", "status last")
    need(table["server_count"] == str(len(servers)), "3: server_count")
    names = [s["server_id"] for s in servers]
    need(len(set(names)) == len(names) and all(0 < len(name) <= 64 for name in names), "4: ids")
    need(not any(name.startswith("127.") for name in names), "4: loopback")
    need(all(s["device"] for s in servers), "5: devices")
    most = 8 if product == "910A" else 16
    for s in servers:
        ids = [d["device_id"] for d in s["device"]]
        need(all(re.fullmatch(r"\d+", i) and int(i) < most for i in ids), "6: device_id")
        need(len(set(ids)) == len(ids), "7: device twice")
    addresses = [d["device_ip"] for d in devices if "device_ip" in d]
    need(len(set(addresses)) == len(addresses), "8: address twice")
    families = {ipaddress.ip_address(address).version for address in addresses}
    need(len(families) < 2, "10: families")
    pods = table.get("super_pod_list", [])
    alone = len(servers) == 1 or (product == "A3" and len(pods) == 1)
    need(alone or len(addresses) == len(devices), "9: address missing")
    need([d["rank_id"] for d in devices] == [str(i) for i in range(len(devices))], "11: ranks")
    counts = {len(s["device"]) for s in servers}
    need(product != "910A" or len(counts) == 1, "12: counts")
    for s in servers:
        ids = sorted(int(d["device_id"]) for d in s["device"])
        if product == "910A":
            need(len(ids) in (1, 2, 4, 8), "13: power of two")
            need(len(ids) in (1, 8) or ids[0] // 4 == ids[-1] // 4, "13: one ring")
        if product == "A2" and len(servers) == 1 and ids[0] < 8 <= ids[-1]:
            low, high = [i for i in ids if i < 8], [i - 8 for i in ids if i >= 8]
            need(low == high, "13: modules alike")
    if table["version"] == "1.2":
        members = [member["server_id"] for pod in pods for member in pod["server_list"]]
        need(sorted(members) == sorted(names), "14: every server in one pod")
        need(len({pod["super_pod_id"] for pod in pods}) == len(pods), "14: pods")
        for pod in pods:
            inside = {member["server_id"] for member in pod["server_list"]}
            own = [d["super_device_id"] for s in servers if s["server_id"] in inside
                   for d in s["device"]]  # fmt: skip
            need(all(i.isdecimal() for i in own) and len(set(own)) == len(own), "14: SDIDs")
    return found


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, (_, members) in tables().items():
        (GOLDEN / f"{name}.json").write_text(dump(rank_table(members)), encoding="utf-8")
