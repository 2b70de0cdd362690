"""The report's parts on how a run came to be: attempts, lineage, machine, config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from launcher.report_parts import (
    Facts,
    count_of,
    first_of,
    list_of,
    mapping_of,
    pairs_of,
    section,
    table_of,
    when,
)
from launcher.status import Attempt, number, text_of
from registry.words import human_size, human_time

_SHOWN_CHECKPOINTS = 8


def history_section(facts: Facts) -> str:
    rows = []
    for attempt in facts.attempts:
        times = [number(event, "time") for event in attempt.events]
        times = [value for value in times if math.isfinite(value)]
        steps = [number(e, "step") for e in attempt.events if e["event"] == "step"]
        steps = [value for value in steps if math.isfinite(value)]
        span = f"{attempt.start_step + 1:,} – {int(steps[-1]):,}" if steps else "none"
        rows.append(
            (
                str(attempt.number),
                when(times[0]) if times else "–",
                human_time(times[-1] - times[0]) if times else "–",
                span,
                _ended(attempt, facts),
            )
        )
    head = ("attempt", "began", "lasted", "steps", "how it ended")
    parts = [table_of(head, rows, wide_last=True)]
    remarks = []
    for attempt_number, event in facts.course.remarks:
        at = f"step {event['step']:,}, " if isinstance(event.get("step"), int) else ""
        word = {"failure": "failure", "straggler": "slow rank"}.get(event["event"], "warning")
        trace = text_of(event, "traceback")
        more = (
            f"<details><summary>traceback</summary><pre>{escape(trace)}</pre></details>"
            if trace
            else ""
        )
        remarks.append(
            f'<li class="{event["event"]}"><b>{word}</b> <small>attempt {attempt_number}, {at}'
            f"{when(number(event, 'time'))}</small><br>{escape(text_of(event, 'text', '?'))}"
            f"{more}</li>"
        )
    if remarks:
        parts.append(f'<h3>Warnings and failures</h3><ul class="remarks">{"".join(remarks)}</ul>')
    else:
        parts.append("<p>No warning and no failure.</p>")
    skipped = facts.last.result.get("skipped_steps")
    if skipped:
        parts.append(
            f"<p>{count_of(skipped)} steps changed nothing: their gradient was not finite.</p>"
        )
    unreadable = sum(attempt.unreadable for attempt in facts.attempts)
    if unreadable:
        parts.append(f"<p>{unreadable:,} lines of events.jsonl could not be read.</p>")
    saved = facts.course.checkpoints
    parts.append("<h3>Checkpoints</h3>")
    if saved:
        cells = [
            (
                count_of(event["step"]),
                human_size(int(number(event, "bytes"))) if number(event, "bytes") >= 0 else "–",
                f"{number(event, 'seconds'):.2g} s" if number(event, "seconds") >= 0 else "–",
                when(number(event, "time")),
                "kept" if event["step"] in facts.kept else "replaced by newer ones",
            )
            for event in saved[-_SHOWN_CHECKPOINTS:]
        ]
        if len(saved) > len(cells):
            parts.append(f"<p>{len(saved):,} were written; the last {len(cells)}:</p>")
        parts.append(table_of(("step", "size", "took", "written", "now"), cells, wide_last=True))
    else:
        parts.append("<p>None was written.</p>")
    return section("What happened", "".join(parts))


def _ended(attempt: Attempt, facts: Facts) -> str:
    if attempt.result:
        return "all steps done"
    if attempt.stopped:
        return f"asked to stop; saved after step {attempt.stopped.get('step', '?')}"
    if attempt.failure:
        return text_of(attempt.failure, "text", "failed")
    if attempt is facts.last and facts.state.at_work:
        return "at work"
    return "ended without a word"


def lineage_section(facts: Facts) -> str:
    plan, result, metadata = facts.last.plan, facts.last.result, facts.metadata
    base, data = mapping_of(metadata, "base"), mapping_of(metadata, "data")
    code, parent = mapping_of(metadata, "code"), mapping_of(metadata, "parent")
    seed = metadata.get("seed", facts.config.get("seed"))
    published = facts.last.published
    reference = text_of(published, "reference")
    rows = {
        "Published as": f"{reference}, in {text_of(published, 'registry')}" if reference else "",
        "Base": text_of(base, "weights", text_of(mapping_of(facts.config, "base"), "weights")),
        "Base digest": first_of(
            base.get("digest"), result.get("base_digest"), plan.get("base_digest")
        ),
        "Training data": _folders(facts.config),
        "Data digest": first_of(
            data.get("digest"), result.get("data_digest"), plan.get("data_digest")
        ),
        "Parent": text_of(
            parent, "reference", text_of(mapping_of(facts.config, "lora"), "start", "none")
        ),
        "Code": _code(code),
        "Seed": "" if seed is None else str(seed),
        "Trigger words": ", ".join(map(str, list_of(metadata, "trigger_words", facts.config))),
        "Licence": first_of(metadata.get("licence"), facts.config.get("licence")),
        "Weights digest": _weights(result),
    }
    return section("Lineage", pairs_of({key: value for key, value in rows.items() if value}))


def _folders(config: Mapping[str, Any]) -> str:
    train = mapping_of(config, "data").get("train")
    if isinstance(train, str):
        return train
    sets = train if isinstance(train, list) else []
    return ", ".join(str(one.get("folder")) if isinstance(one, dict) else str(one) for one in sets)


def _code(code: Mapping[str, Any]) -> str:
    if not code.get("commit"):
        return ""
    return f"commit {code['commit']}" + ("" if code.get("clean") else ", with changes on top")


def _weights(result: Mapping[str, Any]) -> str:
    digests = result.get("rank_digests")
    if not isinstance(digests, list) or not digests:
        return ""
    if len(set(map(str, digests))) > 1:
        return "differ between the ranks: " + ", ".join(map(str, digests))
    return f"{digests[0]}" + (f", equal on all {len(digests)} ranks" if len(digests) > 1 else "")


def environment_section(facts: Facts) -> str:
    plan, metadata = facts.last.plan, facts.metadata
    devices = mapping_of(metadata, "devices")
    versions = {**mapping_of(facts.last.result, "versions"), **mapping_of(metadata, "versions")}
    count = first_of(plan.get("devices"), devices.get("count"))
    rows = {
        "Devices": " ".join(
            filter(
                None,
                [count, text_of(plan, "device_target"), text_of(devices, "product")],
            )
        ),
        **{str(key): str(value) for key, value in versions.items()},
        "Run folder": facts.folder,
    }
    body = pairs_of({key: value for key, value in rows.items() if value})
    if facts.command:
        body += (
            "<details><summary>Command of the newest attempt</summary>"
            f"<pre>{escape(facts.command)}</pre></details>"
        )
    return section("Environment", body)


def config_section(facts: Facts) -> str:
    if not facts.config_text:
        return section("Config", "<p>This run has left no config.</p>")
    text = escape(facts.config_text)
    return section("Config", f"<details><summary>config.yaml</summary><pre>{text}</pre></details>")


# ---- pieces of HTML
