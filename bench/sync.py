"""The gradients of a LoRA over MindSpore's all-reduce: one flat vector, each tensor for itself, and
the bare all-reduce of as many bytes.

    python -m bench.sync [--workers 1 2 4 8] [--ranks 4 16 128]

The tensors are those of a LoRA on the attention of SD 1.5. Flat is what the trainer's second graph
does: the vector with loss and wish to stop, reduced, cut and divided; the first graph has joined
it, whose time is in the second line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import turns

ROUNDS, LONG_ROUNDS = 60, 15
"""Of what takes milliseconds, and of what may take seconds."""


def shapes(rank: int) -> list[tuple[int, int]]:
    """(out, in) of every matrix of the LoRA."""
    from diffusion.config import load_model_config
    from weights.lora import target_modules
    from weights.structure import unet_shapes

    found = unet_shapes(load_model_config("sd15").unet)
    pairs = []
    for module in target_modules(found, "attention"):
        out, into = found[f"{module}.weight"][:2]
        pairs += [(rank, into), (out, rank)]
    return pairs


def worker(rank: int) -> None:
    """One of msrun's processes; the first prints medians of seconds."""
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor, nn, ops
    from mindspore.communication import get_group_size, get_rank, init

    from diffusion.models import compile_graphs
    from trainer.optimizer import flatten

    compile_graphs()
    ms.set_device("CPU")
    init()
    world = get_group_size()

    class Bare(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.reduce = ops.AllReduce()

        def construct(self, vector: Tensor) -> Tensor:
            return self.reduce(vector)

    class Flat(Bare):
        def construct(self, buffer: Tensor) -> Tensor:
            return ops.Slice()(self.reduce(buffer), (0,), (size,)) / world

    class Joined(Bare):
        def construct(self, *tensors: Tensor) -> Tensor:
            return self.reduce(flatten(tensors)) / world

    class Each(Bare):
        def construct(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple([self.reduce(tensor) / world for tensor in tensors])

    tensors = [Tensor(np.ones(shape, np.float32)) for shape in shapes(rank)]
    size = sum(tensor.size for tensor in tensors)
    vector = Tensor(np.ones(size + 2, np.float32))
    ways: dict[str, tuple[nn.Cell, list[Any]]] = {
        "bare": (Bare(), [vector]),
        "flat": (Flat(), [vector]),
        "joined": (Joined(), tensors),
        "each": (Each(), tensors),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 2):
        for name, (cell, given) in ways.items():
            if name in ("joined", "each") and number >= LONG_ROUNDS + 2:
                continue
            Bare()(Tensor(np.ones(1, np.float32))).asnumpy()  # all begin together
            begun = time.monotonic()
            found = cell(*given)
            (found[-1] if isinstance(found, tuple) else found).asnumpy()
            if number >= 2:
                times[name].append(time.monotonic() - begun)
    if get_rank() == 0:
        print(json.dumps({**times, "bytes": 4 * vector.size}), flush=True)


def measured(workers: int, rank: int, folder: Path) -> dict[str, Any]:
    """What rank 0 says: seconds of each round by way, and the bytes."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    logs = folder / f"logs-{workers}-{rank}"
    subprocess.run(
        [
            *("msrun", f"--worker_num={workers}", f"--local_worker_num={workers}", "--join=True"),
            *(f"--master_port={port}", f"--log_dir={logs}", "--cluster_time_out=300"),
            *("python", "-m", "bench.sync", "--of-rank", str(rank)),
        ],
        check=True,
        cwd=turns.ROOT,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(turns.ROOT),
            "GLOG_v": "3",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        timeout=600,
    )
    lines = [
        line
        for log in logs.glob("worker_*.log")
        for line in log.read_text().splitlines()
        if line.startswith('{"bare"')
    ]
    return dict(json.loads(lines[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--of-rank", type=int, metavar="RANK", help="Be one of msrun's processes.")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4])
    given = parser.parse_args()
    if given.of_rank:
        worker(given.of_rank)
        return
    figures = []
    with tempfile.TemporaryDirectory() as name:
        for workers in given.workers:
            for rank in given.ranks:
                found = measured(workers, rank, Path(name))
                size = f"rank {rank}, {found['bytes'] / 1e6:.1f} MB, {workers} workers"
                peer = "bare all-reduce"
                goal = 1.1 if workers > 1 else None  # one worker alone reduces nothing
                figures += [
                    turns.figure(f"sync, {size}", found["flat"], found["bare"], "s", peer, goal),
                    turns.figure(
                        f"sync, {size}, with joining", found["joined"], found["each"], "s", "each"
                    ),
                ]
    turns.show(figures)
    turns.keep(figures)


if __name__ == "__main__":
    main()
