"""A rank table in words and as plain values."""

from __future__ import annotations

from typing import Any

from cluster.table_check import Report
from cluster.table_reading import Entry, Finding, Table

_SHOWN = ("rank_id", "device_id", "device_ip", "super_device_id")


def describe(report: Report) -> dict[str, Any]:
    """What a table says, as plain values; the servers in its order, the devices by rank."""
    table = report.table or Table({}, (), None)
    pod_of = {
        member.values.get("server_id"): pod.values.get("super_pod_id")
        for pod in table.pods or ()
        for member in pod.parts
    }
    return {
        "version": table.values.get("version"),
        "status": table.values.get("status"),
        "ranks": len(table.devices),
        "servers": [
            {
                **server.values,
                **({"super_pod_id": pod_of.get(server.values.get("server_id"))} if pod_of else {}),
                "devices": [dict(device.values) for device in _by_rank(server)],
            }
            for server in table.servers
        ],
        "fits": list(report.fits),
        "problems": len(report.problems),
    }


def explanation(name: str, report: Report) -> str:
    """The same, for a reader."""
    found = describe(report)
    lines = [
        f"{name}: version {found['version'] or 'unknown'}, {count(found['ranks'], 'rank')} on "
        f"{count(len(found['servers']), 'server')}, {found['status'] or 'without status'}",
        f"fits {', '.join(found['fits']) or 'no product'}"
        + (f"; {count(found['problems'], 'problem')}" if found["problems"] else ""),
    ]
    for number, server in enumerate(found["servers"]):
        notes = [f"{key} {server[key]}" for key in ("host_ip", "super_pod_id") if server.get(key)]
        lines.append("  ".join([f"server {number}", server.get("server_id", "?"), *notes]))
        keys = [key for key in _SHOWN if any(key in device for device in server["devices"])]
        rows = [[device.get(key, "-") for key in keys] for device in server["devices"]]
        lines += _columns([[_HEADS[key] for key in keys], *rows])
    return "\n".join(lines)


def findings(name: str, report: Report) -> str:
    """Every problem and remark, a line each, with HCCL's code first."""
    lines = [f"{name}: {count(len(report.problems), 'problem') if report.problems else 'right'}"]
    if report.fits:
        lines[0] += f"; fits {', '.join(report.fits)}"
    lines += _columns([_row(found) for found in report.problems])
    if report.remarks:
        lines += ["remarks", *_columns([_row(found) for found in report.remarks])]
    return "\n".join(lines)


def count(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


_HEADS = {
    "rank_id": "rank",
    "device_id": "device",
    "device_ip": "address",
    "super_device_id": "in super pod",
}


def _by_rank(server: Entry) -> list[Entry]:
    return sorted(server.parts, key=lambda d: d.values.get("rank_id", "").zfill(10))


def _row(found: Finding) -> list[str]:
    rule = "" if found.rule is None else f"rule {found.rule}"
    place = f"{found.where}: " if found.where else ""
    return [found.code, rule, place + found.message]


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
