"""This machine as a server of a rank table."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.addresses import NoAddress, device_addresses
from cluster.host import host_address
from cluster.npu_smi import Npu, common_product, npus, places
from cluster.products import check_devices
from cluster.ranktable import Device, Server


def this_server(
    device_ids: Sequence[int], product: str | None = None, server_id: str | None = None
) -> Server:
    """This machine with these devices, their addresses and, on an A3, their super pod.

    `product` and `server_id` are detected if they are not told. Raises ClusterError if the devices
    cannot work together or a program of the driver hangs or fails, and NoAddress if an address is
    needed and not to be had; within a super pod none is.
    """
    listed = npus() if product in (None, "A3") else None
    product = product or common_product(listed or ())
    if product:
        check_devices(product, device_ids)
    pod_id, super_device_ids = _super_pod(listed or (), device_ids, product)
    try:
        addresses = device_addresses(device_ids)
    except NoAddress:
        if pod_id is None:
            raise
        addresses = {}
    devices = (Device(i, addresses.get(i), super_device_ids.get(i)) for i in sorted(device_ids))
    return Server(server_id or host_address(), tuple(devices), super_pod_id=pod_id)


def _super_pod(
    listed: Sequence[Npu], device_ids: Sequence[int], product: str | None
) -> tuple[str | None, dict[int, int]]:
    """The super pod that all these devices are in, and their places; None and none if there is
    no such."""
    found = (
        places([npu for npu in listed if npu.device_id in device_ids]) if product == "A3" else {}
    )
    pods = {found[i].super_pod_id if i in found else None for i in device_ids}
    pod = pods.pop() if len(pods) == 1 else None
    return pod, {} if pod is None else {i: place.super_device_id for i, place in found.items()}
