"""The group of worker processes, one per device."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.communication import get_group_size, get_rank, init

from diffusion.models import compile_graphs

PS_CONTEXT = "LORA_PS_CONTEXT"
"""Variable that names a JSON file with the arguments of mindspore.set_ps_context."""


class _Sum(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.all_reduce = ops.AllReduce()

    def construct(self, x: Tensor) -> Tensor:
        return self.all_reduce(x)


class Group:
    """`rank_id` of `world_size` processes; a group of one needs no communication."""

    def __init__(self, device_target: str):
        compile_graphs()
        ms.set_device(device_target)
        self.rank_id, self.world_size = 0, 1
        if "MS_ROLE" in os.environ:
            _secure_channel()
            init()
            self.rank_id, self.world_size = get_rank(), get_group_size()
        self._sum = _Sum()

    def share(self, count: int) -> range:
        """The indices, of `count`, that fall to this process."""
        return range(self.rank_id, count, self.world_size)

    def sum(self, array: np.ndarray) -> np.ndarray:
        """The sum of every process's float32 array, on all of them."""
        if self.world_size == 1:
            return array
        return self._sum(Tensor(array.astype(np.float32))).asnumpy()

    def gather(self, row: np.ndarray) -> np.ndarray:
        """The row (n,) of every process, (world_size, n) float32, on all of them.

        Each adds its own into zeros, which is exact; it costs little because it is seldom done.
        """
        table = np.zeros((self.world_size, len(row)), np.float32)
        table[self.rank_id] = row
        return self.sum(table)

    def agreed(self, numbers: Sequence[int], below: int) -> list[int]:
        """The numbers, ascending and less than `below`, that process 0 has, on all of them."""
        marks = np.zeros(below, np.float32)
        if self.rank_id == 0:
            marks[list(numbers)] = 1
        return [int(number) for number in np.flatnonzero(self.sum(marks))] if below else []

    def wait(self) -> None:
        """Return when every process has come here."""
        self.sum(np.zeros(1, np.float32))


def _secure_channel() -> None:
    """Use the certificates that the launcher has made for this run, if it has."""
    path = os.environ.get(PS_CONTEXT)
    if path is not None:
        ms.set_ps_context(**json.loads(Path(path).read_text(encoding="utf-8")))
