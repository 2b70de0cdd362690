"""Rules 8, 9, 10 and 17: the addresses and ports of a rank table."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

from cluster.addresses import is_address
from cluster.table_reading import DOCUMENTED, PARA, Entry, Finding, Table, decimal

_PORTS = ("device_port", "device_vnic_port", "host_port", "backup_device_port")


def network_rules(table: Table, product: str, intra_roce: bool) -> Iterator[Finding]:
    """All that HCCL on this product would refuse of them."""
    yield from _addresses(table)
    yield from _missing_addresses(table, product, intra_roce)
    yield from _families(table)
    yield from _ports(table)


def _addresses(table: Table) -> Iterator[Finding]:
    first_of: dict[str, str] = {}
    number = None
    for device in table.devices:
        where, addresses = f"{device.where}.device_ip", _split(device)
        for address in addresses:
            if not is_address(address):
                text = f"expected an IP address, found “{address}”; see /etc/hccn.conf"
                yield Finding(8, PARA, where, text)
            elif address in first_of:
                text = f"expected another one than {first_of[address]} has, found {address} again"
                yield Finding(8, PARA, where, f"{text}; see /etc/hccn.conf")
            first_of.setdefault(address, device.where)
        found = max(1, len(addresses))  # none counts as one that is not valid
        number = number or found
        if found != number:
            text = f"expected as many addresses as the first device has, {number}, found {found}"
            yield Finding(8, PARA, where, f"{text}; add or remove some")
    for server in table.servers:
        host = server.values.get("host_ip", "")
        if host and not is_address(host):
            text = f"expected an IP address, found “{host}”; correct it or leave it out"
            yield Finding(8, PARA, f"{server.where}.host_ip", text)


def _missing_addresses(table: Table, product: str, roce: bool) -> Iterator[Finding]:
    if len(table.servers) <= 1 and not roce:
        return
    if product == "A3" and table.pods is not None and len(table.pods) <= 1 and not roce:
        return
    for server in table.servers:
        if product == "910A" and is_address(server.values.get("host_ip", "")):
            continue
        for device in server.parts:
            if not _split(device):
                text = "expected the device's address, because there are several servers or "
                text += "HCCL_INTRA_ROCE_ENABLE=1, found none; see /etc/hccn.conf"
                yield Finding(9, "EI0014", f"{device.where}.device_ip", text)


def _families(table: Table) -> Iterator[Finding]:
    hosts = ((server, [server.values.get("host_ip", "")]) for server in table.servers)
    places = (
        ("device_ip", "EI0001", ((device, _split(device)) for device in table.devices)),
        ("host_ip", "EI0014", hosts if len(table.servers) > 1 else iter(())),
    )
    for key, code, found in places:
        first = None
        for entry, addresses in found:
            for address in filter(is_address, addresses):
                family = ip_address(address).version
                first = first or family
                if family != first:
                    text = f"expected IPv{first} as the first has, found {address}; use one family"
                    yield Finding(10, code, f"{entry.where}.{key}", text)


def _ports(table: Table) -> Iterator[Finding]:
    for server in table.servers:
        hosts: dict[str, str] = {}
        for device in server.parts:
            for key in (key for key in _PORTS if key in device.values):
                port, where = device.values[key], f"{device.where}.{key}"
                if not (decimal(port) and 1 <= int(port) <= 65535):
                    text = f'expected a port from 1 to 65535, found "{port}"; correct it'
                    yield Finding(17, PARA, where, text)
                elif key == "host_port":
                    if port in hosts:
                        text = f"expected another port than {hosts[port]} has, found {port} again"
                        yield Finding(17, DOCUMENTED, where, f"{text}; give each its own")
                    hosts.setdefault(port, device.where)


def _split(device: Entry) -> list[str]:
    return [part for part in device.values.get("device_ip", "").split(",") if part]
