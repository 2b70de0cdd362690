"""The report of a run: what is known of it, as one HTML page that needs nothing else.

Facts in, text out. Everything that comes from the run is escaped; the page's policy allows its own
style and script by their digests, pictures that it holds itself, and nothing from outside.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from typing import Any

from launcher.curves import Bar, Chart, Line, Mark, draw, draw_bars, figure
from launcher.report_style import SCRIPT, STYLE
from launcher.status import Attempt, Course, State, number, smoothed, text_of
from registry.words import human_size, human_time

_ROWS = 12
"""Of the table of figures, about."""
_SHOWN_CHECKPOINTS = 8
_DIGEST = re.compile(r"\b[0-9a-f]{40,}\b")


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
        return _dict(self.last.push, "metadata")

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


def report_html(facts: Facts) -> str:
    """The page."""
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(STYLE)}'; "
        f"script-src '{_digest(SCRIPT)}'; base-uri 'none'; form-action 'none'"
    )
    sections = (
        _summary(facts),
        _plan(facts),
        _loss(facts),
        _samples(facts),
        _scores(facts),
        _curves(facts),
        _history(facts),
        _lineage(facts),
        _environment(facts),
        _config(facts),
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{escape(facts.name)} – report of a training run</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<main>
{"".join(sections)}</main>
<footer><p>Made by <code>lora-launch report</code> on {_when(facts.made)}. This file is complete: it
loads nothing and can be sent as it is.</p></footer>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ---- the sections


def _summary(facts: Facts) -> str:
    state = facts.state
    parts = [
        "<header>",
        f'<p class="kind">Training run <span class="state {state.name}">{state.name}</span></p>',
        f"<h1>{escape(facts.name)}</h1>",
        f'<p class="lead">{escape(result_sentence(facts))}</p>',
        _tiles(facts),
        "".join(f'<p class="remark">{escape(text)}</p>' for text in facts.remarks),
        "</header>\n",
    ]
    return "".join(parts)


def result_sentence(facts: Facts) -> str:
    """What the run has come to, in a sentence or two."""
    result, course = facts.last.result, facts.course
    losses = _dict(result, "validation_loss")
    base, lora = number(losses, "base"), number(losses, "lora")
    count = facts.published_step
    if result and math.isfinite(base) and math.isfinite(lora):
        verb = "fell" if lora < base else "rose" if lora > base else "stayed"
        text = f"Validation loss {verb} from {base:.4f} with the base alone to {lora:.4f} with the"
        text += " LoRA"
        text += f" ({_percent(lora / base - 1)})." if base else "."
        if count is not None and count < number(result, "steps"):
            text += f" The best step, {count:,} of {int(number(result, 'steps')):,}, was kept."
    elif result:
        text = (
            f"Trained for {_count(result.get('steps'))} steps; nothing was held out to validate on."
        )
    elif not course.steps:
        text = "No step was done" + (" yet." if facts.state.at_work else ".")
    else:
        of = f" of {facts.steps:,}" if facts.steps else ""
        mean = smoothed([number(event, "loss") for event in course.steps])[-1]
        text = f"Step {_count(course.steps[-1].get('step'))}{of} done"
        text += f", loss about {mean:.4f}" if math.isfinite(mean) else ""
        text += ", when this page was made." if facts.state.at_work else "."
    detail = facts.state.detail
    return f"{text} {detail[:1].upper()}{detail[1:]}." if detail else text


def _percent(share: float) -> str:
    return f"{share:+.1%}".replace("-", "−").replace("%", " %")


def _tiles(facts: Facts) -> str:
    last, course = facts.last, facts.course
    result, plan = last.result, last.plan
    step = course.steps[-1] if course.steps else {}
    tiles: list[tuple[str, str, str]] = []
    losses = _dict(result, "validation_loss")
    measured = [event for event in course.validations if math.isfinite(number(event, "loss"))]
    if math.isfinite(number(losses, "lora")):
        base = f"{number(losses, 'base'):.4f} with the base alone"
        tiles.append(("Validation loss", f"{number(losses, 'lora'):.4f}", base))
    elif measured:
        best = min(measured, key=lambda event: number(event, "loss"))
        text = f"at step {best['step']:,}, the best so far" if best["step"] else "before training"
        tiles.append(("Validation loss", f"{number(best, 'loss'):.4f}", text))
    done = result.get("steps") or step.get("step")
    if done:
        planned = f"of {facts.steps:,}" if facts.steps and facts.steps != done else ""
        tiles.append(("Steps", _count(done), planned))
    images = result.get("images") or step.get("images")
    if images:
        samples = number(plan, "epoch_samples")
        epochs = f"{number({'n': images}, 'n') / samples:.4g} epochs" if samples > 0 else ""
        tiles.append(("Images seen", _count(images), epochs))
    seconds = _dict(result, "seconds")
    times = [number(event, "time") for attempt in facts.attempts for event in attempt.events]
    times = [value for value in times if math.isfinite(value)]
    total = number(seconds, "total")
    if math.isfinite(total):
        training = number(seconds, "training")
        text = f"{human_time(training)} of it in steps" if math.isfinite(training) else ""
        tiles.append(("Time", human_time(total), text))
    elif len(times) > 1:
        tiles.append(("Time", human_time(max(times) - min(times)), "from first to last event"))
    speed = number(result or step, "images_per_second")
    if math.isfinite(speed):
        devices = plan.get("devices")
        on = f"on {devices} {text_of(plan, 'device_target')} device{'s' if devices != 1 else ''}"
        tiles.append(("Speed", f"{speed:.3g} images/s", on if devices else ""))
    if number(result, "peak_memory_bytes") > 0:
        size = human_size(int(number(result, "peak_memory_bytes")))
        tiles.append(("Memory", size, "at most, on rank 0"))
    rows = (
        f"<div><dt>{escape(title)}</dt><dd>{escape(value)}<small>{escape(text)}</small></dd></div>"
        for title, value, text in tiles
    )
    return f'<dl class="tiles">{"".join(rows)}</dl>' if tiles else ""


def _plan(facts: Facts) -> str:
    plan, config = facts.last.plan, facts.config
    if not plan:
        return _section("Plan", "<p>This run has left no plan.</p>")
    base, optimizer, lora = (_dict(config, key) for key in ("base", "optimizer", "lora"))
    rows: dict[str, str] = {}
    model = text_of(plan, "model", "?")
    weights = text_of(base, "weights")
    rows["Base"] = ", ".join(filter(None, [model, weights, text_of(plan, "base")]))
    if text_of(plan, "train", "lora") == "lora":
        size = plan.get("trained_parameters")
        of = f" of rank {lora['rank']}" if "rank" in lora else ""
        on = f" on {lora['targets']} layers" if "targets" in lora else ""
        text = ", and the text encoder" if lora.get("text_encoder") else ""
        rows["Trained"] = f"LoRA{of}{on}{text}" + (f": {_count(size)} parameters" if size else "")
    else:
        rows["Trained"] = "every weight of UNet and text encoder"
    if (examples := plan.get("examples")) is not None:
        shapes = _list(plan, "shapes", {})
        sizes = ", ".join(
            f"{s[0]} × {s[1]}" for s in shapes[:4] if isinstance(s, list) and len(s) > 1
        )
        more = f" and {len(shapes) - 4} more shapes" if len(shapes) > 4 else ""
        rows["Images"] = f"{_count(examples)}" + (f", {sizes}{more} pixels" if sizes else "")
    samples, images = number(plan, "epoch_samples"), number(plan, "images")
    if samples > 0 and math.isfinite(images):
        rows["Length"] = (
            f"{images / samples:.4g} epochs, {images:,.0f} samples, {facts.steps or 0:,} steps"
        )
    held = plan.get("validation_examples")
    rows["Validation"] = f"{_count(held)} held-out images" if held else "none"
    if held and plan.get("validate_steps"):
        rows["Validation"] += f", every {_count(plan['validate_steps'])} steps"
    if batch := plan.get("global_batch"):
        split = [plan.get(key) for key in ("devices", "micro_batch", "accumulation")]
        rows["Global batch"] = f"{_count(batch)} images a step"
        if None not in split:
            rows["Global batch"] += (
                f" = {split[0]} devices × {split[1]} at once × {split[2]} accumulated"
            )
    if math.isfinite(number(plan, "learning_rate")):
        warm = optimizer.get("warmup_steps")
        rows["Learning rate"] = (
            f"{figure(number(plan, 'learning_rate'))}, {text_of(plan, 'schedule', 'constant')}"
            + (f" after {warm} warm-up steps" if warm else "")
            + (f"; {optimizer['name']}" if "name" in optimizer else "")
        )
    rows["Precision"] = text_of(plan, "precision", "?")
    return _section("Plan", _pairs(rows))


def _loss(facts: Facts) -> str:
    events = facts.course.steps
    if not events:
        state = "yet; make the report again later" if facts.state.at_work else "in this run"
        return _section("Loss", f"<p>No training step was done {state}.</p>")
    steps = [number(event, "step") for event in events]
    losses = [number(event, "loss") for event in events]
    span = span_of(len(steps))
    measured = [event for event in facts.course.validations if math.isfinite(number(event, "loss"))]
    lines = [
        Line("loss of the step", "raw", steps, losses),
        Line(f"average over about {span} steps", "smooth", steps, smoothed(losses, span)),
    ]
    legend = [("raw", "training loss of each step"), ("smooth", lines[1].name)]
    if measured:
        at = [number(event, "step") for event in measured]
        values = [number(event, "loss") for event in measured]
        lines.append(Line("validation loss", "second", at, values, dots=True))
        legend.append(("second", "validation loss, on held-out images"))
    marks = [
        Mark(attempt.start_step, f"attempt {attempt.number} from here", "restart")
        for attempt in facts.attempts[1:]
        if any(event["event"] == "step" for event in attempt.events)
    ]
    if facts.published_step is not None:
        word = "published" if facts.last.published else "kept"
        marks.append(
            Mark(facts.published_step, f"{word}: step {facts.published_step:,}", "published")
        )
    missing = [step for step, loss in zip(steps, losses, strict=True) if not math.isfinite(loss)]
    text = f"Training loss over {_count(int(steps[-1]))} steps"
    ends = [value for value in lines[1].ys if math.isfinite(value)]
    if ends:
        text += f", on average {ends[0]:.4f} at first and {ends[-1]:.4f} at the end"
    if measured:
        at_steps = ", ".join(f"{number(e, 'loss'):.4f} at step {e['step']}" for e in measured[:20])
        text += f". Validation loss: {at_steps}"
    chart = Chart(
        "loss",
        "Training and validation loss",
        text,
        lines,
        "loss",
        marks,
        missing,
        x_end=facts.steps if facts.state.at_work else None,
        from_zero=False,
        width=980,
        height=380,
    )
    remarks = []
    if missing:
        count = "one step" if len(missing) == 1 else f"{len(missing):,} steps"
        remarks.append(f"In {count} the loss was not a number, marked × at the foot.")
    note = (
        "The loss of a step is noisy, because each sees other images and other amounts of noise; "
        "look at the average. "
    )
    if len(measured) > 1:
        note += (
            "Validation is always on the same images and noise, so its points compare; where it "
            "rises again, the LoRA begins to learn the training images by heart."
        )
    elif not measured:
        note += "Nothing was held out to validate on, so nothing here shows overfitting."
    return _section("Loss", _figure(chart, legend, remarks) + f'<p class="hint">{note}</p>')


def _samples(facts: Facts) -> str:
    if not facts.pictures:
        wanted = _dict(facts.config, "samples")
        why = "were drawn" + (" yet" if facts.state.at_work else "")
        if not wanted:
            why = "were asked for: the config names no <code>samples</code>"
        return _section("Pictures over time", f"<p>No pictures {why}.</p>")
    shown = len(facts.pictures) - 1
    for place, picture in enumerate(facts.pictures):
        if picture.step == facts.published_step:
            shown = place
    figures = []
    for picture in facts.pictures:
        title = f"Step {picture.step:,}"
        if picture.step == 0:
            title += " – before training"
        elif picture.step == facts.published_step:
            title += " – published" if facts.last.published else " – kept"
        alt = f"Pictures of step {picture.step}"
        alt += f": {'; '.join(facts.prompts)}" if facts.prompts else ""
        figures.append(
            f'<figure><img src="{_data(picture)}" alt="{escape(alt)}" width="{picture.width}" '
            f'height="{picture.height}"><figcaption>{title}</figcaption></figure>'
        )
    columns = min(4, len(facts.prompts))
    captions = "".join(f"<li>{escape(prompt)}</li>" for prompt in facts.prompts)
    captions = f'<ol class="prompts columns-{columns}">{captions}</ol>' if captions else ""
    settings = _dict(facts.config, "samples")
    how = [
        words.format(settings[key])
        for key, words in (
            ("steps", "{} solver steps"),
            ("scale", "guidance {:g}"),
            ("seed", "seeds from {} on"),
        )
        if isinstance(settings.get(key), (int, float))
    ]
    hint = "The same prompts and seeds each time, so what changes is the LoRA."
    hint += f" Drawn with {', '.join(how)}." if how else ""
    return _section(
        "Pictures over time",
        f'<div class="slider" hidden><label for="sample-step">Move to see another step</label>'
        f'<input id="sample-step" type="range" min="0" max="{len(facts.pictures) - 1}" '
        f'value="{shown}"><label><input id="sample-all" type="checkbox"> all at once</label></div>'
        f'<div class="samples" id="samples">{"".join(figures)}</div>{captions}'
        f'<p class="hint">{hint}</p>',
    )


def _scores(facts: Facts) -> str:
    given = _dict(facts.last.scores, "scores")
    if not given:
        waits = facts.last.to_do == "evaluated"
        text = "The scores are still to come." if waits else "This run was not evaluated."
        return _section("Scores", f"<p>{text}</p>")
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
            f'<img class="sheet" src="{_data(facts.sheet)}" alt="The pictures of the evaluation" '
            f'width="{facts.sheet.width}" height="{facts.sheet.height}"></details>'
        )
    if spec := _flat(_dict(facts.last.scores, "evaluation")):
        parts.append(f"<details><summary>How they were measured</summary>{_pairs(spec)}</details>")
    return _section("Scores", "".join(parts))


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
    table = _table(("picture", "training image", "distance"), cells, text_columns=2)
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


def _curves(facts: Facts) -> str:
    events = facts.course.steps
    if not events:
        return ""
    steps = [number(event, "step") for event in events]
    end = facts.steps if facts.state.at_work else None
    span = span_of(len(steps))

    def values(key: str) -> list[float]:
        return [number(event, key) for event in events]

    norms = values("gradient_norm")
    speeds = speeds_of(facts.attempts, events, _window(len(steps)))
    scales = values("loss_scale")
    charts = [
        (
            Chart(
                "learning-rate",
                "Learning rate",
                f"Learning rate of each step, {_ends(values('learning_rate'))}",
                [Line("learning rate", "smooth", steps, values("learning_rate"))],
                "learning rate",
                x_end=end,
            ),
            [],
        ),
        (
            Chart(
                "gradient-norm",
                "Gradient norm",
                f"Length of the gradient before clipping, {_ends(norms)}",
                [
                    Line("gradient norm", "raw", steps, norms),
                    Line("on average", "smooth", steps, smoothed(norms, span)),
                ],
                "gradient norm",
                crosses=[s for s, v in zip(steps, norms, strict=True) if not math.isfinite(v)]
                if any(map(math.isfinite, norms))
                else (),
                x_end=end,
            ),
            [("raw", "each step"), ("smooth", f"average over about {span}")],
        ),
        (
            Chart(
                "throughput",
                "Throughput",
                f"Images per second of all devices together, {_ends(speeds)}",
                [Line("images/s", "smooth", steps, speeds)],
                "images per second",
                x_end=end,
            ),
            [],
        ),
    ]
    if len({value for value in scales if math.isfinite(value)}) > 1:
        chart = Chart(
            "loss-scale",
            "Loss scale",
            f"Factor of the loss in half precision, {_ends(scales)}",
            [Line("loss scale", "smooth", steps, scales)],
            "loss scale",
            x_end=end,
        )
        charts.append((chart, []))
    memory = [value / 1e9 for value in values("memory_bytes")]
    if any(map(math.isfinite, memory)):
        chart = Chart(
            "memory",
            "Memory of rank 0",
            f"Memory in GB, {_ends(memory)}",
            [Line("memory in GB", "smooth", steps, memory)],
            "GB",
            x_end=end,
        )
        charts.append((chart, []))
    figures = [_figure(chart, legend, [], card=True) for chart, legend in charts]
    return _section(
        "Course of the run",
        f'<div class="pair">{"".join(filter(None, figures))}</div>{_numbers(facts)}',
    )


def span_of(steps: int) -> int:
    """Over how many of so many steps a curve is averaged."""
    span = max(10, min(500, steps // 20))
    return span if span < 100 else round(span, -1)


def _window(steps: int) -> int:
    """Over how many of so many steps speed is measured."""
    return max(10, min(100, steps // 20))


def speeds_of(
    attempts: Sequence[Attempt], events: Sequence[Mapping[str, Any]], window: int
) -> list[float]:
    """Images per second at each step, over the `window` steps before it; pauses to validate, draw
    or save do not count. Where the times are not known, as the run itself has said it."""
    took: dict[tuple[float, float], float] = {}
    for attempt in attempts:
        before = math.nan
        for seen in attempt.events:
            if seen["event"] == "step":
                now = number(seen, "time")
                took[number(seen, "step"), now] = now - before
                before = now
            elif seen["event"] == "phase":
                before = math.nan
    found, recent, images_before = list[float](), list[tuple[float, float]](), math.nan
    for event in events:
        step, images = number(event, "step"), number(event, "images")
        seconds = took.get((step, number(event, "time")), math.nan)
        if math.isfinite(seconds) and seconds >= 0 and images > images_before:
            recent = [*recent, (seconds, images - images_before)][-window:]
        images_before = images
        total = sum(seconds for seconds, _ in recent)
        if len(recent) >= min(window, 5) and total > 0:
            found.append(sum(count for _, count in recent) / total)
        else:
            found.append(math.nan)
    if not any(map(math.isfinite, found)):
        return [number(event, "images_per_second") or math.nan for event in events]
    return found


def _ends(values: Iterable[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "not known"
    return (
        f"{figure(finite[0])} at first, {figure(finite[-1])} at last, between "
        f"{figure(min(finite))} and {figure(max(finite))}"
    )


def _numbers(facts: Facts) -> str:
    """The curves' main figures, for those who read and do not look."""
    events = facts.course.steps
    if not events:
        return ""
    losses = smoothed([number(event, "loss") for event in events], span_of(len(events)))
    speeds = speeds_of(facts.attempts, events, _window(len(events)))
    measured = {int(event["step"]): number(event, "loss") for event in facts.course.validations}
    places = {round(part * (len(events) - 1) / (_ROWS - 1)) for part in range(_ROWS)}
    if len(measured) <= 2 * _ROWS:
        places |= {place for place, event in enumerate(events) if event["step"] in measured}
    rows = []
    if 0 in measured:
        rows.append(("0", "", _cell(measured[0]), "", "", ""))
    for place in sorted(places):
        event = events[place]
        rows.append(
            (
                _count(event["step"]),
                _cell(losses[place]),
                _cell(measured.get(int(event["step"]), math.nan)),
                _cell(number(event, "learning_rate")),
                _cell(number(event, "gradient_norm")),
                _cell(speeds[place]),
            )
        )
    head = (
        "step",
        "loss, average",
        "validation loss",
        "learning rate",
        "gradient norm",
        "images/s",
    )
    body = _table(head, rows)
    quarters = [
        (_count(event["step"]), _cell(number(event, "loss")), *map(_cell, event["quarters"]))
        for event in facts.course.validations
        if isinstance(event.get("quarters"), list)
        and len(event["quarters"]) == 4
        and all(isinstance(part, (int, float)) for part in event["quarters"])
    ]
    if quarters:
        head = ("step", "all", "least noise", "2nd quarter", "3rd quarter", "most noise")
        body += f"<h3>Validation loss by quarter of the timesteps</h3>{_table(head, quarters)}"
    return f"<details><summary>The curves in figures</summary>{body}</details>\n"


