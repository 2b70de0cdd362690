"""What the driver's programs say, by fake ones on PATH that are right, hang, or print rubbish."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import cluster.addresses
from cluster.addresses import NoAddress, device_addresses, parse_conf, tls_switches
from cluster.errors import ClusterError
from cluster.host import host_address
from cluster.npu_smi import npus, parse_info, places, product
from cluster.server import this_server

Fake = Callable[[str, str], Path]

A2_INFO = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.rc2                 Version: 24.1.rc2                                             |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 93.2        36                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3390 / 65536         |
+===========================+===============+====================================================+
| 5     910B3               | Warning       | 93.2        36                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          3390 / 65536         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 0       0                 | 4711          | python                   | 100                     |
+===========================+===============+====================================================+
"""
A3_INFO = """\
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
| 0     Ascend910           | OK            | 167.6       37                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3129 / 65536         |
| 0     Ascend910           | OK            | -           36                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          2907 / 65536         |
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put a program of this name and shell text before all others on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(cluster.addresses, "HCCN_CONF", tmp_path / "hccn.conf")

    def put(name: str, script: str) -> Path:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        return path

    return put


def test_addresses_of_hccn_conf() -> None:
    text = (
        "address_0=192.168.1.1\n #address_3=1.1.1.1\nIPv6address_0=fd00::1\naddress_10 = 10.0.0.9\n"
    )
    text += "IPv6address_4=fd00::4\nnetmask_0=255.255.255.0\n"
    assert parse_conf(text) == {0: "192.168.1.1", 10: "10.0.0.9", 4: "fd00::4"}
    with pytest.raises(ClusterError, match="address_1: expected an IP address, found 300"):
        parse_conf("address_1=300.1.1.1")


def test_what_the_file_lacks_is_asked_of_the_program(tmp_path: Path, fake: Fake) -> None:
    (tmp_path / "hccn.conf").write_text("address_0=192.168.1.1\n")
    fake("hccn_tool", 'echo "ipaddr:192.168.2.$2"; echo "netmask:255.255.255.0"')
    assert device_addresses([0, 3]) == {0: "192.168.1.1", 3: "192.168.2.3"}


def test_ipv6_is_asked_for_where_there_is_no_ipv4(fake: Fake) -> None:
    fake("hccn_tool", 'case "$*" in *inet6*) echo "ipv6 addr:fd00::7";; *) exit 1;; esac')
    assert device_addresses([7]) == {7: "fd00::7"}


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        (
            "echo none of your business",
            ClusterError,
            "the line ipaddr:ADDRESS, found “none of",
        ),
        ("echo no device; exit 3", NoAddress, "found exit code 3 and “no device”"),
        ("printf '\\000\\033[2J'; exit 0", ClusterError, "found “�"),
        ("yes rubbish", ClusterError, "found more than 1,048,576 bytes"),
    ],
)
def test_program_that_prints_rubbish(
    fake: Fake, script: str, kind: type[Exception], message: str
) -> None:
    fake("hccn_tool", script)
    with pytest.raises(kind, match=r"hccn_tool -i 0 -ip .*-g: ") as caught:
        device_addresses([0])
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_program_that_hangs_is_killed_with_all_it_has_started(tmp_path: Path, fake: Fake) -> None:
    fake("hccn_tool", f"sleep 1000 & echo $! > {tmp_path}/pid; wait")
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"expected an answer within 0\.5 s, found none"):
        device_addresses([0], seconds=0.5)
    assert time.monotonic() - began < 10
    sleeper = int((tmp_path / "pid").read_text())
    psutil.wait_procs([psutil.Process(sleeper)] if psutil.pid_exists(sleeper) else [], timeout=5)
    assert not psutil.pid_exists(sleeper) or psutil.Process(sleeper).status() == "zombie"


def test_no_file_and_no_program(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NoAddress, match="there is no hccn_tool to ask"):
        device_addresses([0])


def test_tls_switches(fake: Fake) -> None:
    fake(
        "hccn_tool",
        'test "$2" = 1 && echo "dev_id:1, tls switch[1](0:disable, 1:enable)" || exit 1',
    )
    assert tls_switches([0, 1]) == {1: True}


def test_npus_are_listed(fake: Fake) -> None:
    fake("npu-smi", f"cat <<'END'\n{A2_INFO}END")
    found = npus()
    assert found is not None
    assert [(n.device_id, n.name, n.health, n.product) for n in found] == [
        (0, "910B3", "OK", "A2"),
        (5, "910B3", "Warning", "A2"),
    ]
    assert [(n.used_bytes, n.memory_bytes) for n in found] == [(3390 << 20, 64 << 30)] * 2
    assert [(n.device_id, n.card_id, n.chip_id, n.product) for n in parse_info(A3_INFO)] == [
        (0, 0, 0, "A3"),
        (1, 0, 1, "A3"),
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("910B", "910A"), ("910A", "910A"), ("910ProB", "910A"), ("910B4", "A2"), ("310P3", None),
     ("910_9392", "A3"), ("Ascend 910B1", "A2")],
)  # fmt: skip
def test_products(name: str, expected: str | None) -> None:
    assert product(name) == expected


def test_memory_that_npu_smi_does_not_tell() -> None:
    text = A2_INFO.replace("3390 / 65536", "0    / 0    ").replace("0    / 0  ", "-         ")
    assert {(n.used_bytes, n.memory_bytes) for n in parse_info(text)} == {(None, None)}


@pytest.mark.parametrize("script", ["exit 1", "echo hello", "yes"])
def test_npu_smi_that_lists_nothing(fake: Fake, script: str) -> None:
    fake("npu-smi", script)
    with pytest.raises(ClusterError, match="npu-smi info: expected a"):
        npus(5.0)


def test_without_npu_smi(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert npus() is None


SPOD = """case "$*" in
*spod-info*) echo "SDID : $((16777216 + $6))"; echo "Super Pod ID : 4";;
*) cat <<'END'
{info}END
;; esac"""


def test_server_of_a_super_pod(fake: Fake) -> None:
    fake("npu-smi", SPOD.format(info=A3_INFO))
    fake("hccn_tool", "exit 1")
    assert places(parse_info(A3_INFO)).keys() == {0, 1}
    found = this_server([0, 1], server_id="node-a")
    assert found.super_pod_id == "4"
    assert {d.device_id: d.device_ip for d in found.devices} == {0: None, 1: None}
    assert all(d.super_device_id is not None for d in found.devices)


def test_a_ring_crossed(fake: Fake) -> None:
    with pytest.raises(ClusterError, match="--devices 2,3,4,5: expected 4 devices of one ring"):
        this_server([2, 3, 4, 5], "910A", "a")


def test_the_host_is_known_by_an_address_that_others_have_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not host_address({}).startswith("127.")
    assert host_address({"HCCL_IF_IP": "10.1.2.3"}) == "10.1.2.3"
    monkeypatch.setattr(psutil, "net_if_addrs", dict)
    monkeypatch.setattr("socket.gethostname", lambda: "node-a")
    assert host_address({}) == "node-a"
