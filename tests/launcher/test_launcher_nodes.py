"""Two nodes on one machine: two network namespaces, each with a host name of its own."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from registry.api import open_registry
from tests.launcher.launching import END_SECONDS, START_SECONDS, Launch, of_run, training, until
from tests.launcher.namespaces import ADDRESSES, two_namespaces, within


@pytest.fixture(scope="module")
def spaces() -> Iterator[tuple[str, str]]:
    with two_namespaces() as names:
        yield names


@dataclass
class Pair:
    """Two nodes of one run."""

    start: Launch
    spaces: tuple[str, str]
    config: Path

    def node(
        self, rank: int, behaviour: str, *options: object, host: str = "", failing: int = 3
    ) -> psutil.Popen:
        return self.start(
            behaviour,
            *("--devices", "2", "--nnodes", "2", "--node-rank", rank),
            *("--master-addr", ADDRESSES[0], *options, self.config),
            within=within(self.spaces[rank], host or f"node{rank}"),
            failing=failing,
        )

    def both(self, behaviour: str, *options: object) -> tuple[psutil.Popen, psutil.Popen]:
        second = self.node(1, behaviour, *options)
        return self.node(0, behaviour, *options), second

    @property
    def folder(self) -> Path:
        return self.config.parent


@pytest.fixture
def pair(start: Launch, spaces: tuple[str, str], config: Path) -> Pair:
    return Pair(start, spaces, config)


def finish(process: psutil.Popen, seconds: float = END_SECONDS) -> tuple[int, str]:
    _, err = process.communicate(timeout=seconds)
    return process.returncode, err


def test_death_on_one_node_then_a_run_on_both_to_its_end(pair: Pair) -> None:
    first, second = pair.both("crash,succeed", "--max-restarts", "1")
    out, err = first.communicate(timeout=START_SECONDS)
    code, other = finish(second)
    assert (first.returncode, out, code) == (0, "tiny@1\n", 0), err + other
    assert of_run(pair.folder) == []
    assert "warning: rank 3 was killed by signal 9 (SIGKILL)" in err
    assert "starting again in 1 s" in err
    assert "node 0: the run has ended well" in other
    registry = open_registry(str(pair.folder / "registry"))
    assert registry.resolve("tiny").version == 1
    (attempt,) = pair.folder.glob("runs/*/attempt_2")
    assert {path.name for path in (attempt / "logs").iterdir()} == {
        *("msrun.log", "msrun_1.log", "scheduler.log"),
        *(f"worker_{rank}.log" for rank in range(4)),
    }


@pytest.mark.parametrize("failing", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_death_on_either_node_ends_both_and_is_named_on_both(pair: Pair, failing: int) -> None:
    second = pair.node(1, "crash", failing=failing)
    first = pair.node(0, "crash", failing=failing)
    text = f"rank {failing} was killed by signal 9 (SIGKILL)"
    code, err = finish(first, START_SECONDS)
    assert (code, f"error: {text}" in err) == (137, True), err
    code, err = finish(second)
    assert (code, f"error: node 0: {text}" in err) == (137, True), err
    assert of_run(pair.folder) == []


def test_rank_that_hangs_on_the_other_node_is_named(pair: Pair) -> None:
    first, second = pair.both("hang", "--set", "cluster.step_seconds=2")
    code, err = finish(first, START_SECONDS)
    assert (code, "error: rank 3 has shown no sign of life" in err) == (1, True), err
    assert finish(second)[0] == 1
    (stacks,) = pair.folder.glob("runs/*/*/stacks/rank_3.txt")
    assert "in read_slowly" in stacks.read_text()
    assert of_run(pair.folder) == []


@pytest.mark.parametrize("asked", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_signal_to_either_node_saves_on_both(pair: Pair, asked: int) -> None:
    both = pair.both("save")
    until(lambda: training(pair.folder, 4), both[0])
    both[asked].send_signal(signal.SIGTERM)
    code, err = finish(both[0])
    assert (code, "saved after step 4 of 10; go on with: the same command" in err) == (143, True), (
        err
    )
    code, err = finish(both[1])
    assert code == 143, err
    assert of_run(pair.folder) == []


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_node_that_is_gone_ends_the_other(pair: Pair, killed: int) -> None:
    both = pair.both("wait")
    until(lambda: training(pair.folder, 4), both[0])
    both[killed].kill()
    both[killed].wait()
    code, err = finish(both[1 - killed])
    assert code in (1, 2)
    gone = "node 0 (10.99.0.1) is gone" if killed == 0 else "node 1 (node1) is gone"
    assert gone in err
    deadline = time.monotonic() + END_SECONDS
    while of_run(pair.folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert of_run(pair.folder) == []


@pytest.mark.parametrize(
    ("options", "host", "words"),
    [
        (["--set", "lora.rank=3"], "", "its config or version is not that of node 0; use the same"),
        ([], "node0", "it is called node0 like node 0, and MindSpore gives devices out by host"),
        (["--devices", "1"], "", "it has 1 devices, node 0 has 2; give as many on each node"),
    ],
)
def test_node_that_does_not_fit_is_refused(
    pair: Pair, options: list[str], host: str, words: str
) -> None:
    first = pair.node(0, "wait", "--set", "cluster.start_seconds=20")
    code, err = finish(
        pair.node(1, "wait", "--set", "cluster.start_seconds=20", *options, host=host)
    )
    assert (code, f"node 0 ({ADDRESSES[0]}) refuses this node: {words}" in err) == (2, True), err
    assert list(pair.folder.glob("runs/*")) == []
    first.terminate()
    assert finish(first)[0] == 143


def test_node_that_does_not_come_is_missed_by_name(pair: Pair) -> None:
    code, err = finish(pair.node(0, "wait", "--set", "cluster.start_seconds=1"))
    assert (code, "error: expected node 1 within 1 s, found nobody" in err) == (2, True), err
    code, err = finish(pair.node(1, "wait", "--set", "cluster.start_seconds=1"))
    assert (code, "error: expected node 0 within 1 s, found nobody" in err) == (2, True), err
