"""The report of a run: what is known of it, as one HTML page that needs nothing else.

Facts in, text out. Everything that comes from the run is escaped; the page's policy allows its own
style and script by their digests, pictures that it holds itself, and nothing from outside.
"""

from __future__ import annotations

import base64
import hashlib
import math
from html import escape

from launcher.curves import figure
from launcher.report_curves import curves_section, loss_section
from launcher.report_history import (
    config_section,
    environment_section,
    history_section,
    lineage_section,
)
from launcher.report_parts import (
    Facts,
    count_of,
    data_url,
    list_of,
    mapping_of,
    pairs_of,
    percent,
    section,
    when,
)
from launcher.report_scores import scores_section
from launcher.report_style import SCRIPT, STYLE
from launcher.status import number, smoothed, text_of
from registry.words import human_size, human_time


def report_html(facts: Facts) -> str:
    """The page."""
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(STYLE)}'; "
        f"script-src '{_digest(SCRIPT)}'; base-uri 'none'; form-action 'none'"
    )
    sections = (
        _summary(facts),
        _plan(facts),
        loss_section(facts),
        _samples(facts),
        scores_section(facts),
        curves_section(facts),
        history_section(facts),
        lineage_section(facts),
        environment_section(facts),
        config_section(facts),
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
<footer><p>Made by <code>lora-launch report</code> on {when(facts.made)}. This file is complete: it
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
    losses = mapping_of(result, "validation_loss")
    base, lora = number(losses, "base"), number(losses, "lora")
    count = facts.published_step
    if result and math.isfinite(base) and math.isfinite(lora):
        verb = "fell" if lora < base else "rose" if lora > base else "stayed"
        text = f"Validation loss {verb} from {base:.4f} with the base alone to {lora:.4f} with the"
        text += " LoRA"
        text += f" ({percent(lora / base - 1)})." if base else "."
        if count is not None and count < number(result, "steps"):
            text += f" The best step, {count:,} of {int(number(result, 'steps')):,}, was kept."
    elif result:
        text = (
            f"Trained for {count_of(result.get('steps'))} steps; "
            "nothing was held out to validate on."
        )
    elif not course.steps:
        text = "No step was done" + (" yet." if facts.state.at_work else ".")
    else:
        of = f" of {facts.steps:,}" if facts.steps else ""
        mean = smoothed([number(event, "loss") for event in course.steps])[-1]
        text = f"Step {count_of(course.steps[-1].get('step'))}{of} done"
        text += f", loss about {mean:.4f}" if math.isfinite(mean) else ""
        text += ", when this page was made." if facts.state.at_work else "."
    detail = facts.state.detail
    return f"{text} {detail[:1].upper()}{detail[1:]}." if detail else text


def _tiles(facts: Facts) -> str:
    last, course = facts.last, facts.course
    result, plan = last.result, last.plan
    step = course.steps[-1] if course.steps else {}
    tiles: list[tuple[str, str, str]] = []
    losses = mapping_of(result, "validation_loss")
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
        tiles.append(("Steps", count_of(done), planned))
    images = result.get("images") or step.get("images")
    if images:
        samples = number(plan, "epoch_samples")
        epochs = f"{number({'n': images}, 'n') / samples:.4g} epochs" if samples > 0 else ""
        tiles.append(("Images seen", count_of(images), epochs))
    seconds = mapping_of(result, "seconds")
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
        return section("Plan", "<p>This run has left no plan.</p>")
    base, optimizer, lora = (mapping_of(config, key) for key in ("base", "optimizer", "lora"))
    rows: dict[str, str] = {}
    model = text_of(plan, "model", "?")
    weights = text_of(base, "weights")
    rows["Base"] = ", ".join(filter(None, [model, weights, text_of(plan, "base")]))
    if text_of(plan, "train", "lora") == "lora":
        size = plan.get("trained_parameters")
        of = f" of rank {lora['rank']}" if "rank" in lora else ""
        on = f" on {lora['targets']} layers" if "targets" in lora else ""
        text = ", and the text encoder" if lora.get("text_encoder") else ""
        rows["Trained"] = f"LoRA{of}{on}{text}" + (f": {count_of(size)} parameters" if size else "")
    else:
        rows["Trained"] = "every weight of UNet and text encoder"
    if (examples := plan.get("examples")) is not None:
        shapes = list_of(plan, "shapes", {})
        sizes = ", ".join(
            f"{s[0]} × {s[1]}" for s in shapes[:4] if isinstance(s, list) and len(s) > 1
        )
        more = f" and {len(shapes) - 4} more shapes" if len(shapes) > 4 else ""
        rows["Images"] = f"{count_of(examples)}" + (f", {sizes}{more} pixels" if sizes else "")
    samples, images = number(plan, "epoch_samples"), number(plan, "images")
    if samples > 0 and math.isfinite(images):
        rows["Length"] = (
            f"{images / samples:.4g} epochs, {images:,.0f} samples, {facts.steps or 0:,} steps"
        )
    held = plan.get("validation_examples")
    rows["Validation"] = f"{count_of(held)} held-out images" if held else "none"
    if held and plan.get("validate_steps"):
        rows["Validation"] += f", every {count_of(plan['validate_steps'])} steps"
    if batch := plan.get("global_batch"):
        split = [plan.get(key) for key in ("devices", "micro_batch", "accumulation")]
        rows["Global batch"] = f"{count_of(batch)} images a step"
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
    return section("Plan", pairs_of(rows))


def _samples(facts: Facts) -> str:
    if not facts.pictures:
        wanted = mapping_of(facts.config, "samples")
        why = "were drawn" + (" yet" if facts.state.at_work else "")
        if not wanted:
            why = "were asked for: the config names no <code>samples</code>"
        return section("Pictures over time", f"<p>No pictures {why}.</p>")
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
            f'<figure><img src="{data_url(picture)}" alt="{escape(alt)}" width="{picture.width}" '
            f'height="{picture.height}"><figcaption>{title}</figcaption></figure>'
        )
    columns = min(4, len(facts.prompts))
    captions = "".join(f"<li>{escape(prompt)}</li>" for prompt in facts.prompts)
    captions = f'<ol class="prompts columns-{columns}">{captions}</ol>' if captions else ""
    settings = mapping_of(facts.config, "samples")
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
    return section(
        "Pictures over time",
        f'<div class="slider" hidden><label for="sample-step">Move to see another step</label>'
        f'<input id="sample-step" type="range" min="0" max="{len(facts.pictures) - 1}" '
        f'value="{shown}"><label><input id="sample-all" type="checkbox"> all at once</label></div>'
        f'<div class="samples" id="samples">{"".join(figures)}</div>{captions}'
        f'<p class="hint">{hint}</p>',
    )
