"""Which of how many machines of a run this process is on, and where rank 0's is.

The variables are those of srun(1), of MindCluster's ascend-operator for MindSpore jobs, and of
Volcano's `env` and `svc` plugins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cluster import mounted_table
from cluster.errors import ClusterError
from cluster.hostlist import expand_hosts


@dataclass(frozen=True)
class Nodes:
    """The machines of one run, seen from one of them."""

    nnodes: int = 1
    node_rank: int = 0
    """0 is the machine on which msrun's scheduler runs."""
    master_addr: str | None = None
    """Host name or address of machine 0; None if there is one machine, unless an option names
    it."""
    master_port: int | None = None
    """The scheduler's port, where the job's engine decides on it."""
    workers_per_node: int | None = None
    """How many devices each machine gives, where the job's engine tells."""
    told_by: str = "nobody"
    """"options", "Slurm", "ascend-operator", "Volcano", "hccl.json" or "nobody"."""


def this_node(
    environment: Mapping[str, str],
    nnodes: int | None = None,
    node_rank: int | None = None,
    master_addr: str | None = None,
    rank_table: str | None = None,
) -> Nodes:
    """What the options say, else Slurm, else Kubernetes, else one machine.

    `rank_table` is the text of the mounted hccl.json, if there is one. Raises ClusterError where
    something is missing or two sources contradict each other.
    """
    if nnodes is not None or node_rank is not None or master_addr is not None:
        return _from_options(nnodes, node_rank, master_addr)
    if "SLURM_JOB_NUM_NODES" in environment:
        found = _from_slurm(environment)
    elif "MS_NODE_RANK" in environment:
        found = _from_operator(environment, rank_table)
    elif "VC_TASK_INDEX" in environment:
        found = _from_volcano(environment, rank_table)
    elif rank_table is not None:
        found = _from_rank_table(environment, rank_table)
    else:
        return Nodes()
    # Alone, it need not be reached at the name by which others would know it.
    return found if found.nnodes > 1 else replace(found, master_addr=None, master_port=None)


def _from_options(nnodes: int | None, node_rank: int | None, master_addr: str | None) -> Nodes:
    if nnodes is None:
        given = "--node-rank" if node_rank is not None else "--master-addr"
        raise ClusterError(f"{given}: expected --nnodes beside it, found none; say how many nodes")
    if nnodes == 1 and node_rank is None:
        node_rank = 0
    if nnodes > 1 and master_addr is None:
        raise ClusterError(
            f"--nnodes {nnodes}: expected --master-addr, found none; name node 0's address"
        )
    if node_rank is None:
        raise ClusterError(
            f"--nnodes {nnodes}: expected --node-rank, found none; number the nodes from 0"
        )
    if not 0 <= node_rank < nnodes:
        raise ClusterError(
            f"--node-rank {node_rank}: expected 0 to {nnodes - 1} with --nnodes {nnodes}; "
            "number the nodes from 0"
        )
    return Nodes(nnodes, node_rank, master_addr, told_by="options")


def _from_slurm(environment: Mapping[str, str]) -> Nodes:
    """Slurm sets SLURM_STEP_* only in what srun starts, and the others in the script too."""
    if "SLURM_STEP_NUM_NODES" not in environment:
        count = _number(environment, "SLURM_JOB_NUM_NODES", 1)
        if count == 1:
            return Nodes(told_by="Slurm")
        raise ClusterError(
            f"SLURM_JOB_NUM_NODES is {count}, but this process is not one of a step; start it "
            "with srun --ntasks-per-node=1"
        )
    count = _number(environment, "SLURM_STEP_NUM_NODES", 1)
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if tasks != count:
        raise ClusterError(
            f"SLURM_STEP_NUM_TASKS is {tasks}, expected one task on each of the {count} nodes; "
            "start it with srun --ntasks-per-node=1, it starts the workers itself"
        )
    text = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    hosts = expand_hosts(text)
    node_rank = _number(environment, "SLURM_NODEID", 0)
    _check("SLURM_STEP_NODELIST", len(hosts), "SLURM_STEP_NUM_NODES", count)
    _check_rank("SLURM_NODEID", node_rank, count)
    return Nodes(count, node_rank, hosts[0], told_by="Slurm")


