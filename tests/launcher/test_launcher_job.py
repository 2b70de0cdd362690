from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path

import pytest

import cluster.addresses
import launcher.hardware
from cluster.devices import Machine
from cluster.errors import ClusterError
from cluster.ranktable import dump, rank_table
from launcher.errors import LaunchError
from launcher.hardware import whole_table
from launcher.job import Job, prepare, write
from launcher.request import Request
from tests.cluster.tables import GOLDEN
from tests.cluster.tables import server as table_server
from trainer.config_file import load_config
from trainer.dataset import read_scan

NOW = datetime(2025, 1, 2, 3, 4, 5)


@pytest.fixture
def job(config: Path) -> Job:
    return prepare(Request(config, ["lora.rank=4"], device_target="CPU"), NOW)


def test_run_folder_holds_what_the_workers_read(job: Job, config: Path) -> None:
    assert job.folder == config.parent / "runs/tiny-20250102-030405"
    assert not job.folder.exists()
    write(job)
    assert load_config(job.attempt / "config.yaml") == job.config
    assert job.config.lora.rank == 4
    plan = json.loads((job.attempt / "plan.json").read_text())
    assert plan == json.loads(json.dumps(job.plan.as_dict()))
    assert read_scan((job.attempt / "data.json").read_text()) == job.data
    assert job.start.command[-3:] == ("-m", "trainer.worker", str(job.attempt))


def test_every_run_has_its_own_folder(job: Job, config: Path) -> None:
    write(job)
    second = prepare(Request(config, device_target="CPU"), NOW)
    assert second.folder.name == "tiny-20250102-030405-2"
    with pytest.raises(LaunchError, match="cannot make the run's folder: Directory not empty"):
        write(job)
    assert (job.attempt / "plan.json").is_file()


def test_folder_that_cannot_be_completed_is_taken_away(job: Job) -> None:
    unwritable = dataclasses.replace(
        job, start=dataclasses.replace(job.start, attempt=job.folder / ("x" * 300))
    )
    with pytest.raises(LaunchError, match="File name too long"):
        write(unwritable)
    assert not job.folder.exists()


@pytest.fixture
def npus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight NPUs with addresses, as far as a file of the driver can make them."""
    conf = tmp_path / "hccn.conf"
    conf.write_text("".join(f"address_{i}=192.168.100.{i + 1}\n" for i in range(8)))
    monkeypatch.setattr(cluster.addresses, "HCCN_CONF", conf)
    server = Machine("Ascend", tuple(range(8)), 64)
    monkeypatch.setattr(launcher.hardware, "this_machine", lambda _: server)
    return conf


def test_several_npus_get_a_rank_table(config: Path, npus: Path) -> None:
    job = prepare(Request(config, devices="4-7"), NOW)
    assert job.plan.device_target == "Ascend"
    assert job.start.environment["ASCEND_RT_VISIBLE_DEVICES"] == "4,5,6,7"
    assert f"--rank_table_file={job.attempt}/rank_table.json" in job.start.command
    write(job)
    (entry,) = json.loads((job.attempt / "rank_table.json").read_text())["server_list"]
    assert [device["device_id"] for device in entry["device"]] == ["4", "5", "6", "7"]

    assert prepare(Request(config, devices="1"), NOW).rank_table is None
    npus.unlink()  # HCCL finds the topology of a server by itself
    assert prepare(Request(config, devices="4-7"), NOW).rank_table is None


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(None, devices="2-5", product="910A"), "choose 0-3 or 4-7"),
        (Request(None, devices="3", product="910A"), "expected 1, 2, 4 or 8 devices"),
        (Request(None, devices="4", product="910A"), "expected fp32 on a 910A.*found fp16"),
        (
            Request(None, devices="4", product="910A", overrides=("precision=bf16",)),
            "expected fp32 on a 910A.*found bf16",
        ),
    ],
)
def test_devices_that_a_product_cannot_use(
    config: Path, npus: Path, request_: Request, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(dataclasses.replace(request_, config=config), NOW)


def test_table_that_somebody_else_has_written(config: Path, npus: Path) -> None:
    path = config.parent / "hccl.json"
    path.write_text(dump(rank_table([table_server(0, range(4))])))
    found = prepare(Request(config, devices="4", rank_table=path), NOW)
    assert found.rank_table == path.read_text()
    with pytest.raises(LaunchError, match=r"expected device 4, which rank 0 opens here, found 0"):
        prepare(Request(config, devices="4-7", rank_table=path), NOW)
    path.write_text(path.read_text().replace('"192.168.100.2"', '"192.168.100.9"'))
    with pytest.raises(LaunchError, match=r"the address of device 1 here, found 192\.168\.100\.9"):
        prepare(Request(config, devices="4", rank_table=path), NOW)
    path.write_text(path.read_text().replace('"rank_id": "3"', '"rank_id": 3'))
    with pytest.raises(LaunchError, match=r"expected a string, found the number 3.*EI0017"):
        prepare(Request(config, devices="4", rank_table=path), NOW)


def test_tables_of_several_nodes() -> None:
    servers = [table_server(0, range(8)), table_server(1, range(8))]
    text = whole_table(servers, "A2")
    assert text == (GOLDEN / "a2_2x8.json").read_text()
    assert whole_table([None, None], "A2") is None
    with pytest.raises(LaunchError, match="found none on node 1"):
        whole_table([servers[0], None], "A2")
    with pytest.raises(
        ClusterError, match=r"server_id 10\.0\.0\.1: .* found it on servers 0 and 1"
    ):
        whole_table([servers[0], servers[0]], "A2")


def test_dry_run_for_ascend_needs_no_npu(config: Path) -> None:
    found = prepare(Request(config, devices="4-7", device_target="Ascend", dry_run=True), NOW)
    assert (found.plan.device_target, found.plan.devices) == ("Ascend", 4)
    assert found.start.environment["ASCEND_RT_VISIBLE_DEVICES"] == "4,5,6,7"
