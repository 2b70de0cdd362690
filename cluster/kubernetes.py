"""Manifests of a run on several machines, for MindCluster's ascend-operator and for Volcano.

Sources: the CustomResourceDefinitions ascendjobs.mindxdl.gitee.com (v1) and
jobs.batch.volcano.sh (v1alpha1) and the checks of the two projects' controllers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

NPU = "huawei.com/Ascend910"
PORT = 2222
"""The operator's default for the scheduler; it finds it by the name "ascendjob-port"."""

CONFIG_FOLDER = "/job"

_START_OR_RESUME = """\
runs=$1 config=$2
shift 2
newest=$(ls -1t "$runs"/*/checkpoints/step_*.safetensors 2>/dev/null | head -n 1)
if [ -n "$newest" ]; then
  exec "$@" --resume "${newest%/checkpoints/*}"
fi
exec "$@" --set "output=$runs" "$config"
"""
"""What a pod runs: a pod that was replaced goes on where the job's last checkpoint is. Values reach
this bash program as arguments, never as text."""


@dataclass(frozen=True)
class Product:
    """What MindCluster calls a kind of server."""

    ring_controller: str
    accelerator_type: str
    most_devices: int


PRODUCTS = {
    "910A": Product("ascend-910", "module", 8),
    "A2": Product("ascend-910b", "module-910b-8", 8),
    "A3": Product("ascend-910b", "module-a3-16", 16),
}


@dataclass(frozen=True)
class KubernetesJob:
    """One submission, its names checked."""

    name: str
    namespace: str
    image: str
    nodes: int
    devices_per_node: int
    product: Product
    config: str
    """The run config, YAML."""
    runs: str
    """Folder of this job's runs, in the container, on a volume that all pods share."""
    volumes: Sequence[tuple[str, str]] = ()
    """Claims and where they appear in the container."""
    secrets: Sequence[str] = ()
    """Secrets whose keys become environment variables, such as those of an S3 registry."""


def ascend_job(job: KubernetesJob) -> list[dict[str, Any]]:
    """The ConfigMap and the AscendJob.

    Its Scheduler is node 0 and has NPUs like the Workers, so that one command suits every pod.
    """
    replicas = {"Scheduler": 1, "Worker": job.nodes - 1}
    label = {"ring-controller.atlas": job.product.ring_controller}
    pod = _pod(job, "ascend", "job-name")
    pod["containers"][0]["ports"] = [{"containerPort": PORT, "name": "ascendjob-port"}]
    return [
        _config_map(job),
        {
            "apiVersion": "mindxdl.gitee.com/v1",
            "kind": "AscendJob",
            "metadata": {
                "name": job.name,
                "namespace": job.namespace,
                "labels": {
                    "framework": "mindspore",
                    **label,
                    "fault-scheduling": "grace",
                    "fault-retry-times": "3",
                },
            },
            "spec": {
                "schedulerName": "volcano",
                "runPolicy": {
                    "backoffLimit": 3,
                    "schedulingPolicy": {"minAvailable": job.nodes, "queue": "default"},
                },
                "successPolicy": "AllWorkers",
                "replicaSpecs": {
                    kind: {
                        "replicas": count,
                        "restartPolicy": "Never",
                        "template": {"metadata": {"labels": label}, "spec": pod},
                    }
                    for kind, count in replicas.items()
                    if count
                },
            },
        },
    ]


def volcano_job(job: KubernetesJob) -> list[dict[str, Any]]:
    """The ConfigMap and the Volcano Job, for a cluster without ascend-operator."""
    label = {"ring-controller.atlas": job.product.ring_controller}
    pod = _pod(job, "lora", "volcano.sh/job-name")
    pod["restartPolicy"] = "Never"
    return [
        _config_map(job),
        {
            "apiVersion": "batch.volcano.sh/v1alpha1",
            "kind": "Job",
            "metadata": {
                "name": job.name,
                "namespace": job.namespace,
                "labels": {**label, "fault-scheduling": "grace"},
            },
            "spec": {
                "schedulerName": "volcano",
                "queue": "default",
                "minAvailable": job.nodes,
                "maxRetry": 3,
                # The first that fits counts: bad input, exit code 2, stays bad.
                "policies": [
                    {"exitCode": 2, "action": "AbortJob"},
                    {"event": "PodEvicted", "action": "RestartJob"},
                    {"event": "PodFailed", "action": "RestartJob"},
                ],
                "plugins": {"env": [], "svc": ["--publish-not-ready-addresses"]},
                "tasks": [
                    {
                        "name": "node",
                        "replicas": job.nodes,
                        "template": {"metadata": {"labels": label}, "spec": pod},
                    }
                ],
            },
        },
    ]


def dump(manifests: Sequence[Mapping[str, Any]]) -> str:
    """The manifests as one YAML stream."""
    return yaml.dump_all(manifests, Dumper=_WithoutAliases, sort_keys=False, explicit_start=True)


def _config_map(job: KubernetesJob) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": job.name, "namespace": job.namespace},
        "data": {"config.yaml": job.config},
    }


def _pod(job: KubernetesJob, container: str, job_label: str) -> dict[str, Any]:
    """The same for every machine; no two on one."""
    mounts = {
        "config": (CONFIG_FOLDER, {"configMap": {"name": job.name}}),
        "driver": ("/usr/local/Ascend/driver", {"hostPath": {"path": "/usr/local/Ascend/driver"}}),
        "shm": ("/dev/shm", {"emptyDir": {"medium": "Memory"}}),
    }
    for number, (claim, path) in enumerate(job.volumes):
        mounts[f"volume-{number}"] = (path, {"persistentVolumeClaim": {"claimName": claim}})
    # Starting the processes again takes seconds, a pod minutes.
    launch = ["lora-launch", "--devices", str(job.devices_per_node), "--max-restarts", "3"]
    config = f"{CONFIG_FOLDER}/config.yaml"
    npus = {NPU: job.devices_per_node}
    described: dict[str, Any] = {
        "name": container,
        "image": job.image,
        "command": ["/bin/bash", "-c", _START_OR_RESUME, "lora-launch", job.runs, config, *launch],
        "env": [
            _field("ASCEND_VISIBLE_DEVICES", f"metadata.annotations['{NPU}']"),
            _field("POD_IP", "status.podIP"),
            _field("XDL_IP", "status.hostIP"),
        ],
        "resources": {"requests": npus, "limits": npus},
        "volumeMounts": [{"name": name, "mountPath": path} for name, (path, _) in mounts.items()],
    }
    if job.secrets:
        described["envFrom"] = [{"secretRef": {"name": name}} for name in job.secrets]
    same_job = {"key": job_label, "operator": "In", "values": [job.name]}
    return {
        "terminationGracePeriodSeconds": 360,
        "automountServiceAccountToken": False,
        "nodeSelector": {"accelerator-type": job.product.accelerator_type},
        "affinity": {
            "podAntiAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "labelSelector": {"matchExpressions": [same_job]},
                        "topologyKey": "kubernetes.io/hostname",
                    }
                ]
            }
        },
        "containers": [described],
        "volumes": [{"name": name, **source} for name, (_, source) in mounts.items()],
    }


def _field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


class _WithoutAliases(yaml.SafeDumper):
    """Every value in full; texts of several lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_WithoutAliases.add_representer(str, _text)
