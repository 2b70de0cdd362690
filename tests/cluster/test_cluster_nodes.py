from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from cluster import mounted_table
from cluster.errors import ClusterError
from cluster.hostlist import expand_hosts
from cluster.nodes import Nodes, this_node

SLURM = {
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_JOB_NODELIST": "npu[08-10]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "npu[08-10]",
    "SLURM_NODEID": "2",
}
OPERATOR = {
    "MS_SCHED_HOST": "10.96.0.7",
    "MS_SCHED_PORT": "2222",
    "MS_WORKER_NUM": "16",
    "MS_LOCAL_WORKER": "8",
    "MS_NODE_RANK": "1",
    "MS_ROLE": "MS_WORKER",
    "NPU_POD": "true",
}
VOLCANO = {
    "VC_TASK_INDEX": "1",
    "VC_NODE_HOSTS": "job-node-0.job,job-node-1.job",
    "POD_IP": "10.244.0.8",
    "XDL_IP": "192.168.0.2",
}


def table(*addresses: str, devices: int = 8, status: str = "completed", **extra: str) -> str:
    """hccl.json of servers at these addresses, which the operator calls by other names."""
    servers = [
        {
            "server_id": f"uid-{number}",
            "host_ip": address,
            "device": [{"device_id": str(n)} for n in range(devices)],
            **extra,
        }
        for number, address in enumerate(addresses)
    ]
    return json.dumps({"status": status, "server_list": servers, "version": "1.0"})


def test_one_node_without_any_word() -> None:
    assert this_node({"PATH": "/bin"}) == Nodes(1, 0, None, told_by="nobody")


def test_options_count_for_more_than_the_environment() -> None:
    found = this_node(SLURM | OPERATOR, nnodes=2, node_rank=1, master_addr="10.0.0.1")
    assert found == Nodes(2, 1, "10.0.0.1", told_by="options")
    assert this_node({}, nnodes=1) == Nodes(1, 0, None, told_by="options")


def test_slurm_step() -> None:
    assert this_node(SLURM) == Nodes(3, 2, "npu08", told_by="Slurm")


def test_slurm_step_on_fewer_nodes_than_the_job() -> None:
    step = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"}
    found = this_node(SLURM | step | {"SLURM_STEP_NODELIST": "npu09"})
    assert found == Nodes(1, 0, None, told_by="Slurm")


