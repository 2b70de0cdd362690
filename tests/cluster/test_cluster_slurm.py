"""The batch script: as text, and submitted to a Slurm of two nodes that the test starts.

`python tests/cluster/test_cluster_slurm.py` writes the golden file anew.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.nodes import Nodes, this_node
from cluster.slurm import SlurmJob, script

GOLDEN = Path(__file__).with_name("golden") / "job.sbatch"
JOB = SlurmJob(
    name="emoji-ink-20260101-120000",
    nodes=2,
    folder="/data/my work",
    config="/data/my work/submitted/emoji-ink-20260101-120000.config.yaml",
    output="/data/my work/runs",
    log="/data/logs/emoji-ink-20260101-120000-%j.log",
    launch=["/data/venv/bin/lora-launch", "--devices", "8"],
    partition="npu",
)


def test_golden_file() -> None:
    assert script(JOB) == GOLDEN.read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(GOLDEN)]).returncode == 0


def test_without_a_partition_there_is_no_directive() -> None:
    assert "--partition" not in script(replace(JOB, partition=None))


@pytest.mark.parametrize("log", ["/data/my work/%j.log", "/data/a\n#SBATCH --uid=0", '/a"b'])
def test_a_log_that_a_directive_cannot_hold(log: str) -> None:
    with pytest.raises(ClusterError, match="--out: expected a folder without spaces"):
        script(replace(JOB, log=log))


# ---- with a real Slurm

STAND_IN = """\
#!/bin/bash
echo "start $*"
env > "environment_$SLURM_NODEID.txt"
case "$*" in *--resume*) exit 0;; esac
runs=${2#output=}
trap 'mkdir -p "$runs/tiny-1/checkpoints"
      touch "$runs/tiny-1/checkpoints/step_00000004.safetensors"
      echo saved
      exit 143' TERM
while :; do sleep 0.1; done
"""
"""What lora-launch does when it is asked to end, and when it resumes."""

Submit = Callable[..., "Job"]


class Job:
    """One job of the test's Slurm."""

    def __init__(self, number: str, log: Path, environment: dict[str, str]):
        self.number, self.log, self._environment = number, log, environment

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout

    def field(self, name: str) -> str:
        shown = self.call("scontrol", "--oneliner", "show", "job", self.number)
        return shown.partition(f"{name}=")[2].split()[0]

    def text(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.field("JobState"), self.text())
            time.sleep(0.2)

    def start_now(self) -> None:
        """Instead of after the two minutes that Slurm keeps a requeued job waiting."""
        self.until(lambda: self.field("JobState") == "PENDING")
        self.call("scontrol", "update", f"jobid={self.number}", "StartTime=now")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Submit]:
    """Submit a job whose lora-launch is the stand-in; Slurm ends with the test."""
    search = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    for program in ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue"):
        if shutil.which(program, path=search) is None:
            pytest.skip(f"no {program}; Debian has it in slurm-wlm")
    host = socket.gethostname().partition(".")[0]
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": free_port(),
        "AuthType": "auth/none",
        "CredType": "cred/none",
        "SlurmUser": getpass.getuser(),
        "SlurmdUser": getpass.getuser(),
        "StateSaveLocation": tmp_path / "state",
        "SlurmdSpoolDir": f"{tmp_path}/spool_%n",
        "SlurmctldPidFile": tmp_path / "slurmctld.pid",
        "SlurmdPidFile": f"{tmp_path}/slurmd_%n.pid",
        "SlurmctldLogFile": tmp_path / "slurmctld.log",
        "SlurmdLogFile": f"{tmp_path}/slurmd_%n.log",
        "ProctrackType": "proctrack/pgid",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "ReturnToService": 2,
        "KillWait": 20,
        "PartitionName": "npu Nodes=npu[08-09] Default=YES MaxTime=INFINITE State=UP",
    }
    lines = [f"{key}={value}\n" for key, value in settings.items()]
    for node in ("npu08", "npu09"):
        address = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()}"
        lines.insert(-1, f"NodeName={node} {address} CPUs=1 State=UNKNOWN\n")
        (tmp_path / f"spool_{node}").mkdir()
    configuration = tmp_path / "slurm.conf"
    configuration.write_text("".join(lines))
    environment = {**os.environ, "SLURM_CONF": str(configuration), "PATH": search}
    for name in [name for name in environment if name.startswith(("SLURM_JOB", "SBATCH_"))]:
        del environment[name]
    (tmp_path / "state").mkdir()
    daemons = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for command in (
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", "npu08"],
            ["slurmd", "-D", "-N", "npu09"],
        )
    ]
    jobs: list[Job] = []

    def begin(nodes: int = 1, **changes: object) -> Job:
        program = tmp_path / "lora-launch"
        program.write_text(STAND_IN)
        program.chmod(0o755)
        (tmp_path / "my work").mkdir()
        job = SlurmJob(
            name="tiny",
            nodes=nodes,
            folder=str(tmp_path / "my work"),
            config="config.yaml",
            output=str(tmp_path / "my work" / "runs"),
            log=str(tmp_path / "tiny-%j.log"),
            launch=[str(program)],
        )
        file = tmp_path / "job.sbatch"
        file.write_text(script(job))
        options = [f"--{name}={value}" for name, value in changes.items()]
        done = subprocess.run(
            ["sbatch", "--parsable", *options, str(file)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stderr
        number = done.stdout.strip()
        jobs.append(Job(number, tmp_path / f"tiny-{number}.log", environment))
        return jobs[-1]

    try:
        deadline = time.monotonic() + 30
        while (
            "idle 2\n"
            not in subprocess.run(
                ["sinfo", "--noheader", "--format=%T %D"],
                env=environment,
                capture_output=True,
                text=True,
            ).stdout
        ):
            if time.monotonic() > deadline or any(one.poll() is not None for one in daemons):
                log = tmp_path / "slurmctld.log"
                last = log.read_text().splitlines()[-1:] if log.is_file() else []
                pytest.skip(f"slurmctld and slurmd do not come up here: {last}")
            time.sleep(0.2)
        yield begin
    finally:
        for job in jobs:
            subprocess.run(["scancel", job.number], env=environment, capture_output=True)
            job.until(lambda job=job: job.field("JobState") not in ("RUNNING", "COMPLETING"))  # type: ignore[misc]
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(20)


def test_a_requeued_job_resumes(submit: Submit, tmp_path: Path) -> None:
    job = submit()
    job.until(lambda: "start" in job.text())
    runs = tmp_path / "my work" / "runs" / f"slurm-{job.number}"
    assert f"start --set output={runs} config.yaml\n" in job.text()
    job.call("scontrol", "requeue", job.number)
    job.start_now()
    job.until(lambda: job.field("JobState") == "COMPLETED")
    assert "saved\n" in job.text()
    assert f"start --resume {runs}/tiny-1\n" in job.text()
    assert (job.field("Restarts"), job.field("ExitCode")) == ("1", "0:0")


def test_a_cancelled_job_stays_so(submit: Submit) -> None:
    job = submit()
    job.until(lambda: "start" in job.text())
    job.call("scancel", job.number)
    job.until(lambda: job.field("JobState") == "CANCELLED")
    assert "saved\n" in job.text()
    assert job.field("Restarts") == "0"


def test_each_node_knows_its_rank(submit: Submit, tmp_path: Path) -> None:
    job = submit(nodes=2)
    files = [tmp_path / "my work" / f"environment_{rank}.txt" for rank in range(2)]
    job.until(lambda: all(file.is_file() for file in files))
    job.until(lambda: job.text().count("start") == 2)
    for rank, file in enumerate(files):
        lines = (line.partition("=") for line in file.read_text().splitlines())
        environment = {name: value for name, _, value in lines}
        assert this_node(environment) == Nodes(2, rank, "npu08", told_by="Slurm")
        script_s = {k: v for k, v in environment.items() if not k.startswith("SLURM_STEP_")}
        with pytest.raises(ClusterError, match="start it with srun"):
            this_node(script_s)


@pytest.mark.slow
def test_a_job_out_of_time_saves_and_is_requeued(submit: Submit) -> None:
    # Slurm's time limits are in minutes and its signals come up to a minute early.
    job = submit(time=2)
    job.until(lambda: "start" in job.text())
    job.until(lambda: "saved" in job.text(), seconds=120)
    job.start_now()
    job.until(lambda: job.field("JobState") == "COMPLETED")
    assert "start --resume" in job.text()


if __name__ == "__main__":
    GOLDEN.write_text(script(JOB), encoding="utf-8")
