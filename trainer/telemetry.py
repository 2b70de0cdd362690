"""What a rank measures of its own work, kept where the launcher of its node reads it.

prometheus-client keeps values in files of its own if PROMETHEUS_MULTIPROC_DIR names a folder, as
the launcher lets it; a reader adds those of all ranks up. Nothing here waits for a reader.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from prometheus_client import CollectorRegistry, Gauge, Histogram

PARTS = ("step", "data", "own", "others", "checkpoint")
"""Of time: a whole step; waiting for data; the rank's own work in it; waiting for the other ranks
and the all-reduce, where that was measured; writing a checkpoint."""
_BUCKETS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75),
    *(1, 1.5, 2, 3, 5, 7.5, 10, 20, 30, 60, 120, 300),
)


class Telemetry:
    """The series of one rank."""

    def __init__(self, run: str, rank_id: int):
        registry = CollectorRegistry()
        seconds = Histogram(
            "lora_step_seconds",
            "Time of a training step, by part.",
            ("run", "rank_id", "part"),
            buckets=_BUCKETS,
            registry=registry,
        )
        self._seconds = {part: seconds.labels(run, str(rank_id), part) for part in PARTS}
        self._memory = Gauge(
            "lora_memory_bytes",
            "Resident memory of a rank at its highest.",
            ("run", "rank_id"),
            multiprocess_mode="max",
            registry=registry,
        ).labels(run, str(rank_id))

    def took(self, part: str, seconds: float) -> None:
        """A part of a step has taken so long."""
        self._seconds[part].observe(seconds)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """What is done in here is that part."""
        begun = monotonic()
        yield
        self.took(part, monotonic() - begun)

    def look(self) -> None:
        """Note what memory the process has needed."""
        self._memory.set(peak_memory())


def peak_memory() -> int:
    """Bytes of resident memory that this process had at its highest."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
