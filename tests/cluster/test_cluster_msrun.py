from __future__ import annotations

from pathlib import Path

from cluster.devices import Machine
from cluster.msrun import Msrun, command, environment

JOB = Msrun(worker_num=4, local_worker_num=4, master_port=8118, log_dir=Path("/run/logs"))
PYTHON = Path("/venv/bin/python3.11")


def test_command() -> None:
    assert command(JOB, PYTHON, "trainer.worker", ["/run"]) == [
        "/venv/bin/python3.11",
        "-m",
        "mindspore.parallel.cluster.run",
        "--worker_num=4",
        "--local_worker_num=4",
        "--master_addr=127.0.0.1",
        "--master_port=8118",
        "--log_dir=/run/logs",
        "--join=True",
        "--cluster_time_out=300",
        "--tail_worker_log=4",
        "python3",
        "-m",
        "trainer.worker",
        "/run",
    ]


def test_rank_table_is_passed() -> None:
    job = Msrun(2, 2, 8118, Path("/run/logs"), rank_table_file=Path("/run/rank_table.json"))
    assert "--rank_table_file=/run/rank_table.json" in command(job, PYTHON, "worker", [])


def test_environment_on_cpu() -> None:
    machine = Machine("CPU", tuple(range(10)), 10)
    assert environment(JOB, machine, (0, 1, 2, 3), PYTHON, "/usr/bin:/bin", 300) == {
        "PATH": "/venv/bin:/usr/bin:/bin",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "2",
        "MS_OM_PATH": "/run/logs",
        "MS_CPU_COMM_OP_TIMEOUT": "300",
    }


def test_environment_on_ascend() -> None:
    additions = environment(
        JOB, Machine("Ascend", tuple(range(8)), 2), (7, 4, 5, 6), PYTHON, "", 300
    )
    assert additions["ASCEND_RT_VISIBLE_DEVICES"] == "4,5,6,7"
    assert additions["OMP_NUM_THREADS"] == "1"
    assert additions["PATH"] == "/venv/bin"
    assert "MS_CPU_COMM_OP_TIMEOUT" not in additions
