"""The demo's job on two nodes of two workers each, also with a worker of either killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from registry.api import open_registry
from tests.end_to_end.test_main_job import CONFIG, ROOT
from tests.launcher.launching import of_run, workers
from tests.launcher.namespaces import ADDRESSES, two_namespaces, within

pytestmark = pytest.mark.slow
SECONDS = 600


@pytest.fixture(scope="module")
def spaces() -> Iterator[tuple[str, str]]:
    with two_namespaces() as names:
        yield names


def begin(spaces: tuple[str, str], folder: Path, cache: Path) -> list[subprocess.Popen[str]]:
    """Start the job on both nodes; its runs are in `folder`/runs."""
    settings = (
        f"output={folder / 'runs'}",
        f"registry={folder / 'registry'}",
        f"cache={cache}",
        "epochs=null",
        "images=640",
        "save_every=10",
        "validate_every=null",
        "samples=null",
    )
    command = [sys.executable, "-m", "launcher.cli", "--devices", "2", "--nnodes", "2"]
    command += ["--max-restarts", "2", "--master-addr", ADDRESSES[0], CONFIG]
    command += [part for setting in settings for part in ("--set", setting)]
    return [
        subprocess.Popen(
            [*within(space, f"node{rank}"), *command, "--node-rank", str(rank)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, space in enumerate(spaces)
    ]


def finish(nodes: list[subprocess.Popen[str]], folder: Path) -> list[str]:
    """What both said; both have ended well and published once, and nothing is left."""
    said = [node.communicate(timeout=SECONDS)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert of_run(folder) == []
    found = open_registry(str(folder / "registry"))
    assert (found.names(), found.versions("emoji-ink")) == (["emoji-ink"], [1])
    return said


def digests(folder: Path) -> list[str]:
    """Of the weights on each rank at the end."""
    (result,) = folder.glob("runs/*/*/result.json")
    return list(json.loads(result.read_text())["rank_digests"])


def steps(folder: Path) -> int:
    """How many steps are done."""
    return sum(
        '"event": "step"' in line
        for path in folder.glob("runs/*/*/events.jsonl")
        for line in path.read_text().splitlines()
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def untouched(
    spaces: tuple[str, str], cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """The weights of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("untouched")
    finish(begin(spaces, folder, cache), folder)
    return digests(folder)


@pytest.mark.timeout(3 * SECONDS)
def test_four_ranks_on_two_nodes_have_the_same_weights(untouched: list[str]) -> None:
    assert len(untouched) == 4 and len(set(untouched)) == 1


@pytest.mark.timeout(3 * SECONDS)
@pytest.mark.parametrize("rank_id", [1, 3], ids=["node 0", "node 1"])
def test_the_death_of_a_worker_changes_nothing(
    rank_id: int, spaces: tuple[str, str], cache: Path, untouched: list[str], tmp_path: Path
) -> None:
    nodes = begin(spaces, tmp_path, cache)
    deadline = time.monotonic() + SECONDS
    while steps(tmp_path) < 14:
        assert nodes[0].poll() is None, nodes[0].communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    victim: psutil.Process = workers(tmp_path)[rank_id]
    victim.kill()
    first, _ = finish(nodes, tmp_path)
    assert f"rank {rank_id} was killed by signal 9 (SIGKILL)" in first
    assert "attempt_2 goes on from step 10" in first
    assert digests(tmp_path) == untouched
