"""The network addresses of the NPUs: /etc/hccn.conf, else the driver's hccn_tool."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.errors import ClusterError
from cluster.probe import Answer, ask

HCCN_CONF = Path("/etc/hccn.conf")
SECONDS = 5.0
"""How long one call of hccn_tool may take."""

_LINE = re.compile(r"^\s*(IPv6)?address_(\d+)\s*=\s*(\S+)\s*$", re.MULTILINE)
_ANSWER = re.compile(r"^\s*ip(?:v6)?[ _]?addr(?:ess)?\s*:\s*(\S+)\s*$", re.MULTILINE | re.I)


class NoAddress(ClusterError):
    """Nothing is wrong, but a device has no address, or nobody can tell it."""


def device_addresses(
    device_ids: Sequence[int], conf: Path | None = None, seconds: float = SECONDS
) -> dict[int, str]:
    """Address of each device, by physical id; IPv4 before IPv6, as HCCL chooses.

    What `conf` (default: /etc/hccn.conf) does not say, hccn_tool is asked, for all devices at
    once. Raises NoAddress, or ClusterError if hccn_tool hangs or an address is none.
    """
    conf = conf or HCCN_CONF
    try:
        known = parse_conf(conf.read_text(encoding="utf-8", errors="replace"), conf)
    except OSError:  # absent, or for root only
        known = {}
    missing = [device_id for device_id in device_ids if device_id not in known]
    with ThreadPoolExecutor(max(1, len(missing))) as threads:
        asked = threads.map(lambda device_id: _ask(device_id, conf, seconds), missing)
        known |= dict(zip(missing, asked, strict=True))
    return {device_id: known[device_id] for device_id in device_ids}


def parse_conf(text: str, conf: Path = HCCN_CONF) -> dict[int, str]:
    """Address of each device from the text of hccn.conf (`address_0=…`, `IPv6address_0=…`).

    Raises ClusterError for one that is none.
    """
    found: dict[str, dict[int, str]] = {"": {}, "IPv6": {}}
    for version, device_id, address in _LINE.findall(text):
        if not is_address(address):
            raise ClusterError(
                f"{conf}: {version}address_{device_id}: expected an IP address, found {address}; "
                "correct the line"
            )
        found[version][int(device_id)] = address
    return found["IPv6"] | found[""]


def parse_answer(text: str) -> str | None:
    """The address in what `hccn_tool -i N -ip [-inet6] -g` prints; None if there is none."""
    return next(filter(is_address, _ANSWER.findall(text)), None)


def is_address(text: str) -> bool:
    """Is it an IPv4 or IPv6 address?"""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def tls_switches(device_ids: Sequence[int], seconds: float = SECONDS) -> dict[int, bool]:
    """Is TLS on? For each device that hccn_tool tells it of. Raises ClusterError if it hangs."""

    def switch(device_id: int) -> bool | None:
        answer = ask(["hccn_tool", "-i", str(device_id), "-tls", "-g"], seconds)
        match = re.search(r"tls switch\s*\[(\d)\]", answer.text) if answer else None
        return match[1] == "1" if match else None

    with ThreadPoolExecutor(max(1, len(device_ids))) as threads:
        found = zip(device_ids, threads.map(switch, device_ids), strict=True)
        return {device_id: on for device_id, on in found if on is not None}


def _ask(device_id: int, conf: Path, seconds: float) -> str:
    answers: list[Answer] = []
    for family in ([], ["-inet6"]):
        answer = ask(["hccn_tool", "-i", str(device_id), "-ip", *family, "-g"], seconds)
        if answer is None:
            raise NoAddress(
                f"{conf}: expected address_{device_id}, found none, and there is no hccn_tool to "
                "ask; write the line, or put the driver's tools on PATH"
            )
        if address := parse_answer(answer.text):
            return address
        answers.append(answer)
    answer = answers[0]
    kind = NoAddress if answer.exit_code else ClusterError
    raise kind(
        f"{answer.command}: expected the line ipaddr:ADDRESS, found {answer.found}; give the "
        f"device an address with hccn_tool -i {device_id} -ip -s address A netmask M, or write "
        f"address_{device_id}=A into {conf}"
    )
