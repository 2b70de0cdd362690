"""Which devices this machine has, and which of them a run takes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ClusterError

DEVICE_TARGETS = ("Ascend", "CPU")


@dataclass(frozen=True)
class Machine:
    """What one machine can run workers on."""

    device_target: str
    """"Ascend" or "CPU", as MindSpore names them."""
    device_ids: tuple[int, ...]
    """Ascending; NPUs by their physical id, on CPU one for each usable core."""
    cores: int
    """CPU cores that this process may use."""
    assumed: bool = False
    """It has no NPU; a plan is made for a server of so many."""

    def __str__(self) -> str:
        count = len(self.device_ids)
        if self.device_target == "CPU":
            return f"{count} CPU core{'' if count == 1 else 's'}"
        if self.assumed:
            return f"no NPU, and a server of {count} is assumed"
        return f"{count} NPU{'' if count == 1 else 's'} ({_joined(self.device_ids)})"


def this_machine(
    device_target: str | None = None,
    device_folder: Path = Path("/dev"),
    environment: Mapping[str, str] = os.environ,
) -> Machine:
    """The machine this process runs on, for `device_target` or, by default, the best it has.

    NPUs are the `davinci<id>` files in `device_folder`, limited to `ASCEND_RT_VISIBLE_DEVICES` if
    that is set. Raises ClusterError if Ascend is asked for and there is none.
    """
    cores = len(os.sched_getaffinity(0))
    found = {
        int(match[1])
        for path in device_folder.glob("davinci*")
        if (match := re.fullmatch(r"davinci(\d+)", path.name))
    }
    visible = environment.get("ASCEND_RT_VISIBLE_DEVICES")
    if visible is not None:
        found &= {int(text) for text in visible.split(",") if text.strip().isdecimal()}
    if device_target == "Ascend" and not found:
        raise ClusterError(
            f"--device-target Ascend: expected {device_folder}/davinci0 and so on, found no NPU "
            "that is visible; check the driver, or use --device-target CPU"
        )
    if device_target == "CPU" or not found:
        return Machine("CPU", tuple(range(cores)), cores)
    return Machine("Ascend", tuple(sorted(found)), cores)


def parse_devices(text: str | None, machine: Machine) -> tuple[int, ...]:
    """The device ids, ascending, that `--devices text` names on this machine.

    "8" is the first eight, "0-3" a range, "4,5,6,7" a list; None is every NPU, on CPU one worker.
    Raises ClusterError if the text is malformed or names a device that the machine lacks.
    """
    if text is None:
        return machine.device_ids if machine.device_target == "Ascend" else machine.device_ids[:1]
    if re.fullmatch(r"\d+", text):
        return _first(int(text), machine)
    try:
        ids = expand(text, machine.device_ids[-1] + 1)
    except ClusterError as error:
        raise ClusterError(f"--devices {text}: {error}") from error
    missing = sorted(set(ids) - set(machine.device_ids))
    if missing:
        raise ClusterError(
            f"--devices {text}: this machine has {machine}; there is no device {missing[0]}, "
            f"choose among {_joined(machine.device_ids)}"
        )
    return ids


def expand(text: str, beyond: int) -> tuple[int, ...]:
    """The ids, ascending, of a list of ids and ranges such as "0-2,6"; none is above `beyond`.

    Raises ClusterError, without the text itself, if it is malformed or names an id twice.
    """
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise ClusterError("expected a number (8), a range (0-3) or a list (4,5,6,7)")
    ids: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        lowest, highest = int(first), int(last or first)
        if highest < lowest:
            raise ClusterError(f"{part} counts down; write {last}-{first}")
        # One id beyond the last is enough to refuse 0-999999999.
        ids += range(min(lowest, beyond), min(highest, beyond) + 1)
    if len(set(ids)) < len(ids):
        raise ClusterError("a device is named twice; name each once")
    return tuple(sorted(ids))


_MOST_ON_CPU = 64


def _first(count: int, machine: Machine) -> tuple[int, ...]:
    """The first devices; on CPU more workers than cores can share them, to rehearse a large run."""
    if machine.device_target == "CPU" and 1 <= count <= _MOST_ON_CPU:
        return tuple(range(count))
    most = _MOST_ON_CPU if machine.device_target == "CPU" else len(machine.device_ids)
    if not 1 <= count <= most:
        raise ClusterError(
            f"--devices {count}: this machine has {machine}; "
            + (f"use at most {most}" if count else "use at least 1")
            + (", and --nnodes for more servers" if machine.assumed and count else "")
        )
    return machine.device_ids[:count]


def _joined(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, ids))
