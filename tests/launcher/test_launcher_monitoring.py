"""The scrape config, alerts and dashboard speak of series that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from launcher.job import prepare, write
from launcher.metrics import Course, text_of
from launcher.request import Request

MONITORING = Path(__file__).parents[2] / "configs" / "monitoring"
RANKS = {"lora_step_seconds", "lora_memory_bytes"}
"""What the ranks' own files have; tests of the endpoint read them."""


def panels() -> list[dict[str, Any]]:
    return list(json.loads((MONITORING / "grafana-dashboard.json").read_text())["panels"])


def expressions() -> Iterator[str]:
    for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    for panel in panels():
        yield from (target["expr"] for target in panel["targets"])


@pytest.fixture
def served(config: Path) -> set[str]:
    """Names of series, with those of a step, a validation and a checkpoint."""
    job = prepare(Request(config, device_target="CPU"), datetime(2025, 1, 2))
    write(job)
    course = Course("tiny", job.plan, job.attempt, range(2))
    numbers = ("loss", "gradient_norm", "learning_rate", "loss_scale", "images_per_second", "time")
    step = dict.fromkeys(numbers, 0.5)
    course.take({"event": "step", "step": 1, "images": 4, **step})
    course.take({"event": "validation", "step": 1, "loss": 0.5})
    course.take({"event": "checkpoint", "step": 1, "time": 1.0})
    return {family.name for family in text_string_to_metric_families(text_of(course).decode())}


def test_every_series_that_is_asked_for_is_served(served: set[str]) -> None:
    for expression in expressions():
        for name in re.findall(r"\blora_\w+", expression):
            family = re.sub(r"_(total|sum|count|bucket)$", "", name)
            assert family in served | RANKS, expression


def test_the_dashboard_has_its_panels_side_by_side() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_every_alert_says_what_to_do() -> None:
    for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert {"summary", "remedy"} <= rule["annotations"].keys(), rule["alert"]
            assert rule["labels"]["severity"] in ("info", "warning", "critical")
