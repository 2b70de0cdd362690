"""What a run tells a scraper: the series of all ranks on this node, from one endpoint.

Rank 0's events give the course of the run, prometheus-client's files the times of each rank, and
the signs of life their ages. All of it is put together when somebody asks, in this process; the
ranks do nothing for it but what they do anyway.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import struct
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from cluster.errors import ClusterError
from cluster.npu_smi import Npu, npus
from launcher.job import METRICS_FOLDER
from launcher.progress import Progress
from launcher.watchdog import ENDED, read_signs
from trainer.plan import Plan

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SMOOTHING = 0.98
_LOOK_SECONDS = 15.0
PHASES = (
    "starting",
    "caching",
    "compiling",
    "training",
    "validating",
    "drawing",
    "saving",
    "publishing",
    "ended",
)


class Devices:
    """The NPUs that a run uses, looked at by npu-smi now and then: it takes a second or more."""

    def __init__(self, device_ids: Collection[int]):
        self._device_ids = frozenset(device_ids)
        self._found: tuple[Npu, ...] = ()
        self._looked = -math.inf
        self._lock = threading.Lock()

    def seen(self) -> tuple[Npu, ...]:
        """As they were last seen; one caller at a time looks anew, the others do not wait."""
        if self._device_ids and self._lock.acquire(blocking=False):
            try:
                if time.monotonic() - self._looked >= _LOOK_SECONDS:
                    with contextlib.suppress(ClusterError):
                        found = npus() or ()
                        self._found = tuple(n for n in found if n.device_id in self._device_ids)
                    self._looked = time.monotonic()
            finally:
                self._lock.release()
        return self._found


@dataclass
class Course:
    """How far a run has come, over all its attempts."""

    run: str
    plan: Plan
    attempt: Path
    rank_ids: range
    devices: Devices = field(default_factory=lambda: Devices(()))
    started: float = field(default_factory=time.monotonic)
    last: dict[str, float] = field(default_factory=dict)
    """Of the newest step: its values by name."""
    smoothed: float | None = None
    validation: float | None = None
    best: float | None = None
    skipped: int = 0
    steps_seen: int = 0
    restarts: int = 0
    compile_seconds: float = 0.0
    checkpoint: tuple[int, float] | None = None
    """Step and time."""
    cached: dict[str, tuple[int, int]] = field(default_factory=dict)
    phase: str = "starting"
    agree: bool = True
    pushes: int = 0
    pushed_bytes: int = 0

    def take(self, event: Mapping[str, Any]) -> None:
        """Note what an event says."""
        kind = event["event"]
        if kind == "step":
            self.steps_seen += 1
            numbers = {k: v for k, v in event.items() if isinstance(v, (int, float))}
            self.last.update({key: float(value) for key, value in numbers.items()})
            self.skipped += bool(event.get("skipped"))
            loss = float(event["loss"])
            if math.isfinite(loss):
                before = loss if self.smoothed is None else self.smoothed
                self.smoothed = _SMOOTHING * before + (1 - _SMOOTHING) * loss
        elif kind == "phase":
            named = "caching" if event["phase"].startswith("encoding") else event["phase"]
            self.phase = named if named in PHASES else "starting"
        elif kind == "validation":
            self.validation = float(event["loss"])
            if math.isfinite(self.validation):
                self.best = min(self.validation, self.best or math.inf)
        elif kind == "compiled":
            self.compile_seconds += float(event["seconds"])
        elif kind == "checkpoint":
            self.checkpoint = int(event["step"]), float(event["time"])
        elif kind == "cache":
            self.cached[event["kind"]] = int(event["done"]), int(event["total"])
        elif kind == "failure" and "the weights of" in str(event.get("text")):
            self.agree = False


class Watched:
    """Progress that is shown, and noted for whoever scrapes."""

    def __init__(self, shown: Progress, course: Course):
        self.shown, self.course = shown, course

    def show(self, event: Mapping[str, Any]) -> None:
        self.course.take(event)
        self.shown.show(event)

    def note(self, text: str) -> None:
        self.shown.note(text)


class RunCollector(Collector):
    """The series of a course, made when they are asked for."""

    def __init__(self, course: Course):
        self.course = course
        self.devices = course.devices

    def collect(self) -> Iterable[Metric]:
        """Gauges and counters of the run, where rank 0 is here; the node's ranks, devices, disk."""
        if 0 in self.course.rank_ids:
            yield from self._of_course()
        yield from self._of_ranks()
        yield from self._of_files()
        yield from self._of_node()

    def _of_course(self) -> Iterator[Metric]:
        c, run = self.course, (self.course.run,)
        last = c.last
        step = last.get("step", float(c.plan.start_step))
        images = last.get("images", float(c.plan.start_step * c.plan.global_batch))

        def gauge(name: str, text: str, value: float | None) -> Iterator[Metric]:
            if value is not None:
                family = GaugeMetricFamily(f"lora_{name}", text, labels=("run",))
                family.add_metric(run, value)
                yield family

        def counter(name: str, text: str, value: float) -> Iterator[Metric]:
            family = CounterMetricFamily(f"lora_{name}", text, labels=("run",))
            family.add_metric(run, value)
            yield family

        yield from counter("steps", "Optimizer steps done, over all attempts.", step)
        text = "When the last step was done, in Unix time."
        yield from gauge("last_step_timestamp_seconds", text, last.get("time"))
        yield from counter("images", "Samples seen, over all attempts.", images)
        yield from gauge("planned_steps", "Optimizer steps that the run will have.", c.plan.steps)
        epoch = images / c.plan.epoch_samples if c.plan.epoch_samples else None
        yield from gauge("epochs", "How often each image was seen.", epoch)
        yield from gauge("loss", "Training loss of the last step.", last.get("loss"))
        yield from gauge(
            "smoothed_loss", "Training loss, averaged over about 50 steps.", c.smoothed
        )
        yield from gauge("validation_loss", "Loss on held-out images, last measured.", c.validation)
        yield from gauge("best_validation_loss", "The lowest validation loss.", c.best)
        rate = last.get("learning_rate")
        yield from gauge("learning_rate", "Learning rate of the last step.", rate)
        norm = last.get("gradient_norm")
        yield from gauge("gradient_norm", "Length of the gradient before clipping.", norm)
        yield from gauge(
            "loss_scale", "Factor of the loss in half precision.", last.get("loss_scale")
        )
        text = "Steps that changed nothing because the gradient was not finite."
        yield from counter("skipped_steps", text, c.skipped)
        speed = last.get("images_per_second")
        yield from gauge("images_per_second", "Speed of training, all devices together.", speed)
        synced = c.steps_seen * (c.plan.synced_bytes or 0) if c.plan.devices > 1 else 0
        yield from counter(
            "allreduced_bytes", "Bytes that one device put into all-reduces.", synced
        )
        yield from counter("compile_seconds", "Time that compiling has taken.", c.compile_seconds)
        yield from counter("restarts", "Attempts after the first.", c.restarts)
        if c.checkpoint is not None:
            at, when = c.checkpoint
            yield from gauge("checkpoint_step", "Step of the last checkpoint.", at)
            text = "When the last checkpoint was written, in Unix time."
            yield from gauge("checkpoint_timestamp_seconds", text, when)
        text = "1 if all ranks held the same weights when last compared."
        yield from gauge("ranks_agree", text, c.agree)
        yield from counter("registry_pushes", "Versions published.", c.pushes)
        yield from counter("registry_pushed_bytes", "Bytes of what was published.", c.pushed_bytes)
        cache = GaugeMetricFamily(
            "lora_cache_filled_ratio", "Share of the cache that is filled.", labels=("run", "kind")
        )
        for kind, (done, total) in c.cached.items():
            cache.add_metric((c.run, kind), done / total if total else 1.0)
        yield cache
        phase = GaugeMetricFamily(
            "lora_phase", "1 for what the run is at.", labels=("run", "phase")
        )
        for name in PHASES:
            phase.add_metric((c.run, name), float(name == c.phase))
        yield phase

    def _of_ranks(self) -> Iterator[Metric]:
        c = self.course
        signs = read_signs(c.attempt / "beats", c.rank_ids, c.started, time.monotonic())
        age = GaugeMetricFamily(
            "lora_rank_age_seconds", "Since a rank's last sign of life.", labels=("run", "rank_id")
        )
        for rank_id, sign in signs.items():
            if sign.phase != ENDED:
                age.add_metric((c.run, str(rank_id)), sign.age)
        yield age
        own = GaugeMetricFamily(
            "lora_rank_own_seconds",
            "A rank's own work for its last measured step, without waiting for others.",
            labels=("run", "rank_id"),
        )
        measured = {rank: sign.own for rank, sign in signs.items() if sign.own is not None}
        for rank_id, seconds in measured.items():
            own.add_metric((c.run, str(rank_id)), seconds)
        yield own
        if measured:
            skew = GaugeMetricFamily(
                "lora_rank_skew_seconds",
                "Own time of the slowest rank of this node for a step, minus that of the fastest.",
                labels=("run",),
            )
            skew.add_metric((c.run,), max(measured.values()) - min(measured.values()))
            yield skew

    def _of_files(self) -> Iterator[Metric]:
        whole = []
        for path in sorted((self.course.attempt / METRICS_FOLDER).glob("*.db")):
            # A rank that was killed as it made its file has left one that cannot be read.
            with contextlib.suppress(RuntimeError, ValueError, KeyError, struct.error, OSError):
                MultiProcessCollector.merge([str(path)])  # type: ignore[no-untyped-call]
                whole.append(str(path))
        yield from MultiProcessCollector.merge(whole)  # type: ignore[no-untyped-call]

    def _of_node(self) -> Iterator[Metric]:
        c = self.course
        disk = shutil.disk_usage(c.attempt)
        for name, text, value in (
            ("free", "Free on the disk of the run's folder.", disk.free),
            ("size", "Size of the disk of the run's folder.", disk.total),
        ):
            family = GaugeMetricFamily(f"lora_disk_{name}_bytes", text, labels=("run",))
            family.add_metric((c.run,), value)
            yield family
        for part in ("used", "size"):
            text = "Memory of an NPU in use, by whatever process."
            family = GaugeMetricFamily(
                f"lora_device_memory_{part}_bytes",
                text if part == "used" else "Memory that an NPU has.",
                labels=("run", "device_id"),
            )
            for npu in self.devices.seen():
                held = npu.used_bytes if part == "used" else npu.memory_bytes
                if held is not None:
                    family.add_metric((c.run, str(npu.device_id)), held)
            yield family
        build = GaugeMetricFamily(
            "lora_build_info", "What runs.", labels=("version", "mindspore", "device_target")
        )
        build.add_metric((version("ascend-lora"), version("mindspore"), c.plan.device_target), 1)
        yield build


def text_of(course: Course) -> bytes:
    """All series in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(RunCollector(course))
    return generate_latest(registry)
