"""The report's part on scores: what the base and the LoRA came to, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from launcher.curves import Bar, draw_bars, figure
from launcher.report_parts import Facts, data_url, flat, mapping_of, pairs_of, section, table_of
from launcher.status import number


def scores_section(facts: Facts) -> str:
    given = mapping_of(facts.last.scores, "scores")
    if not given:
        waits = facts.last.to_do == "evaluated"
        text = "The scores are still to come." if waits else "This run was not evaluated."
        return section("Scores", f"<p>{text}</p>")
    roots = [key for key in given if _root(key, given) == key]
    table = facts.last.scores.get("table")
    words = table[1:] if isinstance(table, list) and len(table) == len(roots) + 1 else []
    cards = []
    for place, key in enumerate(roots):
        row = [str(cell) for cell in words[place]] if words else []
        title = row[0] if row else key.replace("_", " ")
        note = row[4] if len(row) > 4 else ""
        factor = 1000.0 if "× 10³" in title else 1.0
        bars = [
            bar
            for bar in (
                _bar("LoRA", "lora", given[key], factor),
                _bar("base", "base", given.get(f"{key}_base"), factor),
            )
            if bar is not None
        ]
        lines = "".join(f"<li>{bar.name}: <b>{escape(bar.text)}</b></li>" for bar in bars)
        difference = _bar("difference", "", given.get(f"{key}_difference"), factor)
        if difference is not None:
            lines += (
                f"<li>difference: <b>{escape(difference.text)}</b>{_verdict(difference, note)}</li>"
            )
        svg = draw_bars(f"score-{place}", title, bars)
        notes = f'<p class="hint">{escape(note)}</p>' if note else ""
        cards.append(
            f'<figure class="card"><figcaption>{escape(title)}</figcaption>{svg}'
            f"<ul>{lines}</ul>{notes}</figure>"
        )
    parts = [
        '<p class="hint">Each value with the interval in which the true one lies with 95 %; a '
        "difference whose interval holds 0 may be chance.</p>",
        f'<div class="pair">{"".join(cards)}</div>',
    ]
    cautions = facts.last.scores.get("cautions")
    if isinstance(cautions, list) and cautions:
        texts = "".join(f"<li>{escape(str(text))}</li>" for text in cautions)
        parts.append(f'<div class="caution"><h3>Keep in mind</h3><ul>{texts}</ul></div>')
    parts.append(_nearest(facts.last.scores.get("nearest")))
    if facts.sheet is not None:
        parts.append(
            "<details><summary>The pictures that were scored</summary>"
            f'<img class="sheet" src="{data_url(facts.sheet)}" '
            'alt="The pictures of the evaluation" '
            f'width="{facts.sheet.width}" height="{facts.sheet.height}"></details>'
        )
    if spec := flat(mapping_of(facts.last.scores, "evaluation")):
        parts.append(
            f"<details><summary>How they were measured</summary>{pairs_of(spec)}</details>"
        )
    return section("Scores", "".join(parts))


def _nearest(found: object) -> str:
    rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    if not rows:
        return ""
    cells = [
        (
            str(row.get("picture", "?")),
            str(row.get("training_image", "?")),
            figure(number(row, "distance")),
        )
        for row in rows
    ]
    table = table_of(("picture", "training image", "distance"), cells, text_columns=2)
    return f"<details><summary>Nearest to a training image</summary>{table}</details>"


def _root(key: str, given: Mapping[str, Any]) -> str:
    """The score that a value belongs to."""
    for suffix in ("_base", "_difference"):
        if key.endswith(suffix) and key.removesuffix(suffix) in given:
            return key.removesuffix(suffix)
    return key


def _bar(name: str, kind: str, value: object, factor: float) -> Bar | None:
    values = value if isinstance(value, dict) else {"value": value}
    found = number(values, "value")
    if not math.isfinite(found):
        return None
    ends = [number(values, key) * factor for key in ("lower", "upper")]
    lower, upper = ends if all(map(math.isfinite, ends)) else (None, None)
    return Bar(name, kind, found * factor, lower, upper)


def _verdict(difference: Bar, note: str) -> str:
    if difference.lower is None or difference.upper is None:
        return ""
    if difference.lower <= 0 <= difference.upper:
        return " – may be chance"
    lower = difference.value < 0
    if note.startswith(("lower is better", "higher is better")):
        better = lower == note.startswith("lower")
        return " – better than the base" if better else " – worse than the base"
    return " – lower than the base" if lower else " – higher than the base"