def _cell(value: float) -> str:
    return figure(value) if math.isfinite(value) else "–"


def _history(facts: Facts) -> str:
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
                _when(times[0]) if times else "–",
                human_time(times[-1] - times[0]) if times else "–",
                span,
                _ended(attempt, facts),
            )
        )
    head = ("attempt", "began", "lasted", "steps", "how it ended")
    parts = [_table(head, rows, wide_last=True)]
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
            f"{_when(number(event, 'time'))}</small><br>{escape(text_of(event, 'text', '?'))}"
            f"{more}</li>"
        )
    if remarks:
        parts.append(f'<h3>Warnings and failures</h3><ul class="remarks">{"".join(remarks)}</ul>')
    else:
        parts.append("<p>No warning and no failure.</p>")
    skipped = facts.last.result.get("skipped_steps")
    if skipped:
        parts.append(
            f"<p>{_count(skipped)} steps changed nothing: their gradient was not finite.</p>"
        )
    unreadable = sum(attempt.unreadable for attempt in facts.attempts)
    if unreadable:
        parts.append(f"<p>{unreadable:,} lines of events.jsonl could not be read.</p>")
    saved = facts.course.checkpoints
    parts.append("<h3>Checkpoints</h3>")
    if saved:
        cells = [
            (
                _count(event["step"]),
                human_size(int(number(event, "bytes"))) if number(event, "bytes") >= 0 else "–",
                f"{number(event, 'seconds'):.2g} s" if number(event, "seconds") >= 0 else "–",
                _when(number(event, "time")),
                "kept" if event["step"] in facts.kept else "replaced by newer ones",
            )
            for event in saved[-_SHOWN_CHECKPOINTS:]
        ]
        if len(saved) > len(cells):
            parts.append(f"<p>{len(saved):,} were written; the last {len(cells)}:</p>")
        parts.append(_table(("step", "size", "took", "written", "now"), cells, wide_last=True))
    else:
        parts.append("<p>None was written.</p>")
    return _section("What happened", "".join(parts))


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


