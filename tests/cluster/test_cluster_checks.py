"""Each check with facts that pass and facts that do not; the facts from stand-ins for the tools."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import checks, facts, npu_checks
from cluster.checks import Finding, Status
from cluster.facts import FolderFacts, HostFacts, NpuFacts
from cluster.nodes import Nodes

HOST = HostFacts(
    mindspore="2.10.0",
    numpy="1.26.4",
    hostname="npu08",
    address="10.0.0.8",
    nofile=65536,
    memlock=-1,
    shared_memory=64 * 10**9,
)
HEALTH = "\tHealth Status                  : OK\n\tError Code                     : NA\n"
TLS = "dev_id:0, tls switch[0](0:disable, 1:enable), tls preconfigured[1]\n"
NPU = NpuFacts(
    driver="Version=25.2.0\nascendhal_version=7.35.23\npackage_version=25.2.0\n",
    cann="Version=8.5.0\ntimestamp=20260101\n",
    cann_home="/usr/local/Ascend/cann",
    health={0: HEALTH, 1: HEALTH},
    link={0: "link status: UP\n", 1: "link status: UP\n"},
    tls={0: TLS, 1: TLS},
    busy_ports=(),
    ephemeral_ports=range(32768, 61000),
    reserved_ports="60000-60031",
)
TWO = Nodes(2, 1, "npu08", told_by="Slurm")
FOLDER = FolderFacts("output", "/data/runs", 10**12, 0.0)


def test_all_is_well() -> None:
    found = [*checks.check_host(HOST, TWO), *npu_checks.check_npus(NPU, HOST)]
    found += [checks.check_master(TWO, "10.0.0.8"), *checks.check_folder(FOLDER)]
    found += [checks.check_registry("loras", None), checks.check_port(20001)]
    assert [finding for finding in found if finding.status is not Status.OK] == []
    assert checks.exit_code(found) == 0


HostCheck = Callable[[HostFacts], Finding]


@pytest.mark.parametrize(
    ("check", "changes", "status", "text"),
    [
        (checks.check_mindspore, {"mindspore": None}, "problem", "install mindspore 2.10"),
        (checks.check_mindspore, {"mindspore": "2.1.0"}, "problem", "expected 2.10, found 2.1.0"),
        (checks.check_numpy, {"numpy": "2.1.0"}, "problem", "expected less than 2, found 2.1.0"),
        (checks.check_numpy, {"numpy": None}, "problem", "not installed"),
        (checks.check_open_files, {"nofile": 1024}, "warning", "run ulimit -n 65536"),
        (checks.check_open_files, {"nofile": -1}, "ok", "no limit"),
        (checks.check_shared_memory, {"shared_memory": 2**26}, "warning", "found 0.1 GB"),
        (checks.check_shared_memory, {"shared_memory": None}, "not checked", "no /dev/shm"),
        (npu_checks.check_locked_memory, {"memlock": 65536}, "warning", "ulimit -l unlimited"),
    ],
)
def test_host(check: HostCheck, changes: dict[str, object], status: str, text: str) -> None:
    finding = check(replace(HOST, **changes))  # type: ignore[arg-type]
    assert finding.status.value == status
    assert text in finding.text


@pytest.mark.parametrize(
    ("address", "nodes", "status"),
    [
        (None, Nodes(), "problem"),
        ("127.0.1.1", TWO, "warning"),
        ("127.0.1.1", Nodes(), "ok"),
    ],
)
def test_host_name(address: str | None, nodes: Nodes, status: str) -> None:
    assert checks.check_hostname(replace(HOST, address=address), nodes).status.value == status


@pytest.mark.parametrize(
    ("address", "status", "text"),
    [
        (None, "problem", "npu08 does not resolve"),
        ("127.0.1.1", "problem", "no other machine reaches"),
        ("8.8.8.8", "warning", "strangers may reach"),
        ("fd00::1", "ok", "node 1 of 2, told by Slurm"),
    ],
)
def test_master_address(address: str | None, status: str, text: str) -> None:
    finding = checks.check_master(TWO, address)
    assert finding.status.value == status
    assert text in finding.text


@pytest.mark.parametrize(
    ("changes", "statuses", "text"),
    [
        ({"free": 10**8}, ["problem"], "expected 1 GB free, found 0.1 GB"),
        ({"free": 5 * 10**9}, ["warning"], "5.0 GB free, which a long run may fill"),
        ({"skew": -9.0}, ["ok", "warning"], "its clock is -9.0 s from this machine's"),
        ({"skew": None}, ["problem"], "cannot be written"),
    ],
)
def test_folders(changes: dict[str, float], statuses: list[str], text: str) -> None:
    found = checks.check_folder(replace(FOLDER, **changes))  # type: ignore[arg-type]
    assert [finding.status.value for finding in found] == statuses
    assert text in found[-1].text


def test_registry_and_port() -> None:
    assert checks.check_registry("loras", "loras: no").status is Status.PROBLEM
    assert checks.check_port(None).status is Status.PROBLEM
    assert checks.exit_code([checks.check_port(None)]) == 1


NpuCheck = Callable[[NpuFacts], Finding]


@pytest.mark.parametrize(
    ("check", "changes", "status", "text"),
    [
        (npu_checks.check_cann, {"cann_home": None}, "problem", "source CANN's set_env.sh"),
        (npu_checks.check_cann, {"cann": None}, "not checked", "compiler/version.info"),
        (npu_checks.check_cann, {"cann": "Version=7.0.0\n"}, "problem", "found 7.0.0"),
        (npu_checks.check_cann, {"cann": "Version=8.3.RC1\n"}, "ok", "8.3.RC1"),
        (npu_checks.check_driver, {"driver": None}, "not checked", "no version"),
        (npu_checks.check_driver, {"driver": "rubbish"}, "not checked", "no version"),
        (
            npu_checks.check_driver,
            {"driver": "Version=24.1.rc3\n"},
            "problem",
            "expected Ascend HDK 25.0 or newer with CANN 8.5.0, found 24.1.rc3",
        ),
        (
            npu_checks.check_driver,
            {"driver": "Version=25.0.1\n", "cann": "Version=9.1.0\n"},
            "problem",
            "expected Ascend HDK 25.2 or newer with CANN 9.1.0",
        ),
        (
            npu_checks.check_health,
            {"health": {0: HEALTH, 1: HEALTH.replace("OK", "Alarm")}},
            "problem",
            "device 1 is Alarm",
        ),
        (
            npu_checks.check_health,
            {"health": {0: "  Health : OK\n", 1: HEALTH.replace("OK", "Warning")}},
            "warning",
            "device 1 is Warning",
        ),
        (npu_checks.check_health, {"health": {0: HEALTH, 1: None}}, "not checked", "of device 1"),
        (npu_checks.check_health, {"health": {0: "%$&"}}, "not checked", "of device 0"),
        (
            npu_checks.check_links,
            {"link": {0: "link status: UP", 1: "link status: DOWN"}},
            "warning",
            "device 1 is DOWN",
        ),
        (npu_checks.check_links, {"link": {0: None, 1: None}}, "not checked", "devices 0, 1"),
        (
            npu_checks.check_device_tls,
            {"tls": {0: TLS, 1: TLS, 2: TLS.replace("[0]", "[1]")}},
            "problem",
            "the switch is 1 on device 2",
        ),
        (npu_checks.check_device_tls, {"tls": {0: None}}, "not checked", "hccn_tool says nothing"),
        (npu_checks.check_hccl_ports, {"busy_ports": [60007]}, "problem", "60007 of 60000"),
        (npu_checks.check_hccl_ports, {"reserved_ports": "8080"}, "warning", "sysctl -w"),
        (
            npu_checks.check_hccl_ports,
            {"reserved_ports": "", "ephemeral_ports": range(32768, 60000)},
            "ok",
            "are free",
        ),
    ],
)
def test_npus(check: NpuCheck, changes: dict[str, object], status: str, text: str) -> None:
    finding = check(replace(NPU, **changes))  # type: ignore[arg-type]
    assert finding.status.value == status
    assert text in finding.text
    assert "\n" not in finding.text


# ---- gathering


def fake(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for stand-ins, first on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}/tools:/usr/bin:/bin")
    return tmp_path / "tools"


def test_tools_are_asked_for_each_device(tools: Path, tmp_path: Path) -> None:
    table = "NPU ID  Chip ID  Chip Logic ID  Chip Name\\n4 0 0 Ascend 910B\\n4 1 - Mcu\\n5 0 1 A"
    health = f'case "$*" in *-m) printf "{table}\\n";; *"-i 5 -c 0") echo "Health Status : Alarm";;'
    fake(tools, "npu-smi", f'{health} *) echo "Health Status : OK";; esac')
    answers = '*link*) echo "link status: UP";; *tls*) echo "dev_id:$2, tls switch[$2](0:disable)"'
    fake(tools, "hccn_tool", f'case "$*" in {answers};; esac')
    home = tmp_path / "cann"
    (home / "compiler").mkdir(parents=True)
    (home / "compiler" / "version.info").write_text("Version=9.0.1\n")
    found = facts.npu_facts((0, 1), {"ASCEND_HOME_PATH": str(home)})
    assert npu_checks.check_cann(found).text == "9.0.1"
    assert npu_checks.check_health(found).text.startswith("device 1 is Alarm")
    assert npu_checks.check_links(found).status is Status.OK
    assert npu_checks.check_device_tls(found).status is Status.PROBLEM


def test_tools_that_hang_fail_or_print_rubbish(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "_SECONDS", 0.3)
    fake(tools, "hangs", "exec sleep 60")
    fake(tools, "fails", "echo no; exit 3")
    fake(tools, "rubbish", "printf '\\377\\376'")
    start = time.monotonic()
    assert facts.ask("hangs") is None
    assert time.monotonic() - start < 5
    assert facts.ask("fails") is None
    assert facts.ask("missing") is None
    assert facts.ask("rubbish") == "\ufffd\ufffd"


def test_host_facts() -> None:
    found = facts.host_facts()
    assert found.mindspore is not None
    assert found.hostname


def test_folder_facts(tmp_path: Path) -> None:
    found = facts.folder_facts("output", tmp_path / "not" / "yet")
    assert found.free
    assert found.skew is not None
    assert abs(found.skew) < 1
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    assert facts.folder_facts("output", tmp_path / "file").skew is None
