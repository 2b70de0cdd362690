"""What the report of a run is made of: its facts, and pieces of HTML, which escape what they are
given."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from typing import Any

from launcher.curves import Chart, draw, figure
from launcher.status import Attempt, Course, State, text_of

DIGEST = re.compile(r"\b[0-9a-f]{40,}\b")


@dataclass(frozen=True)
class Picture:
    """A file that browsers show."""

    step: int
    kind: str
    """Its media type."""
    data: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Facts:
    """All that a report says."""

    folder: str
    """The run's, as the user wrote it."""
    attempts: Sequence[Attempt]
    course: Course
    state: State
    config_text: str
    config: Mapping[str, Any]
    command: str
    """That started the newest attempt's processes."""
    kept: frozenset[int]
    """Steps whose checkpoints are still there."""
    pictures: Sequence[Picture]
    prompts: Sequence[str]
    """Of each picture's parts, in rows of four."""
    sheet: Picture | None
    """Pictures of the evaluation."""
    remarks: Sequence[str]
    """What could not be read, or was left out."""
    made: float
    """When, in Unix seconds."""

    @property
    def last(self) -> Attempt:
        """The newest attempt, which holds the result if there is one."""
        return self.attempts[-1]

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What was published about the LoRA."""
        return mapping_of(self.last.push, "metadata")

    @property
    def name(self) -> str:
        """The run's."""
        return text_of(self.last.plan, "name", text_of(self.config, "name", "run"))

    @property
    def published_step(self) -> int | None:
        """The step whose weights are the result."""
        step = self.last.result.get("published_step")
        return step if isinstance(step, int) else None

    @property
    def steps(self) -> int | None:
        """How many were planned."""
        events = self.course.steps
        planned = self.last.plan.get("steps") or (events[-1].get("steps") if events else None)
        return planned if isinstance(planned, int) else None


def percent(share: float) -> str:
    return f"{share:+.1%}".replace("-", "−").replace("%", " %")


def cell(value: float) -> str:
    return figure(value) if math.isfinite(value) else "–"


def section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n"


def figure_of(
    chart: Chart, legend: Sequence[tuple[str, str]], remarks: Sequence[str], card: bool = False
) -> str:
    svg, remark = draw(chart)
    if not svg:
        return ""
    keys = "".join(f'<li><i class="key {kind}"></i>{escape(text)}</li>' for kind, text in legend)
    keys = f'<ul class="legend">{keys}</ul>' if keys else ""
    said = " ".join(filter(None, [*remarks, remark]))
    title = f"<figcaption>{escape(chart.title)}</figcaption>" if card else ""
    return (
        f'<figure{" class=card" if card else ""}>{title}{keys}<div class="scroll">{svg}</div>'
        f'<p class="readout" aria-live="polite"></p>'
        + (f'<p class="hint">{escape(said)}</p>' if said else "")
        + "</figure>"
    )


def pairs_of(rows: Mapping[str, str]) -> str:
    found = (
        f"<div><dt>{escape(key)}</dt><dd{' class=digest' if DIGEST.search(value) else ''}>"
        f"{escape(value)}</dd></div>"
        for key, value in rows.items()
    )
    return f'<dl class="facts">{"".join(found)}</dl>'


def table_of(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    wide_last: bool = False,
    text_columns: int = 0,
) -> str:
    """Numbers to the right; the last column, or the first few, may be words."""

    def cells(row: Sequence[str], tag: str) -> str:
        found = []
        for place, cell in enumerate(row):
            words = place < text_columns or (wide_last and place == len(row) - 1)
            scope = ' scope="col"' if tag == "th" else ""
            found.append(f"<{tag}{scope}{' class=words' if words else ''}>{escape(cell)}</{tag}>")
        return f"<tr>{''.join(found)}</tr>"

    body = "".join(cells(row, "td") for row in rows)
    return (
        f'<div class="scroll"><table><thead>{cells(head, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def data_url(picture: Picture) -> str:
    return f"data:{picture.kind};base64,{base64.b64encode(picture.data).decode()}"


def when(seconds: float) -> str:
    """`27 Nov 2026, 09:37 UTC`."""
    try:
        return f"{datetime.fromtimestamp(seconds, timezone.utc):%d %b %Y, %H:%M} UTC".lstrip("0")
    except (ValueError, OverflowError, OSError):
        return "–"


def count_of(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def mapping_of(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def list_of(values: Mapping[str, Any], key: str, otherwise: Mapping[str, Any]) -> list[Any]:
    found = values.get(key, otherwise.get(key))
    return found if isinstance(found, list) else []


def first_of(*values: object) -> str:
    return next((str(value) for value in values if value), "")


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Nested facts as rows: `real, pictures`."""
    rows: dict[str, str] = {}
    for key, value in values.items():
        name = f"{above}, {key}" if above else str(key)
        name = name.replace("_", " ")
        if isinstance(value, dict):
            rows |= flat(value, "" if not above and len(values) == 1 else name)
        elif isinstance(value, list):
            rows[name] = ", ".join(map(str, value))
        else:
            rows[name] = value if isinstance(value, str) else json.dumps(value)
    return rows
