"""This machine's name for others."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping

_NOT_OURS = ("docker", "virbr", "veth", "br-", "cni", "cali", "flannel", "tunl")
"""Interfaces whose addresses are the same on every host, or only seen from inside."""


def host_address(environment: Mapping[str, str] = os.environ) -> str:
    """The address by which HCCL on other machines reaches this one; the host name if it has none.

    HCCL_IF_IP if it is set, else the first interface by name that is up and faces a network, IPv4
    before IPv6, which is HCCL's own order. Never a loopback address: the host name often stands
    for 127.0.1.1, on every machine alike.
    """
    import psutil

    if environment.get("HCCL_IF_IP"):
        return environment["HCCL_IF_IP"]
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    interfaces = sorted(psutil.net_if_addrs().items())
    for family in (socket.AF_INET, socket.AF_INET6):
        for name, addresses in interfaces:
            if name not in up or name.startswith(_NOT_OURS):
                continue
            for address in addresses:
                if address.family == family and _reachable(address.address):
                    return str(address.address)
    return socket.gethostname()


def is_loopback(server_id: str) -> bool:
    """Is it an address that means "myself" on every machine?"""
    try:
        return ipaddress.ip_address(server_id).is_loopback
    except ValueError:
        return server_id == "localhost"


def is_private(host: str) -> bool:
    """Do all addresses of a host, given by name or address, belong to networks of one's own?

    A name that nobody knows counts as private: who cannot be reached needs no warning.
    """
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except socket.gaierror:
        return True
    return all(ipaddress.ip_address(address.partition("%")[0]).is_private for address in found)


def _reachable(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:  # with a scope, fe80::1%eth0
        return False
    return not (address.is_loopback or address.is_link_local)
