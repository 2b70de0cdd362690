"""A YAML file that describes all servers of a run, in the order of their node ranks.

product: A2                # optional: 910A, A2, A3
servers:
  - server_id: 10.0.0.1
    host_ip: 10.0.0.1      # optional
    devices: 0-7           # a number, a range or a list
    device_ips: [192.168.100.1, …]   # one for each, in the order of their ids
    super_pod_id: "0"      # A3 only, with …
    super_device_ids: [16777216, …]  # … the SDID of each
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cluster.addresses import is_address
from cluster.devices import expand
from cluster.errors import ClusterError
from cluster.products import PRODUCTS
from cluster.ranktable import Device, Server

_SERVER_KEYS = (
    *("server_id", "host_ip", "devices", "device_ips"),
    *("super_pod_id", "super_device_ids"),
)
_MOST_DEVICES = 16


def read_hosts(path: Path) -> tuple[str | None, tuple[Server, ...]]:
    """Product, if it is told, and servers.

    Raises ClusterError with the key that is wrong.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ClusterError(
            f"{path}: expected a host file, found {error.strerror}; correct the path"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ClusterError(f"{path}: expected YAML, found {reason}; correct it") from error
    try:
        top = _mapping(found, "the file", ("product", "servers"))
        product = top.get("product")
        if product not in (None, *PRODUCTS):
            raise ClusterError(
                f"product: expected one of {', '.join(PRODUCTS)}, found {product}; correct it"
            )
        listed = top.get("servers")
        if not isinstance(listed, list) or not listed:
            raise ClusterError(f"servers: expected a list of servers, found {listed}; add them")
        return product, tuple(_server(item, f"servers[{i}]") for i, item in enumerate(listed))
    except ClusterError as error:
        raise ClusterError(f"{path}: {error}") from error


def _server(found: Any, where: str) -> Server:
    values = _mapping(found, where, _SERVER_KEYS)
    ids = _devices(values.get("devices"), f"{where}.devices")
    addresses = _for_each(values, "device_ips", ids, where)
    places = _for_each(values, "super_device_ids", ids, where)
    for address in addresses:
        if not isinstance(address, str) or not is_address(address):
            raise ClusterError(
                f"{where}.device_ips: expected IP addresses, found {address}; correct it"
            )
    if not all(isinstance(place, int) for place in places):
        raise ClusterError(
            f"{where}.super_device_ids: expected numbers, found {places}; npu-smi info -t "
            "spod-info prints them"
        )
    devices = [
        Device(i, *pair)
        for i, *pair in zip(
            ids, addresses or [None] * len(ids), places or [None] * len(ids), strict=True
        )
    ]
    if "server_id" not in values:
        raise ClusterError(f"{where}.server_id: expected its address or name, found none; add it")
    pod, host = values.get("super_pod_id"), values.get("host_ip")
    return Server(
        str(values["server_id"]),
        tuple(devices),
        None if host is None else str(host),
        None if pod is None else str(pod),
    )


def _devices(found: Any, where: str) -> tuple[int, ...]:
    text = ",".join(map(str, found)) if isinstance(found, list) else str(found)
    if isinstance(found, int) and not isinstance(found, bool):
        text = f"0-{found - 1}" if found > 0 else "none"
    try:
        ids = expand(text, _MOST_DEVICES)
    except ClusterError as error:
        raise ClusterError(f"{where}: {error}") from error
    if ids[-1] >= _MOST_DEVICES:
        raise ClusterError(f"{where}: expected ids 0 to 15, found {ids[-1]}; correct it")
    return ids


def _for_each(values: dict[str, Any], key: str, ids: tuple[int, ...], where: str) -> list[Any]:
    """The values of a list that has one for each device; none if the key is absent."""
    found = values.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or len(found) != len(ids):
        raise ClusterError(
            f"{where}.{key}: expected a list of {len(ids)}, one for each device, found "
            f"{len(found) if isinstance(found, list) else found}; correct it"
        )
    return found


def _mapping(found: Any, where: str, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ClusterError(f"{where}: expected {', '.join(keys)}, found {found}; write them")
    unknown = [key for key in found if key not in keys]
    if unknown:
        raise ClusterError(
            f"{where}: expected only the keys {', '.join(keys)}, found {unknown[0]}; correct it"
        )
    return found
