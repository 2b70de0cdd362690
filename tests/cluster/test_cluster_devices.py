from __future__ import annotations

from pathlib import Path

import pytest

from cluster.devices import Machine, parse_devices, this_machine
from cluster.errors import ClusterError

CPU = Machine("CPU", (0, 1), 2)
SERVER = Machine("Ascend", tuple(range(8)), 96)
UPPER_HALF = Machine("Ascend", (4, 5, 6, 7), 96)


@pytest.mark.parametrize(
    ("text", "machine", "ids"),
    [
        ("8", SERVER, tuple(range(8))),
        ("2", UPPER_HALF, (4, 5)),
        ("0-3", SERVER, (0, 1, 2, 3)),
        ("7,4,5,6", SERVER, (4, 5, 6, 7)),
        ("0-1,6-7", SERVER, (0, 1, 6, 7)),
        ("3-3", SERVER, (3,)),
        ("2", CPU, (0, 1)),
        (None, UPPER_HALF, (4, 5, 6, 7)),
        (None, CPU, (0,)),
        ("4", CPU, (0, 1, 2, 3)),
    ],
)
def test_devices_are_parsed(text: str | None, machine: Machine, ids: tuple[int, ...]) -> None:
    assert parse_devices(text, machine) == ids


@pytest.mark.parametrize(
    ("text", "machine", "message"),
    [
        ("65", CPU, "--devices 65: this machine has 2 CPU cores; use at most 64"),
        ("0", CPU, "--devices 0: this machine has 2 CPU cores; use at least 1"),
        ("9", SERVER, "this machine has 8 NPUs (0, 1, 2, 3, 4, 5, 6, 7); use at most 8"),
        ("0-3", UPPER_HALF, "there is no device 0, choose among 4, 5, 6, 7"),
        ("6-999999999", SERVER, "there is no device 8"),
        ("999-1000", SERVER, "there is no device 8"),
        ("3-0", SERVER, "3-0 counts down; write 0-3"),
        ("1,1", SERVER, "a device is named twice"),
        ("0-2,2", SERVER, "a device is named twice"),
        ("two", CPU, "expected a number (8), a range (0-3) or a list (4,5,6,7)"),
        ("-1", CPU, "expected a number"),
        ("", CPU, "expected a number"),
    ],
)
def test_bad_devices_are_refused(text: str, machine: Machine, message: str) -> None:
    with pytest.raises(ClusterError) as caught:
        parse_devices(text, machine)
    assert message in str(caught.value)


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """The device folder of a machine with NPUs 0, 1, 2 and 10."""
    for name in ("davinci2", "davinci0", "davinci10", "davinci1", "davinci_manager", "null"):
        (tmp_path / name).touch()
    return tmp_path


def test_npus_are_found(server: Path) -> None:
    machine = this_machine(None, server, {})
    assert (machine.device_target, machine.device_ids) == ("Ascend", (0, 1, 2, 10))
    assert this_machine("CPU", server, {}).device_target == "CPU"


def test_only_visible_npus_count(server: Path) -> None:
    machine = this_machine("Ascend", server, {"ASCEND_RT_VISIBLE_DEVICES": "10, 1"})
    assert machine.device_ids == (1, 10)
    assert this_machine(None, server, {"ASCEND_RT_VISIBLE_DEVICES": ""}).device_target == "CPU"


def test_without_npus_a_machine_has_its_cores(tmp_path: Path) -> None:
    machine = this_machine(None, tmp_path, {})
    assert machine == Machine("CPU", tuple(range(machine.cores)), machine.cores)
    with pytest.raises(ClusterError, match="found no NPU that is visible"):
        this_machine("Ascend", tmp_path, {})
