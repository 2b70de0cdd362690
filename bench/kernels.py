"""Where the time of a call goes, as MindSpore's profiler sees it: ms of kernels by kind.

    python -m bench.kernels [--size small quarter full] [--of step picture]

A step is that of bench.training_step, a picture what bench.sampling draws, 16 in a pass for the
small base and one otherwise. What a call takes is measured without the profiler, before; what the
kernels leave of that is spent on starting them and around the graphs.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import sampling, training_step, turns
from bench.whole_job import BASE, make_base

KINDS = {
    "direct convolutions": ("Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter"),
    "matrix products": ("MatMul",),
    "batches of products: attention's, Winograd's": ("BatchMatMul",),
    "softmax": ("Softmax",),
    "normalisations": ("BatchNorm", "BatchNormGrad"),
    "activations": ("Sigmoid", "SigmoidGrad", "Exp", "Erf"),
    "transposes, gathers": ("Transpose", "Gather"),
    "sums, biases, factors": ("Add", "AddN", "Sub", "Mul", "BiasAdd", "RealDiv", "ReduceSum"),
    "joining and cutting": ("Concat", "Stack", "Unstack", "Split", "Slice", "StridedSlice", "Pad"),
}
OTHER, STARTED, CALL = "all others", "kernels started", "a call takes"
CALLS = {"step": 5, "picture": 1}
"""That are profiled."""


def profiled(of: str, size: str) -> dict[str, float]:
    """Milliseconds of a call by kind, how many kernels it starts, and what it takes."""
    import mindspore as ms

    with tempfile.TemporaryDirectory() as name:
        if of == "step":
            _, answer = training_step.ours(size)
            seconds, asked = answer("5")["seconds"], str(CALLS[of])
        else:
            base, asked = BASE, "16" if size == "small" else "1"
            if size != "small":
                base = Path(name) / "base"
                make_base(base, size)
            _, answer = sampling.ours(base, sampling.PIXELS[size])
            answer(asked)
            seconds = answer(asked) * int(asked)
        profiler = ms.Profiler(output_path=str(Path(name) / "profile"), start_profile=False)
        profiler.start()
        answer(asked)
        profiler.stop()
        profiler.analyse()
        (path,) = Path(name).rglob("cpu_op_type_info_*.csv")
        rows = list(csv.DictReader(path.open()))
    found = dict.fromkeys((*KINDS, OTHER), 0.0)
    kinds = {operator: kind for kind, operators in KINDS.items() for operator in operators}
    for row in rows:
        kind = kinds.get(row["op_type"], OTHER)
        found[kind] += float(row["total_compute_time"]) / CALLS[of]
    found["all"] = sum(found.values())
    found[STARTED] = sum(int(row["type_occurrences"]) for row in rows) / CALLS[of]
    return {**found, CALL: 1000 * seconds}


def side(of: str, size: str) -> tuple[Any, Callable[[str], Any]]:
    """Measure in a process of its own: a profiler is started once."""
    return profiled(of, size), lambda _: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--size", nargs="+", choices=[*training_step.SIZES], default=["small", "quarter"]
    )
    parser.add_argument("--of", nargs="+", choices=[*CALLS], default=[*CALLS])
    given = parser.parse_args()
    if given.side:
        turns.serve(lambda: side(given.of[0], given.size[0]))
        sys.exit()
    columns = {}
    for of in given.of:
        for size in given.size:
            process = turns.Side("kernels", "--side", "--of", of, "--size", size)
            columns[f"{of}, {size}"] = process.ready
            process.end()
    print(f"| ms | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for kind in (*KINDS, OTHER, "all", STARTED, CALL):
        cells = (f"{one[kind]:,.0f}" if one[kind] >= 100 else f"{one[kind]:.3g}"
                 for one in columns.values())  # fmt: skip
        print(f"| {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
