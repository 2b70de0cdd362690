"""Two or more programs measured in turns on one machine: A B A B, so that what else goes on there
meets all of them.

Each side is a process that stays: it is asked for a round by a line on its standard input, and
answers with a line of JSON on its standard output.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


class Side:
    """A process of this package, `python -m bench.MODULE WORDS`, that serves rounds."""

    def __init__(self, module: str, *words: str, threads: int = 2):
        environment = {**os.environ, "GLOG_v": "3", "PYTHONWARNINGS": "ignore"}
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment[name] = str(threads)
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"bench.{module}", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.ready = self._answer()
        """What it said of its start."""

    def ask(self, what: str) -> Any:
        """A round."""
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return self._answer()

    def end(self) -> None:
        """Let it go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} has ended with {self.process.wait()}")
        return json.loads(line)


def serve(start: Callable[[], tuple[Any, Callable[[str], Any]]]) -> None:
    """Be a side: `start` gives what is said first, and what answers each round.

    What libraries print goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ready, answer = start()
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line.strip())), file=answers, flush=True)


def in_turns(sides: Mapping[str, Side], rounds: int, ask: str) -> dict[str, list[Any]]:
    """The answers of each side, a round of all after the other."""
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(side.ask(ask))
    return found


def peak_memory() -> int:
    """Bytes of this process at its highest; getrusage counts what its parent had before it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


@dataclass(frozen=True)
class Figure:
    """One line of the results: ours and theirs, smaller is better."""

    name: str
    ours: float
    theirs: float
    unit: str
    peer: str
    goal: float | None = None
    """Of the ratio."""
    spread: tuple[float, float] | None = None
    """Of the ratio: the smallest and largest of the rounds."""

    @property
    def ratio(self) -> float:
        """Ours to theirs."""
        return self.ours / self.theirs


def figure(
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    unit: str,
    peer: str,
    goal: float | None = None,
) -> Figure:
    """Medians of rounds taken in turns, and the spread of their ratios if there are several."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    spread = (min(ratios), max(ratios)) if len(ratios) > 1 else None
    median = statistics.median
    return Figure(name, median(ours), median(theirs), unit, peer, goal, spread)


def show(figures: Sequence[Figure]) -> None:
    """A table."""
    print("| | ours | theirs | ratio | spread | goal | against |\n|---|---|---|---|---|---|---|")
    for one in figures:
        spread = f"{one.spread[0]:.2f} to {one.spread[1]:.2f}" if one.spread else ""
        goal = "" if one.goal is None else f"≤ {one.goal:g}"
        print(
            f"| {one.name} | {one.ours:.4g} {one.unit} | {one.theirs:.4g} {one.unit} "
            f"| {one.ratio:.2f} | {spread} | {goal} | {one.peer} |",
            flush=True,
        )


def versions() -> dict[str, str | None]:
    """Of what is compared, if it is installed."""
    found: dict[str, str | None] = {}
    for package in ("mindspore", "torch", "diffusers", "peft", "boto3"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """What is checked out, "-dirty" if more than results was changed since; None if this is no
    clone."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True)

    found = git("rev-parse", "--short=10", "HEAD").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", ".", ":(exclude)bench/results").returncode
    return f"{found}{'-dirty' if changed else ''}" if found else None


def keep(figures: Sequence[Figure], file: str = "latest.json") -> None:
    """Put them into the results, in the place of those of the same names."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / file
    found = {one["name"]: one for one in json.loads(path.read_text())} if path.exists() else {}
    measured = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "cpu_count": os.cpu_count(),
        **versions(),
    }
    for one in figures:
        found[one.name] = {**asdict(one), "ratio": round(one.ratio, 4), "measured": measured}
    path.write_text(json.dumps(list(found.values()), indent=1, ensure_ascii=False) + "\n")
