"""The checks of NPUs, their driver, CANN and network.

Versions: MindSpore 2.10's own list of CANN versions (mindspore/run_check/_check_version.py) and the
release notes of CANN 8.5, 9.0 and 9.1, which say from which Ascend HDK on each runs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from cluster.checks import Finding, Status
from cluster.facts import HCCL_PORTS, HostFacts, NpuFacts

CANN = ("8.2", "8.3", "8.5", "9.0", "9.1")
_OLDEST_DRIVER = {"9.1": (25, 2)}
_OLDEST_DRIVER_OF_OTHERS = (25, 0)
"""Published for 8.5 and 9.0; 8.2 and 8.3 ask for no more than what came after them."""


def check_npus(npu: NpuFacts, host: HostFacts) -> list[Finding]:
    """All of them."""
    return [
        check_cann(npu),
        check_driver(npu),
        check_health(npu),
        check_links(npu),
        check_device_tls(npu),
        check_hccl_ports(npu),
        check_locked_memory(host),
    ]


def check_cann(npu: NpuFacts) -> Finding:
    """Set up in the environment, and of a version that MindSpore takes."""
    if npu.cann_home is None:
        return Finding(
            "CANN", Status.PROBLEM, "ASCEND_HOME_PATH is not set; source CANN's set_env.sh"
        )
    version = _version(npu.cann)
    if version is None:
        return _not_checked("CANN", f"no version in {npu.cann_home}/compiler/version.info")
    if _cann_line(version) not in CANN:
        return Finding(
            "CANN",
            Status.PROBLEM,
            f"expected {', '.join(CANN[:-1])} or {CANN[-1]} with MindSpore 2.10, found {version}; "
            "install one of them",
        )
    return Finding("CANN", Status.OK, version)


def check_driver(npu: NpuFacts) -> Finding:
    """No older than the CANN that is installed needs."""
    version = _version(npu.driver)
    if version is None:
        return _not_checked("driver", "no version in /usr/local/Ascend/driver/version.info")
    cann = _version(npu.cann) or ""
    needed = _OLDEST_DRIVER.get(_cann_line(cann), _OLDEST_DRIVER_OF_OTHERS)
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < needed:
        expected = ".".join(map(str, needed))
        return Finding(
            "driver",
            Status.PROBLEM,
            f"expected Ascend HDK {expected} or newer with CANN {cann or 'of any version'}, found "
            f"{version}; install a newer driver and firmware",
        )
    return Finding("driver", Status.OK, version)


def check_health(npu: NpuFacts) -> Finding:
    """`npu-smi info -t health`: OK, Warning, Alarm, Critical or UNKNOWN."""
    found = _answers(npu.health, r"^\s*Health(?: Status)?\s*:\s*(\w+)")
    silent = [n for n, answer in found.items() if answer is None]
    bad = {n: answer for n, answer in found.items() if answer not in (None, "OK")}
    if bad:
        status = Status.WARNING if set(bad.values()) == {"Warning"} else Status.PROBLEM
        return Finding(
            "health",
            status,
            f"{_each(bad)}; see `npu-smi info` and the black-box error codes, or leave the device "
            "out with --devices",
        )
    if silent:
        return _not_checked("health", f"npu-smi says nothing of {_devices(silent)}")
    return Finding("health", Status.OK, f"{_devices(list(found))} OK")


def check_links(npu: NpuFacts) -> Finding:
    """`hccn_tool -link -g`: UP or DOWN."""
    found = _answers(npu.link, r"link status\s*:\s*(\w+)")
    down = {n: answer for n, answer in found.items() if answer not in (None, "UP")}
    if down:
        return Finding(
            "links",
            Status.WARNING,
            f"{_each(down)}; on several machines check cable, optics and switch port",
        )
    silent = [n for n, answer in found.items() if answer is None]
    if silent:
        return _not_checked("links", f"hccn_tool says nothing of {_devices(silent)}")
    return Finding("links", Status.OK, f"{_devices(list(found))} UP")


def check_device_tls(npu: NpuFacts) -> Finding:
    """`hccn_tool -tls -g`: the switch has to be alike on all devices of a run (EI0016)."""
    found = _answers(npu.tls, r"tls switch\s*\[(\d)\]")
    silent = [n for n, answer in found.items() if answer is None]
    if silent:
        return _not_checked("device TLS", f"hccn_tool says nothing of {_devices(silent)}")
    values = Counter(found.values())
    if len(values) > 1:
        least = min(values, key=lambda value: values[value])
        odd = [n for n, answer in found.items() if answer == least]
        return Finding(
            "device TLS",
            Status.PROBLEM,
            f"the switch is {least} on {_devices(odd)} and not on the others; make them alike with "
            "hccn_tool -i N -tls -s enable 0",
        )
    (value,) = values
    return Finding("device TLS", Status.OK, f"{'on' if value == '1' else 'off'} on every device")


def check_hccl_ports(npu: NpuFacts) -> Finding:
    """Free, and not among those that the kernel gives away."""
    first, last = HCCL_PORTS[0], HCCL_PORTS[-1]
    if npu.busy_ports:
        busy = ", ".join(map(str, npu.busy_ports))
        return Finding(
            "HCCL ports",
            Status.PROBLEM,
            f"{busy} of {first} to {last} in use; end what listens there, or move them all with "
            "HCCL_IF_BASE_PORT",
        )
    reserved = _ports(npu.reserved_ports)
    if any(port in npu.ephemeral_ports and port not in reserved for port in HCCL_PORTS):
        return Finding(
            "HCCL ports",
            Status.WARNING,
            f"the kernel may give {first} to {last} to other connections; run sysctl -w "
            f"net.ipv4.ip_local_reserved_ports={first}-{last}",
        )
    return Finding("HCCL ports", Status.OK, f"{first} to {last} are free")


def check_locked_memory(host: HostFacts) -> Finding:
    """RDMA locks the memory that it sends from."""
    if host.memlock >= 0:
        return Finding(
            "locked memory",
            Status.WARNING,
            f"expected no limit, found {host.memlock:,} bytes; run ulimit -l unlimited",
        )
    return Finding("locked memory", Status.OK, "no limit")


def _version(text: str | None) -> str | None:
    """`Version=25.2.0` in a version.info."""
    match = re.search(r"^Version=\s*(\d+\.\S+)\s*$", text or "", re.MULTILINE)
    return match[1] if match else None


def _cann_line(version: str) -> str:
    """ "8.3.RC1" is of 8.3."""
    return ".".join(version.split(".")[:2])


def _answers(texts: Mapping[int, str | None], pattern: str) -> dict[int, str | None]:
    """The word that a tool gives for each device."""
    found: dict[int, str | None] = {}
    for device_id, text in texts.items():
        match = re.search(pattern, text or "", re.MULTILINE | re.IGNORECASE)
        found[device_id] = match[1] if match else None
    return found


def _ports(text: str) -> set[int]:
    """ "60000-60031,8080" as numbers."""
    found: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _devices(ids: list[int]) -> str:
    return f"device{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids))}"


def _each(answers: Mapping[int, str | None]) -> str:
    return ", ".join(f"device {n} is {answer}" for n, answer in answers.items())


def _not_checked(check: str, reason: str) -> Finding:
    return Finding(check, Status.NOT_CHECKED, reason)