def _from_operator(environment: Mapping[str, str], rank_table: str | None) -> Nodes:
    for name in ("MS_SCHED_HOST", "MS_SCHED_PORT", "MS_WORKER_NUM", "MS_LOCAL_WORKER"):
        if not environment.get(name):
            raise ClusterError(
                f"MS_NODE_RANK is set, but {name} is not; run as an AscendJob, or unset it"
            )
    workers = _number(environment, "MS_WORKER_NUM", 1)
    local = _number(environment, "MS_LOCAL_WORKER", 1)
    node_rank = _number(environment, "MS_NODE_RANK", 0)
    scheduler = environment.get("MS_ROLE") == "MS_SCHED"
    if (scheduler and environment.get("NPU_POD") == "false") or (node_rank == 0) != scheduler:
        raise ClusterError(
            f"MS_ROLE is {environment.get('MS_ROLE')} on node {node_rank}: expected the Scheduler "
            "to be node 0 and to have NPUs like every Worker; request NPUs for it too, as "
            "`lora-launch submit` does"
        )
    if workers % local:
        raise ClusterError(
            f"MS_WORKER_NUM is {workers}, expected a multiple of MS_LOCAL_WORKER, {local}; request "
            "as many NPUs for each replica"
        )
    count = workers // local
    _check_rank("MS_NODE_RANK", node_rank, count)
    if rank_table is not None:
        servers = mounted_table.servers(rank_table)
        _check("hccl.json's server_list", len(servers), "MS_WORKER_NUM / MS_LOCAL_WORKER", count)
        place = mounted_table.place(servers, environment)
        if place is not None:
            _check("hccl.json's place of this node", place, "MS_NODE_RANK", node_rank)
    port = _number(environment, "MS_SCHED_PORT", 1)
    host = environment["MS_SCHED_HOST"]
    return Nodes(count, node_rank, host, port, local, told_by="ascend-operator")


def _from_volcano(environment: Mapping[str, str], rank_table: str | None) -> Nodes:
    lists = {k: v for k, v in environment.items() if re.fullmatch(r"VC_\w+_HOSTS", k)}
    if len(lists) != 1:
        raise ClusterError(
            "VC_TASK_INDEX is set: expected one VC_<task>_HOSTS beside it, found "
            f"{', '.join(sorted(lists)) or 'none'}; give the job one task and the plugin svc"
        )
    ((name, text),) = lists.items()
    hosts = text.split(",")
    index = _number(environment, "VC_TASK_INDEX", 0)
    _check_rank("VC_TASK_INDEX", index, len(hosts))
    if rank_table is not None:
        # The operator need not have numbered the pods as Volcano did, and ranks follow its table.
        told = _from_rank_table(environment, rank_table)
        _check("hccl.json's server_list", told.nnodes, name, len(hosts))
        return told
    return Nodes(len(hosts), index, hosts[0], told_by="Volcano")


def _from_rank_table(environment: Mapping[str, str], rank_table: str) -> Nodes:
    servers = mounted_table.servers(rank_table)
    place = mounted_table.place(servers, environment)
    if place is None:
        raise ClusterError(
            "hccl.json: expected this node in server_list, found neither POD_IP "
            f"({environment.get('POD_IP')}) nor XDL_IP ({environment.get('XDL_IP')}) there; set "
            "them from status.podIP and status.hostIP in the pod"
        )
    counts = {len(server.get("device", ())) for server in servers}
    return Nodes(
        len(servers),
        place,
        mounted_table.address(servers[0]),
        workers_per_node=counts.pop() if len(counts) == 1 else None,
        told_by="hccl.json",
    )


def _number(environment: Mapping[str, str], name: str, least: int) -> int:
    text = environment.get(name, "")
    if not re.fullmatch(r"\d+", text) or int(text) < least:
        raise ClusterError(
            f"{name}: expected a number from {least} on, found {text!r}; unset it, or give "
            "--nnodes, --node-rank and --master-addr"
        )
    return int(text)


def _check_rank(name: str, node_rank: int, count: int) -> None:
    if node_rank >= count:
        raise ClusterError(
            f"{name} is {node_rank}, expected less than the number of nodes, {count}; give "
            "--nnodes, --node-rank and --master-addr"
        )


def _check(name: str, found: int, other: str, expected: int) -> None:
    if found != expected:
        raise ClusterError(
            f"{name} says {found}, {other} says {expected}; give --nnodes, --node-rank and "
            "--master-addr, which count for more than either"
        )
