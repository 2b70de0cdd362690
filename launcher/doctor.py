"""`lora-launch doctor`: is this machine fit for a run?"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster import checks, ports
from cluster.checks import Finding, Status
from cluster.devices import Machine, this_machine
from cluster.errors import ClusterError
from cluster.facts import folder_facts, host_facts, npu_facts
from cluster.mounted_table import read_when_complete
from cluster.nodes import Nodes, this_node
from cluster.npu_checks import check_npus
from registry.api import open_registry
from registry.errors import RegistryError
from trainer.config import RunConfig


def examine(config: RunConfig | None, environment: Mapping[str, str]) -> list[Finding]:
    """Every check that can be made; those of folders and registry need a config."""
    host = host_facts()
    nodes, findings = _nodes(environment)
    findings = [*checks.check_host(host, nodes), *findings, _port(nodes)]
    machine = this_machine(environment=environment)
    findings.append(Finding("devices", Status.OK, str(machine)))
    if machine.device_target == "Ascend":
        findings += check_npus(npu_facts(machine.device_ids, environment), host)
    else:
        findings.append(_no_npus(machine))
    if config is None:
        missing = "name a config, whose folders and registry are looked at"
        return [*findings, Finding("disk and registry", Status.NOT_CHECKED, missing)]
    for key, folder in (("output", config.output), ("cache", config.cache)):
        if folder is not None:
            findings += checks.check_folder(folder_facts(key, Path(folder)))
    if config.registry is not None:
        findings.append(checks.check_registry(config.registry, _registry_problem(config)))
    return findings


def text(findings: Sequence[Finding]) -> str:
    """The findings, one a line."""
    status = max(len(finding.status.value) for finding in findings)
    check = max(len(finding.check) for finding in findings)
    return "\n".join(
        f"{finding.status.value:<{status}}  {finding.check:<{check}}  {finding.text}"
        for finding in findings
    )


def as_dict(findings: Sequence[Finding]) -> dict[str, object]:
    """The findings as plain values."""
    listed = [
        {"check": finding.check, "status": finding.status.value, "text": finding.text}
        for finding in findings
    ]
    return {"fit": checks.exit_code(findings) == 0, "findings": listed}


def _nodes(environment: Mapping[str, str]) -> tuple[Nodes, list[Finding]]:
    try:
        nodes = this_node(environment, rank_table=read_when_complete(seconds=1))
    except ClusterError as error:
        return Nodes(), [Finding("nodes", Status.PROBLEM, str(error))]
    address = None
    if nodes.master_addr is not None:
        with contextlib.suppress(OSError):
            address = socket.getaddrinfo(nodes.master_addr, None)[0][4][0]
    return nodes, [checks.check_master(nodes, None if address is None else str(address))]


def _port(nodes: Nodes) -> Finding:
    """Of the scheduler, which runs on node 0."""
    if nodes.node_rank:
        return Finding("scheduler port", Status.NOT_CHECKED, "the scheduler runs on node 0")
    try:
        return checks.check_port(ports.choose_port("0.0.0.0" if nodes.nnodes > 1 else "127.0.0.1"))
    except ClusterError:
        return checks.check_port(None)


def _no_npus(machine: Machine) -> Finding:
    reason = f"this machine has {machine} and no NPU"
    return Finding("driver, CANN, links", Status.NOT_CHECKED, reason)


def _registry_problem(config: RunConfig) -> str | None:
    """Why the run could not publish; None if it could."""
    assert config.registry is not None
    try:
        open_registry(config.registry).check_push(config.name)
    except RegistryError as error:
        return str(error)
    folder = Path(config.registry).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    if "://" not in config.registry and not os.access(folder, os.W_OK | os.X_OK):
        return f"{config.registry}: expected a folder to write to, found no permission in {folder}"
    return None
