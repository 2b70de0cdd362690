"""The report's parts on the course of training: loss, other curves, a table of figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launcher.curves import Chart, Line, Mark, figure
from launcher.report_parts import Facts, cell, count_of, figure_of, section, table_of
from launcher.status import Attempt, number, smoothed

_ROWS = 12
"""Of the table of figures, about."""


def loss_section(facts: Facts) -> str:
    events = facts.course.steps
    if not events:
        state = "yet; make the report again later" if facts.state.at_work else "in this run"
        return section("Loss", f"<p>No training step was done {state}.</p>")
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
    text = f"Training loss over {count_of(int(steps[-1]))} steps"
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
    return section("Loss", figure_of(chart, legend, remarks) + f'<p class="hint">{note}</p>')


def curves_section(facts: Facts) -> str:
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
    figures = [figure_of(chart, legend, [], card=True) for chart, legend in charts]
    return section(
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
        rows.append(("0", "", cell(measured[0]), "", "", ""))
    for place in sorted(places):
        event = events[place]
        rows.append(
            (
                count_of(event["step"]),
                cell(losses[place]),
                cell(measured.get(int(event["step"]), math.nan)),
                cell(number(event, "learning_rate")),
                cell(number(event, "gradient_norm")),
                cell(speeds[place]),
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
    body = table_of(head, rows)
    quarters = [
        (count_of(event["step"]), cell(number(event, "loss")), *map(cell, event["quarters"]))
        for event in facts.course.validations
        if isinstance(event.get("quarters"), list)
        and len(event["quarters"]) == 4
        and all(isinstance(part, (int, float)) for part in event["quarters"])
    ]
    if quarters:
        head = ("step", "all", "least noise", "2nd quarter", "3rd quarter", "most noise")
        body += f"<h3>Validation loss by quarter of the timesteps</h3>{table_of(head, quarters)}"
    return f"<details><summary>The curves in figures</summary>{body}</details>\n"
