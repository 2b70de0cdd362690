"""The validator: every rule of docs/rank-tables.md with a table that breaks it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ClusterError
from cluster.table_check import check_file, check_text, here
from tests.cluster.tables import GOLDEN

Table = dict[str, Any]


def golden(name: str) -> Table:
    found: Table = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return found


def put(*path: Any, value: Any) -> Callable[[Table], None]:
    """Set what is at a path of the table."""

    def change(table: Table) -> None:
        found: Any = table
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = value

    return change


def drop(*path: Any) -> Callable[[Table], None]:
    def change(table: Table) -> None:
        found: Any = table
        for key in path[:-1]:
            found = found[key]
        del found[path[-1]]

    return change


def device(server: int, number: int, key: str, value: Any) -> Callable[[Table], None]:
    return put("server_list", server, "device", number, key, value=value)


A2, A3, A910 = "a2_2x8", "a3_two_super_pods", "910a_8"
BREAKS: list[tuple[int, str, str, Callable[[Table], None], str | None, str]] = [
    # rule, code, golden table, what is done to it, product, words of the message
    (1, "EI0017", A2, device(0, 3, "rank_id", 3), None, 'found the number 3; write "3"'),
    (1, "EI0017", A2, put("status", value=True), None, "expected a string, found true"),
    (1, "EI0017", A2, drop("server_list", 0, "server_id"), None, "found nothing; add it"),
    (1, "EI0017", A2, put("server_list", value={}), None, "expected a list"),
    (2, "EI0014", A2, put("version", value="3.0"), None, 'expected "1.0" or "1.2", found "3.0"'),
    (2, "EI0014", A2, put("version", value="2.0"), None, "2.0 is for Ascend 950"),
    (2, "EI0014", A2, put("group_list", value=[]), None, "the old layout with group_list"),
    (3, "EI0014", A2, put("server_count", value="3"), None, 'expected "2"'),
    (3, "EI0014", A2, put("server_list", value=[]), None, "expected at least one server"),
    (4, "HCCL_E_PARA", A2, put("server_list", 1, "server_id", value="10.0.0.1"), None, "another"),
    (4, "HCCL_E_PARA", A2, put("server_list", 1, "server_id", value=""), None, "found 0"),
    (4, "HCCL_E_PARA", A2, put("server_list", 1, "server_id", value="x" * 65), None, "found 65"),
    (5, "HCCL_E_PARA", A2, put("server_list", 1, "device", value=[]), None, "at least one device"),
    (6, "HCCL_E_PARA", A2, device(0, 0, "device_id", "16"), None, "from 0 to 15"),
    (6, "HCCL_E_PARA", A910, device(0, 0, "device_id", "8"), "910A", "from 0 to 7"),
    (6, "HCCL_E_PARA", A2, device(0, 0, "device_id", "-1"), None, 'found "-1"'),
    (7, "EI0014", A2, device(0, 1, "device_id", "0"), None, "found 0 again"),
    (8, "HCCL_E_PARA", A2, device(0, 0, "device_ip", "10.0.0.256"), None, "expected an IP address"),
    (8, "HCCL_E_PARA", A2, device(1, 0, "device_ip", "192.168.100.1"), None, "192.168.100.1 again"),
    (8, "HCCL_E_PARA", A2, device(1, 0, "device_ip", "1.1.1.1,1.1.1.2"), None, "as many addresses"),
    (9, "EI0014", A2, drop("server_list", 1, "device", 2, "device_ip"), "A2", "device's address"),
    (10, "EI0001", A2, device(1, 7, "device_ip", "fd00::7"), None, "expected IPv4"),
    (11, "EI0014", A2, device(1, 7, "rank_id", "14"), None, "found 14 again"),
    (11, "EI0014", A2, device(1, 7, "rank_id", "16"), None, "found no 15"),
    (11, "EI0014", A2, device(1, 7, "rank_id", "last"), None, 'found "last"'),
    (12, "EI0014", A2, drop("server_list", 1, "device", 7), "910A", "as many devices on each"),
    (13, "EI0014", A910, drop("server_list", 0, "device", 7), "910A", "1, 2, 4 or 8 devices"),
    (13, "EI0010", "a2_16", drop("server_list", 0, "device", 15), "A2", "both modules"),
    (14, "HCCL_E_PARA", A3, put("super_pod_list", 1, "super_pod_id", value="0"), None, "number"),
    (14, "EI0014", A3, put("super_pod_list", 0, "super_pod_id", value=""), None, "not empty"),
    (14, "EI0014", A3, put("super_pod_list", 0, "server_list", 0, "server_id", value="x"), None,
     "expected a server of server_list"),
    (14, "HCCL_E_PARA", A3, drop("super_pod_list", 0, "server_list", 0), None, "found it in none"),
    (14, "EI0014", A3, device(0, 0, "super_device_id", "four"), None, 'found "four"'),
    (14, "EI0014", A3, device(0, 0, "super_device_id", "16777217"), None, "found 16777217 again"),
    (14, "HCCL_E_PARA", A3, drop("server_list", 0, "device", 0, "super_device_id"), None, "SDID"),
    (17, "HCCL_E_PARA", A2, device(0, 0, "device_port", "65536"), None, "1 to 65535"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "code", "name", "change", "product", "words"), BREAKS)
def test_broken_rule(
    rule: int,
    code: str,
    name: str,
    change: Callable[[Table], None],
    product: str | None,
    words: str,
) -> None:
    table = golden(name)
    assert check_text(json.dumps(table), product).problems == ()
    change(table)
    found = check_text(json.dumps(table), product).problems
    said = [f"{f.rule} {f.code} {f.where}: {f.message}" for f in found]
    assert any(f.rule == rule and f.code == code and words in f.message for f in found), said


def test_every_rule_of_a_file_is_broken_once() -> None:
    # 15, 16 and 18 need the machine, see below.
    assert {case[0] for case in BREAKS} == {*range(1, 15), 17}


def test_rules_that_need_the_machine() -> None:
    table = check_text(json.dumps(golden(A2))).table
    assert table is not None
    addresses = {i: f"192.168.101.{i + 1}" for i in range(8)}
    off = dict.fromkeys(range(8), False)
    assert here(table, 1, range(8), addresses, off) == ([], [])
    (problem,), _ = here(table, 1, (0, 1, 2, 3, 4, 5, 6, 8), addresses, off)
    assert (problem.rule, problem.code) == (15, "EI0014")
    assert "expected device 8, which rank 15 opens here, found 7" in problem.message
    (problem,), _ = here(table, 1, range(8), {**addresses, 2: "10.9.9.9"}, off)
    assert (problem.rule, problem.code) == (16, "EI0014")
    assert "expected 10.9.9.9, the address of device 2 here" in problem.message
    _, (remark,) = here(table, 1, range(8), addresses, {**off, 5: True})
    assert (remark.rule, remark.code) == (18, "EI0016")
    assert here(table, 2, range(8), addresses, off)[0][0].rule == 15


# ---- tables of other tools

HCCL_TOOLS = """\
{"version": "1.0", "server_count": "1",
 "server_list": [{"server_id": "10.0.0.1",
   "device": [{"device_id": "0", "device_ip": "192.168.100.101", "rank_id": "0"},
              {"device_id": "1", "device_ip": "192.168.101.101", "rank_id": "1"}],
   "host_nic_ip": "reserve"}],
 "status": "completed"}
