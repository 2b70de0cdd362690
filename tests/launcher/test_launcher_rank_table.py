"""`lora-launch rank-table`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from launcher.cli import main
from tests.cluster.tables import GOLDEN

HOSTS = """\
product: A2
servers:
  - server_id: 10.0.0.1
    devices: 8
    device_ips: [{first}]
  - server_id: 10.0.0.2
    devices: 0-7
    device_ips: [{second}]
"""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["rank-table", *map(str, arguments)])


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    path = tmp_path / "hosts.yaml"
    lists = [", ".join(f"192.168.{n}.{i + 1}" for i in range(8)) for n in (100, 101)]
    path.write_text(HOSTS.format(first=lists[0], second=lists[1]))
    return path


def test_table_of_a_host_file(hosts: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    result = invoke("generate", "--hosts", hosts, "--out", out)
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    assert out.read_text() == (GOLDEN / "a2_2x8.json").read_text()
    assert invoke("generate", "--hosts", hosts).stdout == out.read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("product: A2", "product: B2", "product: expected one of 910A, A2, A3, found B2"),
        ("devices: 8", "devices: 4-2", "servers[0].devices: 4-2 counts down"),
        ("devices: 8", "devices: 9", "servers[0].device_ips: expected a list of 9"),
        ("server_id: 10.0.0.2", "server: x", "servers[1]: expected only the keys"),
        ("192.168.100.1,", "192.168.100.300,", "expected IP addresses, found 192.168.100.300"),
        ("10.0.0.2", "10.0.0.1", "found it on servers 0 and 1"),
        ("10.0.0.2", "127.0.1.1", "found a loopback address"),
        ("servers:", "servers: [", "expected YAML"),
    ],
)
def test_host_file_that_is_wrong(hosts: Path, old: str, new: str, message: str) -> None:
    hosts.write_text(hosts.read_text().replace(old, new))
    result = invoke("generate", "--hosts", hosts)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_merged_tables_are_numbered_in_the_order_given(tmp_path: Path) -> None:
    text = (GOLDEN / "a2_8.json").read_text()
    (tmp_path / "0.json").write_text(text)
    other = text.replace("192.168.100.", "192.168.101.").replace("10.0.0.1", "10.0.0.2")
    (tmp_path / "1.json").write_text(other)
    merged = invoke("merge", tmp_path / "0.json", tmp_path / "1.json").stdout
    assert merged == (GOLDEN / "a2_2x8.json").read_text()
    again = invoke("merge", tmp_path / "0.json", tmp_path / "0.json")
    assert (again.exit_code, "found it on servers 0 and 1" in again.stderr) == (2, True)


def test_check(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    text = (GOLDEN / "a2_2x8.json").read_text()
    path.write_text(text)
    result = invoke("check", "--product", "A2", path)
    assert (result.exit_code, result.stdout) == (0, f"{path}: right; fits 910A, A2, A3\n")
    path.write_text(text.replace('"rank_id": "9"', '"rank_id": "8"'))
    result = invoke("check", path)
    assert result.exit_code == 2
    assert "EI0014  rule 11  server_list[1].device[1].rank_id: expected another" in result.stdout
    found = json.loads(invoke("check", "--json", path).stdout)
    assert [problem["rule"] for problem in found["problems"]] == [11]


def test_explain() -> None:
    shown = invoke("explain", GOLDEN / "a3_super_pod_2x16.json").stdout
    assert "version 1.2, 32 ranks on 2 servers, completed" in shown
    assert "server 1  10.0.0.2  super_pod_id 0" in shown
    assert "31    15      192.168.101.16  16777263" in shown
    found = json.loads(invoke("explain", "--json", GOLDEN / "910a_second_ring.json").stdout)
    assert [d["device_id"] for d in found["servers"][0]["devices"]] == ["4", "5", "6", "7"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "none.json"], "none.json: expected a rank table, found No such file"),
        (["check", "none.json"], "none.json: expected a rank table, found No such file"),
        (["generate", "--gather", "x"], "--gather needs --nnodes and --node-rank"),
        (["generate"], "found no NPU"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
