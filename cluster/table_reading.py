"""Rank tables that somebody else has written: read leniently, with every problem of their form.

By hccl_tools.py, by ascend-operator in Kubernetes (hccl.json), by merge_hccl.py or by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError
from cluster.ranktable import path_problem

_TOP = ("version", "status", "server_count")
_SERVER = ("server_id", "host_ip")
_DEVICE = (
    *("rank_id", "device_id", "device_ip", "super_device_id"),
    *("device_port", "device_vnic_port", "host_port", "backup_device_ip", "backup_device_port"),
    *("net_position", "net_protocol"),
)
_POD = ("super_pod_id",)
"""The keys that HCCL reads; others, such as host_nic_ip, it passes over."""
PARA = "HCCL_E_PARA"
DOCUMENTED = "documented"
"""What HCCL asks for and does not check."""

_REQUIRED = {"status", "server_id", "rank_id", "device_id"}


@dataclass(frozen=True)
class Finding:
    """Something that HCCL would refuse, or that is worth a remark."""

    rule: int | None
    """Number in docs/rank-tables.md; None if the file cannot be loaded."""
    code: str
    """HCCL's error code, or DOCUMENTED."""
    where: str
    """server_list[1].device[0].rank_id"""
    message: str
    """expected …, found …; what to do."""


@dataclass(frozen=True)
class Entry:
    """One object of the table."""

    where: str
    values: Mapping[str, str]
    """What HCCL reads of it, as text; without what is missing or no scalar."""
    parts: tuple[Entry, ...] = ()
    """Devices of a server, servers of a super pod."""


@dataclass(frozen=True)
class Table:
    """A table as far as it could be read."""

    values: Mapping[str, str]
    servers: tuple[Entry, ...]
    pods: tuple[Entry, ...] | None
    """None if there is no super_pod_list."""
    ranked: bool = True
    """Does it have the layout of 1.0 to 1.2, which is the one that can be checked?"""

    @property
    def devices(self) -> tuple[Entry, ...]:
        """Those of all servers."""
        return tuple(device for server in self.servers for device in server.parts)


@dataclass
class _Reader:
    problems: list[Finding] = field(default_factory=list)

    def refuse(self, where: str, message: str, rule: int = 1, code: str = "EI0017") -> None:
        self.problems.append(Finding(rule, code, where, message))

    def scalars(self, found: Any, where: str, keys: tuple[str, ...]) -> dict[str, str]:
        """The values of an object as text."""
        if not isinstance(found, dict):
            self.refuse(where, f"expected an object {{…}}, found {_json(found)}; write one")
            return {}
        values = {}
        for key in keys:
            place = f"{where}.{key}" if where else key
            if key not in found:
                if key in _REQUIRED:
                    self.refuse(place, "expected a string, found nothing; add it")
                continue
            value = found[key]
            if isinstance(value, str):
                values[key] = value
            elif isinstance(value, int) and not isinstance(value, bool):
                values[key] = str(value)
                self.refuse(place, f'expected a string, found the number {value}; write "{value}"')
            else:
                self.refuse(place, f"expected a string, found {_json(value)}; write one")
        return values

    def items(self, found: Any, where: str, key: str) -> list[tuple[str, Any]]:
        """The members of the list under a key, each with its place."""
        place = f"{where}.{key}" if where else key
        value = found.get(key) if isinstance(found, dict) else None
        if isinstance(value, list):
            return [(f"{place}[{index}]", item) for index, item in enumerate(value)]
        if isinstance(found, dict):
            said = _json(value) if key in found else "nothing"
            self.refuse(place, f"expected a list […], found {said}; write one")
        return []

    def server(self, where: str, found: Any) -> Entry:
        devices = self.items(found, where, "device")
        entries = [Entry(place, self.scalars(item, place, _DEVICE)) for place, item in devices]
        return Entry(where, self.scalars(found, where, _SERVER), tuple(entries))

    def pod(self, where: str, found: Any) -> Entry:
        servers = self.items(found, where, "server_list")
        entries = [
            Entry(place, self.scalars(item, place, ("server_id",))) for place, item in servers
        ]
        return Entry(where, self.scalars(found, where, _POD), tuple(entries))


def parse(text: str) -> tuple[Table | None, list[Finding]]:
    """The table in a text and all problems of its form (rule 1); no table if it is no JSON."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"expected JSON, found {error}; correct the file, or write it anew"
        return None, [Finding(None, "EI0004", "", message)]
    if not isinstance(found, dict):
        message = f"expected an object {{…}}, found {_json(found)}; write the table anew"
        return None, [Finding(None, "EI0004", "", message)]
    reader = _Reader()
    values = reader.scalars(found, "", _TOP)
    if values.get("version") == "2.0" or "group_list" in found:
        # Other layouts: what they lack of this one is no problem of theirs.
        return Table(values, (), None, ranked=False), []
    servers = tuple(reader.server(*item) for item in reader.items(found, "", "server_list"))
    pods = None
    if "super_pod_list" in found:
        pods = tuple(reader.pod(*item) for item in reader.items(found, "", "super_pod_list"))
    return Table(values, servers, pods), reader.problems


def read(path: Path) -> tuple[Table | None, list[Finding]]:
    """The table in a file and all problems of its path and form.

    Raises ClusterError if there is no file that can be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ClusterError(
            f"{path}: expected a rank table, found {error.strerror}; correct the path"
        ) from error
    except UnicodeDecodeError as error:
        raise ClusterError(
            f"{path}: expected the text of a rank table, found bytes that are no UTF-8; name "
            "another file"
        ) from error
    table, problems = parse(text)
    wrong = path_problem(path.absolute())
    return table, [*([Finding(None, "EI0004", "", wrong)] if wrong else []), *problems]


def decimal(text: str) -> bool:
    """Is it a number as HCCL reads one, of 32 bits?"""
    return text.isascii() and text.isdecimal() and len(text) <= 10


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:39] + "…"
