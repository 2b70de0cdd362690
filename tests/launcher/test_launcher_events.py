from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from launcher import failures
from launcher.events import first_error, new_events


def test_half_written_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert new_events(path, 0) == ([], 0)
    path.write_text('{"event": "phase", "phase": "añ"}\n{"event": "st', encoding="utf-8")
    events, offset = new_events(path, 0)
    assert events == [{"event": "phase", "phase": "añ"}]
    assert new_events(path, offset) == ([], offset)
    with path.open("a") as file:
        file.write('ep"}\n{"event": "last"}\n')
    events, offset = new_events(path, offset)
    assert events == [{"event": "step"}, {"event": "last"}]
    assert offset == path.stat().st_size


def write_error(folder: Path, rank_id: int, seconds: int, **values: Any) -> None:
    report = {
        "rank_id": rank_id,
        "type": "RuntimeError",
        "message": "no memory",
        "user": False,
        "traceback": "Traceback",
        **values,
    }
    path = folder / f"rank_{rank_id}.json"
    path.write_text(json.dumps(report))
    os.utime(path, (seconds, seconds))


def test_first_error_is_the_oldest(tmp_path: Path) -> None:
    assert first_error(tmp_path) is None
    write_error(tmp_path, 0, 20, message="the others do not answer")
    write_error(tmp_path, 1, 10)
    (tmp_path / ".rank_2.json.part").write_text("{")
    error = first_error(tmp_path)
    assert error is not None
    assert error.rank_id == 1
    failure = failures.of_rank(error, Path("worker_1.log"))
    assert failure.text == "rank 1 failed with RuntimeError: no memory; see worker_1.log"
    assert (failure.exit_code, failure.traceback) == (1, "Traceback")


def test_input_to_blame_is_told_in_its_own_words(tmp_path: Path) -> None:
    write_error(tmp_path, 3, 10, type="DataError", message="a.png is not an image", user=True)
    error = first_error(tmp_path)
    assert error is not None
    failure = failures.of_rank(error, Path("worker_3.log"))
    assert failure.text == "a.png is not an image"
    assert failure.exit_code == 2


@pytest.mark.parametrize(
    ("code", "log", "text"),
    [
        (-11, "anything", "rank 0 was killed by signal 11 (SIGSEGV); see "),
        (
            -9,
            "",
            "signal 9 (SIGKILL), as the kernel does when memory runs out; see ",
        ),
        (3, "", "rank 0 ended with exit code 3; see "),
        (1, "a\nImportError: no foo\n\n", "exit code 1 after writing 'ImportError: no foo'; see "),
    ],
)
def test_exit_without_an_error_file(tmp_path: Path, code: int, log: str, text: str) -> None:
    path = tmp_path / "worker_0.log"
    path.write_text(log)
    failure = failures.of_exit("rank 0", code, path)
    assert text in failure.text
    assert failure.exit_code == (128 - code if code < 0 else code)
    assert failure.killed == (code < 0)


def test_exit_without_a_log(tmp_path: Path) -> None:
    assert "exit code 1; see " in failures.of_exit("rank 0", 1, tmp_path / "none.log").text