def _lineage(facts: Facts) -> str:
    plan, result, metadata = facts.last.plan, facts.last.result, facts.metadata
    base, data = _dict(metadata, "base"), _dict(metadata, "data")
    code, parent = _dict(metadata, "code"), _dict(metadata, "parent")
    seed = metadata.get("seed", facts.config.get("seed"))
    published = facts.last.published
    reference = text_of(published, "reference")
    rows = {
        "Published as": f"{reference}, in {text_of(published, 'registry')}" if reference else "",
        "Base": text_of(base, "weights", text_of(_dict(facts.config, "base"), "weights")),
        "Base digest": _first(
            base.get("digest"), result.get("base_digest"), plan.get("base_digest")
        ),
        "Training data": _folders(facts.config),
        "Data digest": _first(
            data.get("digest"), result.get("data_digest"), plan.get("data_digest")
        ),
        "Parent": text_of(
            parent, "reference", text_of(_dict(facts.config, "lora"), "start", "none")
        ),
        "Code": _code(code),
        "Seed": "" if seed is None else str(seed),
        "Trigger words": ", ".join(map(str, _list(metadata, "trigger_words", facts.config))),
        "Licence": _first(metadata.get("licence"), facts.config.get("licence")),
        "Weights digest": _weights(result),
    }
    return _section("Lineage", _pairs({key: value for key, value in rows.items() if value}))


