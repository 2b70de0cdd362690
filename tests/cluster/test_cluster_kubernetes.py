"""Manifests against golden files and against the rules of the two projects.

`python tests/cluster/test_cluster_kubernetes.py` writes the golden files anew.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import names
from cluster.errors import ClusterError
from cluster.kubernetes import (
    PRODUCTS,
    KubernetesJob,
    ascend_job,
    dump,
    volcano_job,
)

GOLDEN = Path(__file__).with_name("golden")
JOB = KubernetesJob(
    name="emoji-ink-20260101-120000",
    namespace="training",
    image="example/lora:1",
    nodes=2,
    devices_per_node=8,
    product=PRODUCTS["A2"],
    config="name: emoji-ink\nepochs: 32\n",
    runs="/data/runs/emoji-ink-20260101-120000",
    volumes=[("loras", "/data")],
    secrets=["registry-keys"],
)
CASES = {
    "ascend_job_2x8_a2.yaml": ascend_job(JOB),
    "ascend_job_1x8_910a.yaml": ascend_job(
        replace(JOB, nodes=1, product=PRODUCTS["910A"], secrets=())
    ),
    "volcano_job_2x16_a3.yaml": volcano_job(
        replace(JOB, devices_per_node=16, product=PRODUCTS["A3"])
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_golden_files(name: str) -> None:
    text = (GOLDEN / name).read_text(encoding="utf-8")
    assert dump(CASES[name]) == text
    assert list(yaml.safe_load_all(text)) == CASES[name]


# ---- the rules, in our own words

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
POD_KEYS = {
    "terminationGracePeriodSeconds": int,
    "automountServiceAccountToken": bool,
    "nodeSelector": dict,
    "affinity": dict,
    "containers": list,
    "volumes": list,
    "restartPolicy": str,
}
CONTAINER_KEYS = {
    "name": str,
    "image": str,
    "command": list,
    "env": list,
    "envFrom": list,
    "resources": dict,
    "volumeMounts": list,
    "ports": list,
}


def labels(value: Any) -> Iterator[tuple[str, str]]:
    """Every label and annotation below a value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("labels", "annotations"):
                yield from inner.items()
            else:
                yield from labels(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from labels(inner)


def check_pod(pod: dict[str, Any], longest_name: str) -> None:
    for key, value in pod.items():
        assert isinstance(value, POD_KEYS[key]), key
    assert len(longest_name) <= 63
    (container,) = pod["containers"]
    for key, value in container.items():
        assert isinstance(value, CONTAINER_KEYS[key]), key
    assert all(isinstance(word, str) for word in container["command"])
    assert all(isinstance(value, int) for value in container["resources"]["limits"].values())
    assert container["resources"]["limits"] == container["resources"]["requests"]
    volumes = [volume["name"] for volume in pod["volumes"]]
    mounts = container["volumeMounts"]
    assert sorted(mount["name"] for mount in mounts) == sorted(volumes)
    assert len({mount["mountPath"] for mount in mounts}) == len(mounts)
    assert all(len(volume) == 2 for volume in pod["volumes"])
    for variable in container["env"]:
        path = variable["valueFrom"]["fieldRef"]["fieldPath"]
        assert re.fullmatch(r"status\.(podIP|hostIP)|metadata\.annotations\['[\w./]+'\]", path)


@pytest.mark.parametrize("name", CASES)
def test_what_holds_for_both_kinds(name: str) -> None:
    config, job = CASES[name]
    assert config["kind"] == "ConfigMap"
    assert all(isinstance(value, str) for value in config["data"].values())
    assert config["metadata"]["name"] == job["metadata"]["name"]
    assert config["metadata"]["namespace"] == job["metadata"]["namespace"]
    assert DNS_LABEL.fullmatch(job["metadata"]["name"])
    for key, value in labels(job):
        assert isinstance(value, str), key
        assert re.fullmatch(r"([A-Za-z0-9]([\w.-]*[A-Za-z0-9])?)?", value), key
        assert len(value) <= 63, key


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("ascend")])
def test_ascend_job_keeps_the_operator_s_rules(name: str) -> None:
    """The schema's fields; framework label; one Scheduler; container `ascend` with an image."""
    _, job = CASES[name]
    assert (job["apiVersion"], job["kind"]) == ("mindxdl.gitee.com/v1", "AscendJob")
    assert job["metadata"]["labels"]["framework"] == "mindspore"
    assert 0 <= int(job["metadata"]["labels"]["fault-retry-times"]) <= 100
    spec = job["spec"]
    assert spec.keys() == {"schedulerName", "runPolicy", "successPolicy", "replicaSpecs"}
    assert spec["successPolicy"] in ("", "AllWorkers")
    replicas = spec["replicaSpecs"]
    # Without a Scheduler the operator allows no more than one NPU, and sets no variables.
    assert set(replicas) <= {"Scheduler", "Worker"}
    assert replicas["Scheduler"]["replicas"] == 1
    for kind, one in replicas.items():
        assert one.keys() == {"replicas", "restartPolicy", "template"}
        assert 0 <= one["replicas"] <= 20000
        assert one["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        pod = one["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "ascend"
        assert container["image"]
        assert [port["name"] for port in container["ports"]] == ["ascendjob-port"]
        # All pods ask for as many, so that MS_WORKER_NUM is pods times MS_LOCAL_WORKER.
        assert container["resources"]["limits"] == {"huawei.com/Ascend910": 8}
        check_pod(pod, f"{job['metadata']['name']}-{kind.lower()}-{one['replicas'] - 1}")
    total = sum(one["replicas"] for one in replicas.values())
    assert spec["runPolicy"]["schedulingPolicy"] == {"minAvailable": total, "queue": "default"}


def test_volcano_job_keeps_volcano_s_rules() -> None:
    """The schema's fields and enumerations; an event or an exit code in each policy, not both."""
    _, job = CASES["volcano_job_2x16_a3.yaml"]
    assert (job["apiVersion"], job["kind"]) == ("batch.volcano.sh/v1alpha1", "Job")
    spec = job["spec"]
    known = {"schedulerName", "queue", "minAvailable", "maxRetry", "policies", "plugins", "tasks"}
    assert spec.keys() == known
    assert spec["maxRetry"] >= 0
    events = [policy["event"] for policy in spec["policies"] if "event" in policy]
    assert len(set(events)) == len(events)
    assert set(events) <= {"*", "PodFailed", "PodEvicted", "PodPending", "Unknown", "TaskFailed"}
    for policy in spec["policies"]:
        assert policy["action"] in ("AbortJob", "RestartJob", "TerminateJob", "CompleteJob")
        assert ("event" in policy) != ("exitCode" in policy)
        assert policy.get("exitCode") != 0
    assert spec["plugins"].keys() <= {"env", "svc", "ssh"}
    assert all(isinstance(argument, list) for argument in spec["plugins"].values())
    (task,) = spec["tasks"]
    assert task.keys() == {"name", "replicas", "template"}
    assert DNS_LABEL.fullmatch(task["name"])
    assert spec["minAvailable"] <= task["replicas"]
    pod = task["template"]["spec"]
    assert pod["restartPolicy"] in ("Always", "OnFailure", "Never")
    check_pod(pod, f"{job['metadata']['name']}-{task['name']}-{task['replicas'] - 1}")


# ---- what the pods run


def start(tmp_path: Path, runs: Path) -> list[str]:
    """What the pod's command comes to, with a stand-in that prints its arguments."""
    _, job = ascend_job(replace(JOB, runs=str(runs)))
    command = job["spec"]["replicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["command"]
    program = tmp_path / "lora-launch"
    program.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_a_pod_starts_and_a_replaced_pod_resumes(tmp_path: Path) -> None:
    runs = tmp_path / "the runs; $(touch broken)"
    options = ["--devices", "8", "--max-restarts", "3"]
    fresh = [*options, "--set", f"output={runs}", "/job/config.yaml"]
    assert start(tmp_path, runs) == fresh
    first, second = runs / "emoji-ink-1", runs / "emoji-ink-2"
    (first / "checkpoints").mkdir(parents=True)
    assert start(tmp_path, runs) == fresh
    (first / "checkpoints" / "step_00000100.safetensors").touch()
    (second / "checkpoints").mkdir(parents=True)
    (second / "checkpoints" / ".step_00000010.safetensors.part").touch()
    assert start(tmp_path, runs) == [*options, "--resume", str(first)]
    assert not (tmp_path / "broken").exists()


# ---- names


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("namespace", "Training"),
        ("namespace", "a" * 64),
        ("image", "example/lora:1 --privileged"),
        ("image", "$(id)"),
        ("secret", "../keys"),
        ("partition", "npu\n#SBATCH --uid=0"),
        ("partition", "--wrap"),
        ("claim", ""),
    ],
)
def test_refused_names(kind: str, text: str) -> None:
    with pytest.raises(ClusterError, match=f"--{kind} "):
        names.checked(kind, text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("image", "example/lora"),
        ("image", "host.example:5000/team/lora:1.0@sha256:" + "a" * 64),
        ("partition", "npu,npu_long"),
        ("secret", "registry.keys-2"),
    ],
)
def test_taken_names(kind: str, text: str) -> None:
    assert names.checked(kind, text) == text


def test_job_names() -> None:
    assert names.job_name("my.lora_2", "20260101-120000") == "my-lora-2-20260101-120000"
    long = names.job_name("a" * 64, "20260101-120000")
    assert len(f"{long}-scheduler-0") <= 63
    with pytest.raises(ClusterError, match="begins with a letter, found '8bit'"):
        names.job_name("8bit", "20260101-120000")


@pytest.mark.parametrize("text", ["loras", "loras:data", "loras:/", "loras:/a/../b", ":/data"])
def test_refused_volumes(text: str) -> None:
    with pytest.raises(ClusterError):
        names.volume(text)


if __name__ == "__main__":
    for name, manifests in CASES.items():
        (GOLDEN / name).write_text(dump(manifests), encoding="utf-8")
