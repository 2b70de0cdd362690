"""Several processes that draw together, one per device."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from cluster.devices import Machine
from cluster.msrun import Msrun, command, environment
from cluster.ports import choose_port
from sampler.drawing import Job, Tell, as_json
from sampler.errors import SampleError

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 7200.0
"""That a process which is ready waits for the others."""


def draw_together(job: Job, tell: Tell, machine: Machine, device_ids: tuple[int, ...]) -> None:
    """Draw a job with a process on each device; returns when all pictures are there.

    Every picture is the same as with one process. Raises SampleError if a process fails. None is
    left, whatever happens.
    """
    with tempfile.TemporaryDirectory(prefix="lora-sample-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(as_json(job), encoding="utf-8")
        run = Msrun(
            worker_num=len(device_ids),
            local_worker_num=len(device_ids),
            master_port=choose_port("127.0.0.1"),
            log_dir=folder / "logs",
        )
        interpreter = Path(sys.executable)
        additions = environment(
            run, machine, device_ids, interpreter, os.environ.get("PATH", ""), _PATIENCE_SECONDS
        )
        arguments = command(run, interpreter, "sampler.worker", [str(folder)])
        said = _Said(folder, len(device_ids))
        with _started(arguments, {**os.environ, **additions}, folder) as process:
            while process.poll() is None:
                _pass_on(said, tell)
                time.sleep(_POLL_SECONDS)
            _pass_on(said, tell)
        if process.returncode:
            raise SampleError(_reason(folder, process.returncode))


class _Said:
    """What the processes write about pictures, each line once."""

    def __init__(self, folder: Path, processes: int):
        self._files = [folder / f"rank_{rank_id}.jsonl" for rank_id in range(processes)]
        self._offsets = [0] * processes

    def lines(self) -> Iterator[dict[str, object]]:
        for number, path in enumerate(self._files):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                file.seek(self._offsets[number])
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offsets[number] += len(line)
                    yield json.loads(line)


def _pass_on(said: _Said, tell: Tell) -> None:
    for line in said.lines():
        if "error" in line:
            raise SampleError(str(line["error"]))
        if "traceback" in line:
            print(line["traceback"], file=sys.stderr)
            last = str(line["traceback"]).strip().splitlines()[-1]
            raise SampleError(f"a process that draws has failed: {last}")
        tell(Path(str(line["file"])), bool(line["there"]))


@contextlib.contextmanager
def _started(
    arguments: list[str], variables: dict[str, str], folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "msrun.log").open("wb") as log:
        process = subprocess.Popen(
            arguments,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            family = [psutil.Process(process.pid)]
            family += family[0].children(recursive=True)
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(family[1:], timeout=5)
        process.wait()


def end_with_parent() -> None:
    """Be killed by the kernel when the process that started this one is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _reason(folder: Path, code: int) -> str:
    for path in [*sorted((folder / "logs").glob("worker_*.log")), folder / "msrun.log"]:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        errors = [line.strip() for line in lines if "Error" in line]
        if errors:
            return f"a process that draws ended with exit code {code}: {errors[-1][:500]}"
    return f"the processes that draw ended with exit code {code}; try again with --devices 1"
