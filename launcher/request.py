"""What the user asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.nodes import Nodes


@dataclass(frozen=True)
class Scraping:
    """Where metrics are served, and to whom."""

    port: int | None = None
    """None serves none; 0 takes a free one."""
    host: str = "127.0.0.1"
    token_file: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    required: bool = False
    """Without them there is no training."""
    push_gateway: str | None = None
    """URL of a Pushgateway that they are sent to."""


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
    estimate: bool = False
    """A dry run says what the run would take on Ascend."""
    scraping: Scraping = field(default_factory=Scraping)
    """Who is told how the run goes."""
