from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path

import pytest

import launcher.job
from cluster.devices import Machine
from launcher.errors import LaunchError
from launcher.job import Job, prepare, write
from launcher.request import Request
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


def test_several_npus_get_a_rank_table(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "hccn.conf"
    conf.write_text("".join(f"address_{i}=192.168.100.{i + 1}\n" for i in range(8)))
    monkeypatch.setattr(launcher.job, "_HCCN_CONF", conf)
    server = Machine("Ascend", tuple(range(8)), 64)
    monkeypatch.setattr(launcher.job, "this_machine", lambda _: server)

    job = prepare(Request(config, devices="4-7"), NOW)
    assert job.plan.device_target == "Ascend"
    assert job.start.environment["ASCEND_RT_VISIBLE_DEVICES"] == "4,5,6,7"
    assert f"--rank_table_file={job.attempt}/rank_table.json" in job.start.command
    write(job)
    (entry,) = json.loads((job.attempt / "rank_table.json").read_text())["server_list"]
    assert [device["device_id"] for device in entry["device"]] == ["4", "5", "6", "7"]

    assert prepare(Request(config, devices="1"), NOW).rank_table is None
    conf.write_text("")
    assert prepare(Request(config, devices="4-7"), NOW).rank_table is None