def _folders(config: Mapping[str, Any]) -> str:
    train = _dict(config, "data").get("train")
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


def _environment(facts: Facts) -> str:
    plan, metadata = facts.last.plan, facts.metadata
    devices = _dict(metadata, "devices")
    versions = {**_dict(facts.last.result, "versions"), **_dict(metadata, "versions")}
    count = _first(plan.get("devices"), devices.get("count"))
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
    body = _pairs({key: value for key, value in rows.items() if value})
    if facts.command:
        body += (
            "<details><summary>Command of the newest attempt</summary>"
            f"<pre>{escape(facts.command)}</pre></details>"
        )
    return _section("Environment", body)


def _config(facts: Facts) -> str:
    if not facts.config_text:
        return _section("Config", "<p>This run has left no config.</p>")
    text = escape(facts.config_text)
    return _section("Config", f"<details><summary>config.yaml</summary><pre>{text}</pre></details>")


# ---- pieces of HTML


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n"


def _figure(
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


def _pairs(rows: Mapping[str, str]) -> str:
    found = (
        f"<div><dt>{escape(key)}</dt><dd{' class=digest' if _DIGEST.search(value) else ''}>"
        f"{escape(value)}</dd></div>"
        for key, value in rows.items()
    )
    return f'<dl class="facts">{"".join(found)}</dl>'


def _table(
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


def _data(picture: Picture) -> str:
    return f"data:{picture.kind};base64,{base64.b64encode(picture.data).decode()}"


def _when(seconds: float) -> str:
    """`27 Nov 2026, 09:37 UTC`."""
    try:
        return f"{datetime.fromtimestamp(seconds, timezone.utc):%d %b %Y, %H:%M} UTC".lstrip("0")
    except (ValueError, OverflowError, OSError):
        return "–"


def _count(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def _dict(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _list(values: Mapping[str, Any], key: str, otherwise: Mapping[str, Any]) -> list[Any]:
    found = values.get(key, otherwise.get(key))
    return found if isinstance(found, list) else []


def _first(*values: object) -> str:
    return next((str(value) for value in values if value), "")


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Nested facts as rows: `real, pictures`."""
    rows: dict[str, str] = {}
    for key, value in values.items():
        name = f"{above}, {key}" if above else str(key)
        name = name.replace("_", " ")
        if isinstance(value, dict):
            rows |= _flat(value, "" if not above and len(values) == 1 else name)
        elif isinstance(value, list):
            rows[name] = ", ".join(map(str, value))
        else:
            rows[name] = value if isinstance(value, str) else json.dumps(value)
    return rows