def test_slurm_script_on_one_node() -> None:
    script = {"SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "npu08"}
    assert this_node(script) == Nodes(told_by="Slurm")


def test_ascend_operator() -> None:
    worker = Nodes(2, 1, "10.96.0.7", 2222, 8, told_by="ascend-operator")
    assert this_node(OPERATOR) == worker
    assert this_node(OPERATOR, rank_table=table("192.168.0.1", "192.168.0.2")) == worker
    first = OPERATOR | {"MS_NODE_RANK": "0", "MS_ROLE": "MS_SCHED"}
    assert this_node(first).node_rank == 0
    alone = this_node(first | {"MS_WORKER_NUM": "8"})
    assert alone == Nodes(1, 0, None, None, 8, told_by="ascend-operator")


def test_volcano() -> None:
    assert this_node(VOLCANO) == Nodes(2, 1, "job-node-0.job", told_by="Volcano")


def test_ranks_follow_the_mounted_table_and_not_volcano_s_numbers() -> None:
    found = this_node(VOLCANO, rank_table=table("192.168.0.2", "192.168.0.1"))
    assert found == Nodes(2, 0, "192.168.0.2", None, 8, told_by="hccl.json")


def test_mounted_table_alone() -> None:
    pod = {"XDL_IP": "192.168.0.2", "POD_IP": "10.244.0.8"}
    found = this_node(pod, rank_table=table("192.168.0.1", "192.168.0.2"))
    assert found == Nodes(2, 1, "192.168.0.1", None, 8, told_by="hccl.json")
    older = json.loads(table("192.168.0.1", "192.168.0.2"))
    for server in older["server_list"]:
        server["server_id"] = server.pop("host_ip")
    assert this_node(pod, rank_table=json.dumps(older)) == found


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {k: v for k, v in SLURM.items() if "STEP" not in k},
            "SLURM_JOB_NUM_NODES is 3, but this process is not one of a step; start it with srun",
        ),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "24"}, "SLURM_STEP_NUM_TASKS is 24, expected one task"),
        (SLURM | {"SLURM_STEP_NODELIST": "npu[08-09]"}, "NODELIST says 2, SLURM_STEP_NUM_NODES"),
        (SLURM | {"SLURM_NODEID": "3"}, "SLURM_NODEID is 3, expected less than"),
        (SLURM | {"SLURM_NODEID": "x"}, "SLURM_NODEID: expected a number from 0 on, found 'x'"),
        (SLURM | {"SLURM_STEP_NODELIST": "npu[8-"}, "expected a list such as node[01-03,7]"),
        (
            {k: v for k, v in OPERATOR.items() if k != "MS_SCHED_HOST"},
            "MS_NODE_RANK is set, but MS_SCHED_HOST is not",
        ),
        (OPERATOR | {"MS_WORKER_NUM": "12"}, "MS_WORKER_NUM is 12, expected a multiple of"),
        (OPERATOR | {"MS_NODE_RANK": "2"}, "MS_NODE_RANK is 2, expected less than"),
        (OPERATOR | {"MS_NODE_RANK": "0"}, "MS_ROLE is MS_WORKER on node 0: expected the Sched"),
        (
            OPERATOR | {"MS_NODE_RANK": "0", "MS_ROLE": "MS_SCHED", "NPU_POD": "false"},
            "request NPUs for it too",
        ),
        (
            {"VC_TASK_INDEX": "0"},
            "VC_TASK_INDEX is set: expected one VC_<task>_HOSTS beside it, found none",
        ),
        (VOLCANO | {"VC_PS_HOSTS": "job-ps-0.job"}, "found VC_NODE_HOSTS, VC_PS_HOSTS"),
        (VOLCANO | {"VC_TASK_INDEX": "2"}, "VC_TASK_INDEX is 2, expected less than"),
    ],
)
def test_contradictions_of_one_source(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ClusterError) as caught:
        this_node(environment)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "rank_table", "message"),
    [
        (OPERATOR, table("10.0.0.1"), "server_list says 1, MS_WORKER_NUM / MS_LOCAL_WORKER says 2"),
        (
            OPERATOR | {"XDL_IP": "10.0.0.1"},
            table("10.0.0.1", "10.0.0.2"),
            "hccl.json's place of this node says 0, MS_NODE_RANK says 1",
        ),
        (VOLCANO, table("192.168.0.2"), "server_list says 1, VC_NODE_HOSTS says 2"),
        (VOLCANO, table("10.0.0.1", "10.0.0.2"), "expected this node in server_list"),
        ({}, table("10.0.0.1"), "neither POD_IP (None) nor XDL_IP (None)"),
        ({}, "{}", "expected status and server_list, found neither"),
        ({}, "not JSON", "expected status and server_list, found neither"),
        ({}, table(status="completed"), "found 'completed' and 0 servers"),
        ({}, table("10.0.0.1", status="initializing"), "found 'initializing'"),
        ({"POD_IP": "uid"}, table("a", server_id="uid"), "expected an address of server 'uid'"),
    ],
)
def test_contradictions_with_the_mounted_table(
    environment: dict[str, str], rank_table: str, message: str
) -> None:
    with pytest.raises(ClusterError) as caught:
        this_node(environment, rank_table=rank_table)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((None, 1, None), "--node-rank: expected --nnodes beside it"),
        ((None, None, "10.0.0.1"), "--master-addr: expected --nnodes beside it"),
        ((2, 1, None), "--nnodes 2: expected --master-addr, found none"),
        ((2, None, "10.0.0.1"), "--nnodes 2: expected --node-rank, found none"),
        ((2, 2, "10.0.0.1"), "--node-rank 2: expected 0 to 1 with --nnodes 2"),
    ],
)
def test_incomplete_options(
    options: tuple[int | None, int | None, str | None], message: str
) -> None:
    with pytest.raises(ClusterError) as caught:
        this_node({}, *options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("vm", "vm"),
        ("a,b.c", "a b.c"),
        ("n[1-3]", "n1 n2 n3"),
        ("n[08-10,12],gpu", "n08 n09 n10 n12 gpu"),
        ("r[1-2]n[1-2]", "r1n1 r1n2 r2n1 r2n2"),
        ("n[1-2]-ib", "n1-ib n2-ib"),
    ],
)
def test_host_lists(text: str, hosts: str) -> None:
    assert expand_hosts(text) == tuple(hosts.split())


@pytest.mark.parametrize("text", ["", "n[", "n[1-]", "n[3-1]", "n[1]]", "a,,b", "n[0-99999999]"])
def test_malformed_host_lists(text: str) -> None:
    with pytest.raises(ClusterError, match="expected a list such as"):
        expand_hosts(text)


def test_the_mounted_table_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "hccl.json"
    assert mounted_table.read_when_complete(path) is None
    path.write_text(table("10.0.0.1", status="initializing"))
    with pytest.raises(ClusterError, match=r"expected status completed within 0\.2 s"):
        mounted_table.read_when_complete(path, seconds=0.2)

    def complete() -> None:
        time.sleep(0.2)
        path.write_text(table("10.0.0.1"))

    writer = threading.Thread(target=complete)
    writer.start()
    assert mounted_table.read_when_complete(path, seconds=5) == table("10.0.0.1")
    writer.join()
