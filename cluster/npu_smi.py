"""The NPUs as the driver's `npu-smi` shows them: product, health, place in a super pod."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cluster.errors import ClusterError
from cluster.probe import ask

SECONDS = 15.0
"""How long one call may take: `npu-smi info` asks every device of the server in turn."""


@dataclass(frozen=True)
class Npu:
    """One device, on an A3 one die."""

    device_id: int
    """Physical: the number of /dev/davinci<id>."""
    card_id: int
    """What npu-smi takes as -i, …"""
    chip_id: int
    """… and as -c."""
    name: str
    """910A, 910B2, Ascend910 …"""
    health: str
    """OK, Warning, Alarm, Critical or UNKNOWN."""
    product: str | None
    """One of cluster.products.PRODUCTS; None for a device that is none of them."""
    used_bytes: int | None = None
    """Of its memory, by all processes; None if npu-smi does not say."""
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Place:
    """Where a device of an A3 is in its super pod."""

    super_device_id: int
    super_pod_id: str


def npus(seconds: float = SECONDS) -> tuple[Npu, ...] | None:
    """All devices that `npu-smi info` lists; None if there is no npu-smi.

    Raises ClusterError if it hangs, fails or lists none.
    """
    answer = ask(["npu-smi", "info"], seconds)
    if answer is None:
        return None
    found = parse_info(answer.text) if answer.exit_code == 0 else ()
    if not found:
        raise ClusterError(
            f"{answer.command}: expected a table of NPUs, found {answer.found}; check the driver"
        )
    return found


def parse_info(text: str) -> tuple[Npu, ...]:
    """The devices in what `npu-smi info` prints.

    Each has two lines, `| NPU Name | Health | …` and `| Chip [Phy-ID] | Bus-Id | …`; only for an
    A3 is there a Phy-ID. A second table, of processes, follows.
    """
    devices, phy_id, first = [], False, None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) < 3:
            continue
        if "Process id" in line:
            break
        phy_id = phy_id or "Phy-ID" in cells[0]
        match = re.fullmatch(r"(\d+)\s+(\w.*)", cells[0])
        if match and re.fullmatch(r"[A-Za-z/]+", cells[1]):
            first = int(match[1]), match[2], cells[1]
            continue
        match = re.fullmatch(r"(\d+)(?:\s+(\d+))?", cells[0])
        if first is None or match is None:
            continue
        card_id, name, health = first
        device_id = int(match[2]) if match[2] else card_id
        chip_id, kind = int(match[1]), product(name, phy_id)
        devices.append(Npu(device_id, card_id, chip_id, name, health, kind, *_memory(cells[2])))
        first = None
    return tuple(devices)


def _memory(cell: str) -> tuple[int, int] | tuple[None, None]:
    """Used and whole memory in bytes, from `AICore(%)  Memory-Usage(MB)  HBM-Usage(MB)`."""
    found = re.findall(r"(\d+)\s*/\s*(\d+)", cell)
    if not found or found[-1][1] == "0":
        return None, None
    used, whole = found[-1]
    return int(used) << 20, int(whole) << 20


def product(name: str, phy_id: bool = False) -> str | None:
    """The product by npu-smi's name of it; `phy_id` tells that the table has that column.

    The 910B of the first 910 generation has no digit, those of the A2 have one (910B3).
    """
    short = name.replace(" ", "").removeprefix("Ascend").upper()
    if re.match(r"910_?93", short) or (phy_id and short.startswith("910")):
        return "A3"
    if re.match(r"910B\d", short):
        return "A2"
    return "910A" if short.startswith("910") else None


def common_product(devices: Iterable[Npu]) -> str | None:
    """The product that all devices are; None if they differ or it is none that we know."""
    found = {device.product for device in devices}
    return found.pop() if len(found) == 1 else None


def places(devices: Sequence[Npu], seconds: float = SECONDS) -> dict[int, Place]:
    """Place in its super pod of each device of an A3, by device id; without those in none.

    Asks about all devices at once. Raises ClusterError if npu-smi hangs.
    """
    with ThreadPoolExecutor(max(1, len(devices))) as threads:
        found = threads.map(lambda device: _place(device, seconds), devices)
        return {npu.device_id: place for npu, place in zip(devices, found, strict=True) if place}


def _place(device: Npu, seconds: float) -> Place | None:
    command = ["npu-smi", "info", "-t", "spod-info"]
    answer = ask([*command, "-i", str(device.card_id), "-c", str(device.chip_id)], seconds)
    if answer is None or answer.exit_code:
        return None
    sdid = re.search(r"^\s*SDID\s*:\s*(\d+)\s*$", answer.text, re.MULTILINE)
    pod = re.search(r"^\s*Super Pod ID\s*:\s*(\S+)\s*$", answer.text, re.MULTILINE)
    return Place(int(sdid[1]), pod[1]) if sdid and pod else None
