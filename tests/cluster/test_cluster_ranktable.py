"""Tables that are made: golden files, an independent reading of the rules, what is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cluster import table_parts
from cluster.errors import ClusterError
from cluster.ranktable import Device, Server, dump, rank_table, server_of, write
from cluster.table_check import check_text
from tests.cluster.tables import GOLDEN, objections, server, tables


@pytest.mark.parametrize("name", tables())
def test_golden_table(name: str) -> None:
    product, members = tables()[name]
    text = (GOLDEN / f"{name}.json").read_text(encoding="utf-8")
    assert dump(rank_table(members)) == text
    assert objections(text, product) == []
    report = check_text(text, product)
    assert (report.problems, report.remarks) == ((), ())
    assert product in report.fits


def test_the_independent_reading_can_object() -> None:
    text = (GOLDEN / "a2_2x8.json").read_text(encoding="utf-8")
    assert objections(text.replace('"rank_id": "9"', '"rank_id": 9'), "A2") != []
    assert objections(text.replace("192.168.101.1", "192.168.100.1"), "A2") != []
    ring = dump(rank_table([server(0, (2, 3, 4, 5))]))
    assert objections(ring, "910A") == ["13: one ring"]
    assert objections(dump(rank_table([server(0, range(9))])), "A2") == ["13: modules alike"]


def test_status_comes_last_and_every_scalar_is_a_string() -> None:
    table = rank_table([server(0, (1, 10))])
    assert list(table)[-1] == "status"
    assert [d["rank_id"] for d in table["server_list"][0]["device"]] == ["0", "1"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([server(0, [0]), server(0, [1])], "found it on servers 0 and 1"),
        ([replace(server(0, [0]), server_id="127.0.1.1")], "found a loopback address"),
        ([server(0, [0], "0"), server(1, [0])], "expected a super_pod_id as the other servers"),
        (
            [server(0, [0], "0"), server(1, [0], "1"), server(2, [0], "0")],
            "super pod 0: expected its servers side by side",
        ),
        (
            [Server("a", (Device(0, "10.1.1.1"),), super_pod_id="0")],
            "server a, device 0: expected a super_device_id",
        ),
    ],
)
def test_servers_that_make_no_table(members: list[Server], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        rank_table(members)


def test_a_server_survives_being_sent() -> None:
    sent = server(3, range(4), "7")
    assert server_of(json.loads(json.dumps(asdict(sent)))) == sent


@pytest.mark.parametrize("name", ["table.txt", "a.json.bak/table.json"])
def test_path_that_hccl_would_not_take(tmp_path: Path, name: str) -> None:
    with pytest.raises(ClusterError, match=r"expected .*\.json"):
        write(tmp_path / name, rank_table([server(0, [0])]))


def test_table_in_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="cannot write it"):
        write(tmp_path / "none" / "table.json", rank_table([server(0, [0])]))


# ---- parts of several nodes


def _gather(folder: Path, nodes: int, rank: int, result: Path, seconds: float) -> None:
    try:
        found = table_parts.gather(folder, nodes, rank, server(rank, range(8)), seconds, "A2")
        result.write_text(found.read_text())
    except ClusterError as error:
        result.write_text(str(error))


def gathered(folder: Path, ranks: range, nodes: int, seconds: float) -> list[str]:
    """What each of several processes, all started at once, comes to."""
    context = multiprocessing.get_context("fork")
    results = [folder.parent / f"result_{rank}" for rank in ranks]
    processes = [
        context.Process(target=_gather, args=(folder, nodes, rank, result, seconds))
        for rank, result in zip(ranks, results, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [result.read_text() for result in results]


def test_racing_nodes_get_one_table(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    texts = gathered(folder, range(6), 6, 60)
    assert set(texts) == {dump(rank_table([server(n, range(8)) for n in range(6)]))}
    assert objections(texts[0], "A2") == []
    assert {path.name for path in folder.iterdir()} == {
        "rank_table.json",
        *(f"part_{rank}.json" for rank in range(6)),
    }


def test_missing_node_is_named(tmp_path: Path) -> None:
    (text,) = gathered(tmp_path / "shared", range(1), 3, 0.5)
    assert "expected the parts of 3 nodes within 0.5 s, found none of node 1, 2" in text


def test_lock_of_one_that_died_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    lock = folder / table_parts.LOCK
    lock.write_text("host, process 1\n")
    (text,) = gathered(folder, range(1), 1, 0.5)
    assert "host, process 1 is merging them; remove merge.lock if it no longer runs" in text
    os.utime(lock, (0, 0))
    (text,) = gathered(folder, range(1), 1, 60)
    assert text == dump(rank_table([server(0, range(8))]))


def test_two_machines_of_one_rank(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    table_parts.gather(folder, 1, 0, server(0, range(8)), 5)
    with pytest.raises(ClusterError, match=r"found that of 10\.0\.0\.1; give each node its own"):
        table_parts.gather(folder, 1, 0, server(1, range(8)), 5)


def test_parts_that_do_not_fit_each_other(tmp_path: Path) -> None:
    table_parts._add_part(tmp_path, 0, server(0, range(8)))
    with pytest.raises(ClusterError, match=r"server_id 10\.0\.0\.1: .* servers 0 and 1"):
        table_parts.gather(tmp_path, 2, 1, replace(server(0, [1])), 5)
