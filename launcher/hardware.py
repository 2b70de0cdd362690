"""The devices of this machine for a run, and the rank table that tells of them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from cluster.addresses import NoAddress, device_addresses
from cluster.devices import Machine, this_machine
from cluster.errors import ClusterError
from cluster.npu_smi import common_product, npus
from cluster.products import check_devices, largest_device_id
from cluster.ranktable import Server
from cluster.server import this_server
from cluster.table_check import check_file, here
from cluster.table_parts import checked_table
from launcher.errors import LaunchError
from launcher.request import Request


def machine_of(request: Request) -> Machine:
    """This machine; a dry run for Ascend assumes one where there is none. Raises ClusterError."""
    try:
        return this_machine(request.device_target)
    except ClusterError:
        if not request.dry_run:
            raise
        ids = tuple(range(largest_device_id(request.product or "A2") + 1))
        return Machine("Ascend", ids, this_machine("CPU").cores, assumed=True)


def product_of(request: Request, machine: Machine, device_ids: tuple[int, ...]) -> str | None:
    """What the NPUs are, told or detected; None on CPU, and where nobody can tell.

    Raises ClusterError if these devices cannot work together on it.
    """
    if machine.device_target != "Ascend":
        return None
    product = request.product or common_product(npus() or ())
    if product:
        check_devices(product, device_ids)
    return product


def own_server(
    request: Request, machine: Machine, device_ids: tuple[int, ...], product: str | None
) -> Server | None:
    """This machine as a part of a rank table; None if it needs none or its addresses are not known.

    Without a table HCCL finds the topology by itself. Raises ClusterError.
    """
    if machine.device_target != "Ascend" or request.rank_table is not None:
        return None
    if len(device_ids) * request.nodes.nnodes == 1:
        return None
    try:
        return this_server(device_ids, product)
    except NoAddress:
        return None


def whole_table(servers: Sequence[Server | None], product: str | None) -> str | None:
    """The table of all nodes, in the order of their ranks; None if none of them knows addresses.

    Raises ClusterError if only some do, or HCCL would refuse it.
    """
    known = [server for server in servers if server is not None]
    if not known:
        return None
    if len(known) < len(servers):
        missing = ", ".join(str(rank) for rank, server in enumerate(servers) if server is None)
        raise LaunchError(
            f"expected the addresses of the NPUs on every node or on none, found none on node "
            f"{missing}; see lora-launch doctor there, or give --rank-table on every node"
        )
    return checked_table(known, product)


def rank_table_text(
    request: Request, device_ids: tuple[int, ...], product: str | None, server: Server | None
) -> str | None:
    """The table that is given or, on a single machine, made. Raises ClusterError or LaunchError."""
    path = request.rank_table
    if path is None:
        return whole_table([server], product) if request.nodes.nnodes == 1 else None
    report = check_file(path, product)
    problems = list(report.problems)
    if report.table is not None and not problems and not request.dry_run:
        addresses = {}
        with contextlib.suppress(NoAddress):
            addresses = device_addresses(device_ids)
        problems, _ = here(report.table, request.nodes.node_rank, device_ids, addresses, {})
    if problems:
        first, more = problems[0], len(problems) - 1
        place = f"{first.where}: " if first.where else ""
        also = f" (and {more} more, see lora-launch rank-table check)" if more else ""
        raise LaunchError(f"{path}: {place}{first.message}{also} [{first.code}]")
    return path.read_text(encoding="utf-8")
