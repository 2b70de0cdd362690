"""What the user asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.nodes import Nodes


@dataclass(frozen=True)
class Request:
    """The options of `lora-launch`."""

    config: Path | None
    """None if a run is resumed as it was."""
    overrides: Sequence[str] = ()
    devices: str | None = None
    device_target: str | None = None
    master_port: int | None = None
    resume: Path | None = None
    """The folder of the run to go on with."""
    nodes: Nodes = field(default_factory=Nodes)
    """Which machine of how many this is."""
    max_restarts: int = 0
    product: str | None = None
    """One of cluster.products.PRODUCTS; None is what the machine is found to be."""
    rank_table: Path | None = None
    """A table that somebody else has written."""
    accept_changes: bool = False
    dry_run: bool = False
    """Nothing will be started: weights and images need not be at hand."""
