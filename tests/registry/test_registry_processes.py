"""Real processes that push at once, and that are killed while they push."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from registry.api import Registry

WRITERS, TURNS = 8, 4

PUSH_WHEN_TOLD = """
import sys
from registry.api import open_registry
from weights import files  # the slow import comes before the start
folder, lora, writer, turns = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
for turn in range(int(turns)):
    manifest = open_registry(folder).push("ink", lora, metadata={"writer": writer, "turn": turn})
    print(manifest.version)
"""

PUSH_AND_DIE = """
import os, signal, sys
from registry.api import open_registry
call, folder, name, lora = sys.argv[1:]
setattr(os, call, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
open_registry(folder).push(name, lora)
"""


def test_racing_pushes_get_different_versions(
    loras: Registry,
    folder: Path,
    make_lora: Any,
    spawn: Callable[..., subprocess.Popen[str]],
) -> None:
    # Two writers share each file, so that blobs are raced for too. Nobody has made the registry.
    writers = [
        spawn(PUSH_WHEN_TOLD, folder, make_lora(f"{k // 2}.safetensors", k // 2), k, TURNS)
        for k in range(WRITERS)
    ]
    for process in writers:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in writers:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()

    owners: dict[int, tuple[str, int]] = {}
    for writer, process in enumerate(writers):
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        for turn, version in enumerate(map(int, output.split())):
            assert version not in owners
            owners[version] = (str(writer), turn)

    everything = list(range(1, WRITERS * TURNS + 1))
    assert sorted(owners) == everything
    assert loras.versions("ink") == everything
    for version, (writer_id, turn) in owners.items():
        assert loras.resolve(f"ink@{version}").metadata == {"writer": writer_id, "turn": turn}
        loras.fetch(f"ink@{version}")
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["ink", "oil"])
@pytest.mark.parametrize("call", ["replace", "link"], ids=["before blob", "before manifest"])
def test_a_killed_push_is_not_visible(
    loras: Registry,
    folder: Path,
    make_lora: Any,
    spawn: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    call: str,
    name: str,
) -> None:
    loras.push("ink", make_lora(seed=1))
    second = make_lora(seed=2)
    process = spawn(PUSH_AND_DIE, call, folder, name, second)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors

    assert loras.names() == ["ink"]
    assert loras.versions("ink") == [1]
    expected = 2 if name == "ink" else 1
    assert loras.push(name, second).version == expected
    assert loras.pull(name, tmp_path / "out").read_bytes() == second.read_bytes()
    # What it has left is found, and removed once nobody can be at work there.
    left = [path for path in folder.rglob(".*") if path.is_file()]
    assert left
    now = loras.store.now()
    assert loras.store.leftovers(now, True) == []
    for path in left:
        os.utime(path, (now.timestamp() - 7200,) * 2)
    assert len(loras.store.leftovers(now, False)) == len(left)
    assert len(loras.store.leftovers(now, True)) == len(left)
    assert not any(path.exists() for path in left)
    loras.check(loras.resolve(name))
