"""A rank table examined: what HCCL would refuse, what is odd, which products it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.products import PRODUCTS
from cluster.table_reading import Entry, Finding, Table, decimal, parse, read
from cluster.table_rules import problems, remarks


@dataclass(frozen=True)
class Report:
    """The examination of one table."""

    table: Table | None
    """None if it is not even JSON."""
    problems: tuple[Finding, ...]
    remarks: tuple[Finding, ...]
    fits: tuple[str, ...]
    """The products whose HCCL would take it."""

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "problems": [asdict(found) for found in self.problems],
            "remarks": [asdict(found) for found in self.remarks],
            "fits": list(self.fits),
        }


def check_file(path: Path, product: str | None = None, intra_roce: bool = False) -> Report:
    """The report on a file; without a product, problems are what no product would take.

    Raises ClusterError if there is no file that can be read.
    """
    return _report(*read(path), product, intra_roce)


def check_text(text: str, product: str | None = None, intra_roce: bool = False) -> Report:
    """The same for the text of a table."""
    return _report(*parse(text), product, intra_roce)


def here(
    table: Table,
    node_rank: int,
    device_ids: Sequence[int],
    addresses: Mapping[int, str],
    tls: Mapping[int, bool],
) -> tuple[list[Finding], list[Finding]]:
    """Problems and remarks of a table on one of its machines: rules 15, 16 and 18.

    `device_ids` are those the run uses on it, `addresses` and `tls` what its devices have.
    """
    if node_rank >= len(table.servers):
        text = f"expected a server for node {node_rank}, found {len(table.servers)} servers; add it"
        return [Finding(15, "EI0014", "server_list", text)], []
    found = []
    server = table.servers[node_rank]
    # Worker i opens the i-th of the ascending ids, and has the i-th of the server's ranks.
    listed = sorted(server.parts, key=_rank)
    if len(listed) != len(device_ids):
        text = f"expected {len(device_ids)} devices, as many as this machine runs, found "
        found.append(
            Finding(15, "EI0014", f"{server.where}.device", f"{text}{len(listed)}; write it anew")
        )
    for device, opened in zip(listed, sorted(device_ids), strict=False):
        named = device.values.get("device_id")
        if named != str(opened):
            text = f"expected device {opened}, which rank {device.values.get('rank_id')} opens here"
            found.append(
                Finding(
                    15,
                    "EI0014",
                    f"{device.where}.device_id",
                    f"{text}, found {named}; write it anew",
                )
            )
            continue
        address, real = device.values.get("device_ip"), addresses.get(opened)
        if address and real and address != real:
            text = f"expected {real}, the address of device {opened} here, found {address}; correct"
            found.append(Finding(16, "EI0014", f"{device.where}.device_ip", f"{text} it"))
    odd = []
    if len({tls[i] for i in device_ids if i in tls}) > 1:
        on = [i for i in device_ids if tls.get(i)]
        text = f"TLS is on for the devices {', '.join(map(str, on))} and off for others: HCCL "
        text += "refuses that where it has no rank table; see hccn_tool -i N -tls -g"
        odd.append(Finding(18, "EI0016", server.where, text))
    return found, odd


def _report(
    table: Table | None, form: list[Finding], product: str | None, intra_roce: bool
) -> Report:
    if table is None:
        return Report(None, tuple(form), (), ())
    by_product = {name: problems(table, name, intra_roce) for name in PRODUCTS}
    if table.values.get("version") == "1.2":
        product = product or "A3"
    fits = tuple(name for name in PRODUCTS if not form and not by_product[name])
    if product:
        found = by_product[product]
    else:
        found = _of_all(by_product)
    return Report(table, (*form, *found), tuple(remarks(table, product)), fits)


def _of_all(by_product: Mapping[str, list[Finding]]) -> list[Finding]:
    """What no product would take, and what each of them has against the rest if all have."""
    lists = list(by_product.values())
    common = [found for found in lists[0] if all(found in other for other in lists)]
    own = {name: [f for f in found if f not in common] for name, found in by_product.items()}
    if not all(own.values()):
        return common
    return common + [
        replace(f, message=f"on {name}: {f.message}") for name, found in own.items() for f in found
    ]


def _rank(device: Entry) -> tuple[int, str]:
    rank = device.values.get("rank_id", "")
    return (int(rank), "") if decimal(rank) else (1 << 40, rank)
