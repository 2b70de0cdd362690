"""What HCCL enforces on a rank table of version 1.0 or 1.2, with its error codes.

The numbers are those of docs/rank-tables.md. Rule 1 is in table_reading; 15, 16 and 18, which need
the machine, in table_check. Read from HCCL's topoinfo_ranktableParser.cc and
topoinfo_ranktableConcise.cc, and from its documentation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cluster.host import is_loopback
from cluster.products import largest_device_id, objection
from cluster.table_network import network_rules
from cluster.table_pods import pod_rules
from cluster.table_reading import DOCUMENTED, PARA, Finding, Table, decimal


def problems(table: Table, product: str, intra_roce: bool = False) -> list[Finding]:
    """All that HCCL on this product would refuse. `intra_roce` is HCCL_INTRA_ROCE_ENABLE=1."""
    if not table.ranked:
        return list(_version(table))
    return [
        *_version(table),
        *_servers(table),
        *_device_ids(table, product),
        *network_rules(table, product, intra_roce),
        *_ranks(table),
        *_counts(table, product, intra_roce),
        *pod_rules(table),
    ]


def remarks(table: Table, product: str | None) -> Iterator[Finding]:
    """What works and is not as it should be."""
    if table.values.get("version") == "1.1":
        text = "1.1 is for clusters of unlike devices, which A2 and A3 do not know; use 1.0"
        yield Finding(2, DOCUMENTED, "version", text)
    counts = {len(server.parts) for server in table.servers}
    if product != "910A" and len(counts) > 1:
        text = f"servers differ in their number of devices ({_listed(sorted(counts))}): slower"
        yield Finding(12, DOCUMENTED, "server_list", text)
    ids = [server.values.get("server_id", "") for server in table.servers]
    if ids != sorted(ids):
        text = "MindSpore asks for servers in the alphabetic order of server_id"
        yield Finding(11, DOCUMENTED, "server_list", text)
    for server, server_id in zip(table.servers, ids, strict=True):
        if is_loopback(server_id):
            text = f"{server_id} means “myself” on every server; use the address of an interface"
            yield Finding(4, DOCUMENTED, f"{server.where}.server_id", text)


def _version(table: Table) -> Iterator[Finding]:
    version = table.values.get("version")
    if version == "2.0":
        text = "2.0 is for Ascend 950 and not checked here"
    elif not table.ranked:
        text = "this is the old layout with group_list, which is not checked here"
    elif version is None:
        text = 'expected "1.0" or "1.2", found none, which stands for the old layout; add it'
    elif version not in ("1.0", "1.1", "1.2"):
        text = f'expected "1.0" or "1.2", found "{version}"; correct it'
    else:
        text = ""
    if text:
        yield Finding(2, "EI0014", "version", text)
    status = table.values.get("status")
    if status not in (None, "completed"):
        text = f'expected "completed", found "{status}"; wait for who writes it, as HCCL does for '
        yield Finding(None, "HCCL_E_TIMEOUT", "status", f"{text}up to 1800 s")


def _servers(table: Table) -> Iterator[Finding]:
    count, there = table.values.get("server_count"), len(table.servers)
    if count is not None and (not decimal(count) or int(count) != there or not there):
        text = f'expected "{there}", the length of server_list, found "{count}"; correct it'
        yield Finding(3, "EI0014", "server_count", text)
    if not there:
        text = "expected at least one server, found none; add them"
        yield Finding(3, "EI0014", "server_list", text)
    first_of: dict[str, str] = {}
    for server in table.servers:
        server_id, where = server.values.get("server_id"), f"{server.where}.server_id"
        first = first_of.setdefault(server_id, server.where) if server_id else server.where
        if server_id is not None and not 0 < len(server_id) <= 64:
            text = f"expected 1 to 64 characters, found {len(server_id)}; give another"
            yield Finding(4, PARA, where, text)
        elif first != server.where:
            text = f"expected another one than {first} has, found “{server_id}”; "
            if server_id and is_loopback(server_id):
                text += "every host takes its own name for that address: "
            yield Finding(4, PARA, where, text + "give each server its own address")
        if not server.parts:
            text = "expected at least one device, found none; add them, or leave the server out"
            yield Finding(5, PARA, f"{server.where}.device", text)


def _device_ids(table: Table, product: str) -> Iterator[Finding]:
    last = largest_device_id(product)
    for server in table.servers:
        seen: dict[int, str] = {}
        for device in server.parts:
            text, where = device.values.get("device_id"), f"{device.where}.device_id"
            if text is None:
                continue
            if not decimal(text) or int(text) > last:
                message = f'expected a number from 0 to {last}, found "{text}"; correct it'
                yield Finding(6, PARA, where, message)
            elif int(text) in seen:
                message = f"expected another device than {seen[int(text)]}, found {text} again"
                yield Finding(7, "EI0014", where, message + "; name each once")
            else:
                seen[int(text)] = device.where


def _ranks(table: Table) -> Iterator[Finding]:
    found: list[int] = []
    first_of: dict[int, str] = {}
    for device in table.devices:
        rank, where = device.values.get("rank_id"), f"{device.where}.rank_id"
        if rank is None:
            continue
        if not decimal(rank):
            text = f'expected a number from 0, found "{rank}"; number the ranks in server order'
            yield Finding(11, "EI0014", where, text)
            continue
        first = first_of.setdefault(int(rank), device.where)
        if first != device.where:
            text = f"expected another rank than {first} has, found {rank} again; number the ranks"
            yield Finding(11, "EI0014", where, f"{text} in server order")
        found.append(int(rank))
    lacking = sorted(set(range(len(found))) - set(found))
    if lacking and len(set(found)) == len(found):
        text = f"expected the ranks 0 to {len(found) - 1}, found no {_listed(lacking[:4])}; "
        yield Finding(11, "EI0014", "server_list", text + "number the ranks in server order")
    elif not lacking and len(found) == len(table.devices) and _interleaved(table):
        text = "expected the ranks of a server to follow each other, found those of another "
        text += "between them; number the ranks in server order"
        yield Finding(11, DOCUMENTED, "server_list", text)


def _counts(table: Table, product: str, intra_roce: bool) -> Iterator[Finding]:
    counts = {len(server.parts) for server in table.servers}
    if product == "910A" and len(counts) > 1:
        text = f"expected as many devices on each server, found {_listed(sorted(counts))}; use "
        yield Finding(12, "EI0014", "server_list", f"{text}{min(counts)} on each")
    for server in table.servers:
        ids = [device.values.get("device_id", "") for device in server.parts]
        if not ids or not all(map(decimal, ids)):
            continue
        wrong = objection(product, [int(i) for i in ids], len(table.servers), intra_roce)
        if wrong and wrong.rule == 13:
            yield Finding(13, wrong.code, f"{server.where}.device", wrong.text)


def _interleaved(table: Table) -> bool:
    spans = sorted(
        (min(ranks), max(ranks), len(ranks))
        for server in table.servers
        if (ranks := [int(device.values["rank_id"]) for device in server.parts])
    )
    return any(last - first + 1 != number for first, last, number in spans)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