"""
ASCEND_OPERATOR = """\
{"status": "completed", "server_list": [
  {"device": [{"device_id": "0", "device_ip": "192.168.1.1", "rank_id": "0"}],
   "server_id": "node-a", "host_ip": "10.0.0.1", "container_ip": "10.244.0.7"},
  {"device": [{"device_id": "0", "device_ip": "192.168.1.2", "rank_id": "1"}],
   "server_id": "node-b", "host_ip": "10.0.0.2", "container_ip": "10.244.1.9"}],
 "server_count": "2", "version": "1.0"}
"""


def test_tables_of_other_tools_are_right() -> None:
    assert check_text(HCCL_TOOLS).fits == ("910A", "A2", "A3")
    assert check_text(ASCEND_OPERATOR).problems == ()


def test_table_with_the_integers_of_a_merge_tool() -> None:
    found = check_text(HCCL_TOOLS.replace('"rank_id": "1"', '"rank_id": 1')).problems
    assert [(f.rule, f.code, f.where) for f in found] == [
        (1, "EI0017", "server_list[0].device[1].rank_id")
    ]


def test_table_that_is_not_complete() -> None:
    (problem,) = check_text(HCCL_TOOLS.replace("completed", "initializing")).problems
    assert (problem.code, problem.where) == ("HCCL_E_TIMEOUT", "status")


@pytest.mark.parametrize("text", ["", "[]", "{", '"table"', "{" * 10000])
def test_file_that_is_no_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    report = check_file(path)
    assert (report.table, [f.code for f in report.problems]) == (None, ["EI0004"])


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="found No such file"):
        check_file(tmp_path / "none.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ClusterError, match="no UTF-8"):
        check_file(tmp_path / "b.json")


def test_path_that_hccl_cannot_take(tmp_path: Path) -> None:
    path = tmp_path / "table.txt"
    path.write_text(HCCL_TOOLS)
    assert [f.code for f in check_file(path).problems] == ["EI0004"]


def test_a_table_that_only_some_products_take() -> None:
    text = (GOLDEN / "a2_6.json").read_text(encoding="utf-8")
    report = check_text(text)
    assert (report.problems, report.fits) == ((), ("A2", "A3"))
    assert check_text(text, "910A").problems[0].rule == 13


def test_odd_but_right() -> None:
    table = golden(A2)
    table["server_list"].reverse()
    for number, entry in enumerate(d for s in table["server_list"] for d in s["device"]):
        entry["rank_id"] = str(number)
    report = check_text(json.dumps(table), "A2")
    assert report.problems == ()
    assert "alphabetic order of server_id" in report.remarks[0].message
