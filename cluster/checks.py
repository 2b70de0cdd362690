"""Is a machine fit for a run? Facts in, findings out; each says in one sentence what to do."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from cluster.facts import FolderFacts, HostFacts
from cluster.nodes import Nodes


class Status(str, Enum):
    """How a check came out."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    status: Status
    text: str


_MINDSPORE = "2.10"
_GB = 10**9


def check_host(host: HostFacts, nodes: Nodes) -> list[Finding]:
    """The checks that suit any machine."""
    return [
        check_mindspore(host),
        check_numpy(host),
        check_hostname(host, nodes),
        check_open_files(host),
        check_shared_memory(host),
    ]


def check_mindspore(host: HostFacts) -> Finding:
    """Installed, of the version that this program is written for. Nothing is imported."""
    remedy = f"install mindspore {_MINDSPORE}"
    if host.mindspore is None:
        return _problem("MindSpore", f"not installed; {remedy}")
    if not re.match(re.escape(_MINDSPORE) + r"(\.|$)", host.mindspore):
        return _problem("MindSpore", f"expected {_MINDSPORE}, found {host.mindspore}; {remedy}")
    return _ok("MindSpore", host.mindspore)


def check_numpy(host: HostFacts) -> Finding:
    """MindSpore is built against numpy 1.x."""
    if host.numpy is None:
        return _problem("numpy", "not installed; install numpy 1.26")
    if int(host.numpy.partition(".")[0]) >= 2:
        return _problem("numpy", f"expected less than 2, found {host.numpy}; install numpy 1.26")
    return _ok("numpy", host.numpy)


def check_hostname(host: HostFacts, nodes: Nodes) -> Finding:
    """Resolves, on several machines to an address that others reach."""
    if host.address is None:
        return _problem(
            "host name",
            f"{host.hostname} does not resolve; add it to /etc/hosts with this machine's address",
        )
    if nodes.nnodes > 1 and ipaddress.ip_address(host.address).is_loopback:
        return _warning(
            "host name",
            f"{host.hostname} resolves to {host.address}, which every machine may call itself; "
            "give it its own address in /etc/hosts",
        )
    return _ok("host name", f"{host.hostname}, {host.address}")


def check_master(nodes: Nodes, address: str | None) -> Finding:
    """`address` is what `nodes.master_addr` resolves to, if it does."""
    if nodes.nnodes == 1:
        return _ok("nodes", "this machine alone")
    place = f"node {nodes.node_rank} of {nodes.nnodes}, told by {nodes.told_by}"
    if address is None:
        return _problem(
            "nodes", f"{place}: {nodes.master_addr} does not resolve; name it in DNS or /etc/hosts"
        )
    found = ipaddress.ip_address(address)
    if found.is_loopback:
        return _problem(
            "nodes",
            f"{place}: {nodes.master_addr} is {address}, which no other machine reaches; name "
            "node 0's address in its network",
        )
    if not found.is_private:
        return _warning(
            "nodes",
            f"{place}: {nodes.master_addr} is {address}, which strangers may reach; name an "
            "address in a private network, or use cluster.tls",
        )
    return _ok("nodes", f"{place}; node 0 is {nodes.master_addr}")


def check_open_files(host: HostFacts) -> Finding:
    """Files, connections and libraries of one worker; 1024 is the usual default."""
    if 0 <= host.nofile < 4096:
        return _warning(
            "open files", f"expected a limit of 4096, found {host.nofile}; run ulimit -n 65536"
        )
    return _ok("open files", "no limit" if host.nofile < 0 else f"up to {host.nofile:,}")


def check_shared_memory(host: HostFacts) -> Finding:
    """A container's default, 64 MB, is too small for loading data in processes."""
    if host.shared_memory is None:
        return Finding("shared memory", Status.NOT_CHECKED, "there is no /dev/shm")
    size = f"{host.shared_memory / _GB:.1f} GB"
    if host.shared_memory < _GB:
        return _warning(
            "shared memory", f"expected 1 GB in /dev/shm, found {size}; enlarge it (--shm-size)"
        )
    return _ok("shared memory", size)


def check_folder(folder: FolderFacts) -> list[Finding]:
    """Room for checkpoints or latents, and a clock in step with this machine's."""
    name = f"{folder.key}: {folder.folder}"
    if folder.free is None or folder.skew is None:
        return [
            _problem("disk", f"{name} cannot be written; check its permissions or name another")
        ]
    free = f"{folder.free / _GB:.1f} GB free"
    if folder.free < _GB:
        found = [_problem("disk", f"{name}: expected 1 GB free, found {free}; make room")]
    elif folder.free < 10 * _GB:
        found = [_warning("disk", f"{name}: {free}, which a long run may fill; make room")]
    else:
        found = [_ok("disk", f"{name}: {free}")]
    if abs(folder.skew) > 2:
        found.append(
            _warning(
                "clock",
                f"{name}: its clock is {folder.skew:+.1f} s from this machine's; let NTP set both",
            )
        )
    return found


def check_registry(name: str, problem: str | None) -> Finding:
    """`problem` is what opening the registry and asking for a new version came to."""
    if problem is not None:
        return _problem("registry", problem)
    return _ok("registry", name)


def check_port(port: int | None) -> Finding:
    """`port` is a free one for the scheduler, if one was found."""
    if port is None:
        return _problem(
            "scheduler port", "none is free from 20000 to 29999; end what listens there"
        )
    return _ok("scheduler port", f"{port} is free")


def exit_code(findings: Sequence[Finding]) -> int:
    """0 if nothing is a problem, else 1."""
    return int(any(finding.status is Status.PROBLEM for finding in findings))


def _ok(check: str, text: str) -> Finding:
    return Finding(check, Status.OK, text)


def _warning(check: str, text: str) -> Finding:
    return Finding(check, Status.WARNING, text)


def _problem(check: str, text: str) -> Finding:
    return Finding(check, Status.PROBLEM, text)
