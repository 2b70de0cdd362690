from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from launcher.cli import main
from launcher.curves import (
    MOST_POINTS,
    Bar,
    Chart,
    Line,
    Mark,
    downsampled,
    draw,
    draw_bars,
    figure,
    ticks,
    value_range,
)
from launcher.report_command import read_facts, scalars
from launcher.report_curves import speeds_of
from launcher.status import read_attempts

SCRIPT = "<script>alert('x')</script> & \"more\""
PLAN = {
    "name": "tiny",
    "model": "emoji",
    "base": "diffusers folder",
    "base_digest": "cd" * 32,
    "data_digest": "ef" * 32,
    "train": "lora",
    "precision": "fp32",
    "device_target": "CPU",
    "devices": 2,
    "examples": 4,
    "shapes": [[64, 64, 4]],
    "validation_examples": 2,
    "validate_steps": 5,
    "epoch_samples": 4,
    "images": 40,
    "steps": 10,
    "global_batch": 4,
    "micro_batch": 2,
    "accumulation": 1,
    "trained_parameters": 1234,
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "start_step": 0,
}
RESULT = {
    "artifact": "lora.safetensors",
    "validation_loss": {"base": 0.5, "lora": 0.4},
    "published_step": 5,
    "images": 40,
    "steps": 10,
    "skipped_steps": 1,
    "rank_digests": ["ab" * 32] * 2,
    "seconds": {"training": 100.0, "total": 200.0},
    "images_per_second": 20.0,
    "peak_memory_bytes": 1_500_000_000,
    "versions": {"mindspore": "2.10.0"},
}
SCORES = {
    "scores": {
        "kid_net": {"value": 0.1, "lower": 0.05, "upper": 0.2},
        "kid_net_base": {"value": 0.3, "lower": 0.2, "upper": 0.4},
        "kid_net_difference": {"value": -0.2, "lower": -0.3, "upper": -0.1},
        "fid": 90.0,
        "fid_base": 80.0,
    },
    "table": [
        ["", "LoRA", "base", "difference", ""],
        ["KID on Net × 10³", "", "", "", "lower is better"],
        ["FID", "", "", "", "of 40 pictures"],
    ],
    "evaluation": {"pictures": {"solver": "dpm++2m", "real": {"pictures": 40}}},
    "cautions": [f"few pictures {SCRIPT}"],
    "nearest": [{"picture": "1.png", "training_image": "2.png", "distance": 0.2}],
    "sheet": "/elsewhere/attempt_2/evaluation/sheet.png",
}


def step(number: int, **values: Any) -> dict[str, Any]:
    return {
        "event": "step",
        "step": number,
        "steps": 10,
        "images": 4 * number,
        "loss": 1 / number,
        "learning_rate": 1e-3,
        "gradient_norm": 0.5,
        "loss_scale": 1.0,
        "images_per_second": 20.0,
        "time": 1_800_000_000.0 + number,
        **values,
    }


def validation(number: int, loss: float) -> dict[str, Any]:
    quarters = [loss, loss, loss, loss]
    return {
        "event": "validation",
        "step": number,
        "loss": loss,
        "quarters": quarters,
        "time": 1.8e9,
    }


def write_attempt(
    run: Path, number: int, events: list[dict[str, Any]], start_step: int = 0, **files: Any
) -> Path:
    attempt = run / f"attempt_{number}"
    attempt.mkdir(parents=True)
    (attempt / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (attempt / "plan.json").write_text(json.dumps({**PLAN, "start_step": start_step}))
    config = {
        "name": "tiny",
        "base": {"weights": "base"},
        "data": {"train": [{"folder": "train"}]},
        "samples": {"prompts": [SCRIPT, "a taco"], "steps": 20, "scale": 4.0, "seed": 0},
    }
    (attempt / "config.yaml").write_text(yaml.safe_dump(config))
    for name, value in files.items():
        (attempt / f"{name}.json").write_text(json.dumps(value))
    return attempt


def write_pictures(run: Path, *steps: int) -> None:
    (run / "samples").mkdir(exist_ok=True)
    for number in steps:
        picture = Image.new("RGB", (32, 16), (number % 256, 100, 100))
        picture.save(run / "samples" / f"step_{number:08d}.png")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has all there can be."""
    folder = tmp_path / "run"
    events = [
        {"event": "phase", "phase": "training", "time": 1.8e9},
        validation(0, 0.5),
        *map(step, range(1, 6)),
        {"event": "checkpoint", "step": 5, "bytes": 1000, "seconds": 0.1, "time": 1.8e9},
        validation(5, 0.4),
        step(6),
        {"event": "failure", "text": f"rank 1 failed {SCRIPT}", "traceback": SCRIPT, "time": 1.8e9},
    ]
    write_attempt(folder, 1, events)
    push = {
        "metadata": {
            "code": {"commit": "0123456789" * 4, "clean": False},
            "parent": {"reference": "older@3"},
            "trigger_words": [SCRIPT],
        }
    }
    events = [*(step(number) for number in range(6, 11)), validation(10, 0.45)]
    attempt = write_attempt(
        folder,
        2,
        events,
        5,
        result=RESULT,
        evaluated=SCORES,
        push=push,
        published={"reference": "tiny@1", "registry": "registry"},
    )
    (attempt / "evaluation").mkdir()
    Image.new("RGB", (8, 8)).save(attempt / "evaluation" / "sheet.png")
    write_pictures(folder, 0, 5, 10)
    return folder


def run_command(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """What a report holds; closing tags must fit."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.within: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(text)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.within.get(self.open[-1] if self.open else "", self.words).append(data)


def page_of(run: Path) -> Page:
    """The report of a run, sound and with nothing from outside."""
    result = run_command("report", run)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert (result.exit_code, result.stderr) == (0, "")
    path = Path(result.stdout.strip())
    assert path == run / "report.html"
    text = path.read_text()
    page = Page(text)
    assert len(page.within["script"]) == len(page.within["style"]) == 1
    policy = next(
        attributes["content"]
        for tag, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    for kind in ("script", "style"):
        digest = hashlib.sha256(page.within[kind][0].encode()).digest()
        assert f"{kind}-src 'sha256-{base64.b64encode(digest).decode()}'" in str(policy)
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    for tag, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on") or name == "style"}, tag
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            assert str(attributes.get(name, "data:")).startswith("data:"), (tag, attributes)
    assert "url(http" not in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
        assert "nan" not in re.sub(r"<(title|desc).*?</\1>|data-series=\".*?\"", "", svg).lower()
    return page


def test_everything_is_told(run: Path) -> None:
    page = page_of(run)
    for words in (
        "Validation loss fell from 0.5000 with the base alone to 0.4000 with the LoRA (−20.0 %).",
        "The best step, 5 of 10, was kept. Published as tiny@1.",
        "LoRA: 1,234 parameters",
        "4 images a step = 2 devices × 2 at once × 1 accumulated",
        "published: step 5",
        "attempt 2 from here",
        "better than the base",
        "few pictures <script>alert('x')</script>",
        "dpm++2m",
        "Step 5 – published",
        "rank 1 failed <script>alert('x')</script>",
        "changed nothing",
        "older@3",
        "with changes on top",
        "equal on all 2 ranks",
        "mindspore 2.10.0",
        "1.5 GB",
    ):
        assert words in page.text, words
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 4
    assert all(str(one["src"]).startswith("data:image/png;base64,") for one in pictures)
    assert SCRIPT in str(pictures[0]["alt"])
    charts = [attributes["id"] for _, attributes in page.tags if attributes.get("class") == "chart"]
    assert charts == ["loss", "learning-rate", "gradient-norm", "throughput"]


def test_reading_needs_no_script(run: Path) -> None:
    """The slider alone is hidden until the script shows it; no picture is."""
    page = page_of(run)
    hidden = [attributes.get("class") for _, attributes in page.tags if "hidden" in attributes]
    assert hidden == ["slider"]
    assert ".samples.one figure{display:none}" in page.within["style"][0]
    classes = [attributes.get("class") for _, attributes in page.tags]
    assert "samples" in classes
    assert "samples one" not in classes


def test_series_are_those_of_all_attempts(run: Path) -> None:
    page = page_of(run)
    loss = next(attributes for _, attributes in page.tags if attributes.get("id") == "loss")
    series = json.loads(str(loss["data-series"]))
    assert [line["name"] for line in series] == [
        "loss of the step",
        "average over about 10 steps",
        "validation loss",
    ]
    assert series[0]["x"] == list(range(1, 11))
    assert series[2] == {"name": "validation loss", "x": [0, 5, 10], "y": [0.5, 0.4, 0.45]}


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([], "No step was done."),
        ([{"event": "phase", "phase": "loading base", "time": 1.8e9}], "No training step was done"),
        ([step(1)], "Step 1 of 10 done, loss about 1.0000."),
        ([step(n, loss=math.nan, gradient_norm=math.inf) for n in (1, 2)], "Step 2 of 10 done."),
        ([step(1), step(2, loss=math.nan), step(3)], "In one step the loss was not a number"),
        ([{"event": "step", "step": n, "loss": 0.5} for n in (1, 2)], "Step 2 of 10 done"),
        ([{"event": "step"}, {"event": "validation"}, {"event": "warning"}], "No step was done."),
        ([step(1), {"event": "unknown", "odd": [1]}], "Nothing was held out to validate on"),
        ([{"event": "validation", "step": 0, "loss": math.nan, "quarters": None}], "No training"),
        ([step(1, step=None), step(2, loss="0.1", time="now")], "Step 2 of 10 done."),
    ],
)
def test_runs_that_did_not_come_far(
    tmp_path: Path, events: list[dict[str, Any]], words: str
) -> None:
    write_attempt(tmp_path / "run", 1, events)
    page = page_of(tmp_path / "run")
    assert words in page.text
    assert "interrupted" in page.text
    assert "No pictures were drawn." in page.text
    assert "This run was not evaluated." in page.text


def test_last_line_that_is_half_written(run: Path) -> None:
    with (run / "attempt_2" / "events.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    assert "could not be read" not in page_of(run).text
    with (run / "attempt_2" / "events.jsonl").open("a") as file:
        file.write("\n\x00\n")
    assert "2 lines of events.jsonl could not be read." in page_of(run).text


def test_folder_of_an_older_version(tmp_path: Path) -> None:
    (tmp_path / "run" / "attempt_1").mkdir(parents=True)
    page = page_of(tmp_path / "run")
    assert "This run has left no plan." in page.text
    assert "This run has left no config." in page.text


@pytest.mark.parametrize("value", [[1], "text", 7, None, {"a": {"b": [None]}}])
def test_files_that_hold_something_else(run: Path, value: object) -> None:
    for name in ("plan", "result", "push", "published", "evaluated"):
        (run / "attempt_2" / f"{name}.json").write_text(json.dumps(value))
    (run / "attempt_2" / "config.yaml").write_text(yaml.safe_dump(value))
    page_of(run)
    for name in ("plan", "result", "push", "evaluated"):
        keys = {**PLAN, **RESULT, **SCORES, "metadata": 0}
        values = json.dumps(dict.fromkeys(keys, value))
        (run / "attempt_2" / f"{name}.json").write_text(values)
    page_of(run)


def test_config_that_is_no_yaml_is_shown(run: Path) -> None:
    (run / "attempt_2" / "config.yaml").write_text("a: [1\n\t<b>")
    assert "a: [1 <b>" in page_of(run).text


def test_thousands_of_steps_make_a_page_of_bearable_size(tmp_path: Path) -> None:
    events = [step(n, steps=20_000, loss=1 + n % 7, gradient_norm=n % 5) for n in range(1, 20_001)]
    run = tmp_path / "run"
    write_attempt(run, 1, events)
    page = page_of(run)
    for _, attributes in page.tags:
        for line in json.loads(attributes.get("data-series") or "[]"):
            assert len(line["x"]) <= MOST_POINTS
    assert (run / "report.html").stat().st_size < 400_000


def test_pictures_that_are_broken_or_too_many(run: Path) -> None:
    write_pictures(run, *range(100, 200))
    (run / "samples" / "step_00000000.png").write_bytes(b"\x89PNG nothing")
    page = page_of(run)
    assert "step_00000000.png could not be read as a picture." in page.text
    assert "of 103 pictures are shown." in page.text
    assert "Step 5 – published" in page.text
    assert "Step 199" in page.text


def test_pictures_that_are_large_are_packed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.report_command._MOST_BYTES", 10)
    kinds = [str(attributes["src"])[:16] for tag, attributes in page_of(run).tags if tag == "img"]
    assert kinds == ["data:image/webp;"] * 3 + ["data:image/png;b"]


@pytest.mark.parametrize(
    "named", ["/etc/passwd", "/x/attempt_2/../../secret.png", "/x/attempt_2/none.png", 3, ""]
)
def test_sheet_is_looked_for_in_the_run_alone(run: Path, named: object) -> None:
    Image.new("RGB", (8, 8)).save(run.parent / "secret.png")
    scores = {**SCORES, "sheet": named}
    (run / "attempt_2" / "evaluated.json").write_text(json.dumps(scores))
    assert "The pictures that were scored" not in page_of(run).text


def test_bad_output(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, words in (
        (tmp_path, "this is a folder, expected the name of a file"),
        (tmp_path / "file" / "report.html", "cannot be written"),
    ):
        result = run_command("report", run, "--out", out)
        assert result.exit_code == 2
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1
    out = tmp_path / "new" / "page.html"
    assert run_command("report", run, "--out", out).stdout == f"{out}\n"
    assert sorted(path.name for path in out.parent.iterdir()) == ["page.html"]
    assert not (run / "report.html").exists()


# ---- curves


def test_ticks_are_round() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0.69, 1.53, 5) == [0.8, 1.0, 1.2, 1.4]
    assert ticks(0, 4e-5, 5) == [0, 1e-5, 2e-5, 3e-5, 4e-5]
    assert ticks(-3, 12_345, 5) == [0, 5000, 10_000]
    assert ticks(3, 3) == [3]
    assert ticks(math.nan, 1) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.75606, "0.7561"),
        (2e-5, "2e-5"),
        (-0.5, "−0.5"),
        (65536.0, "65,536"),
        (math.nan, "not a number"),
        (-math.inf, "−infinite"),
    ],
)
def test_figures(value: float, text: str) -> None:
    assert figure(value) == text


def test_thinning_keeps_ends_and_peaks() -> None:
    values = [float(n % 10) for n in range(50_000)]
    values[31_234] = 99.0
    values[20_000:22_000] = [math.nan] * 2000
    chosen = downsampled(range(50_000), values)
    assert len(chosen) <= MOST_POINTS
    assert {0, 31_234, 49_999} <= set(chosen)
    assert any(math.isnan(values[place]) for place in chosen)
    assert downsampled(range(5), values[:5]) == [0, 1, 2, 3, 4]


def test_a_few_wild_values_do_not_flatten_the_rest() -> None:
    values = [1 + 0.01 * (n % 10) for n in range(200)]
    _, usual, _ = value_range([Line("", "raw", range(200), values)], False)
    wild = [*values[:-1], 1e6]
    _, high, beyond = value_range([Line("", "raw", range(200), wild)], False)
    assert beyond == 1
    assert high < 2 * usual
    dots = Line("", "second", [0], [50.0], dots=True)
    assert value_range([Line("", "raw", range(200), wild), dots], False)[1] > 50


def test_chart_of_one_point_and_of_none() -> None:
    svg, _ = draw(Chart("a", "t", "d", [Line("x", "raw", [3], [0.0])], "y", [Mark(3, "m", "mark")]))
    assert "<circle" in svg
    assert draw(Chart("a", "t", "d", [Line("x", "raw", [3], [math.nan])], "y")) == ("", "")
    assert draw(Chart("a", "t", "d", [], "y")) == ("", "")
    svg, remark = draw(
        Chart("a", "t", "d", [Line("x", "raw", range(100), [*[1.0] * 99, 1e30])], "y")
    )
    assert remark == f"The axis is cut: values go up to {figure(1e30)}."


def test_bars_with_negative_values() -> None:
    bars = [Bar("LoRA", "lora", -2.0, -3.0, 1.0), Bar("base", "base", 4.0)]
    svg = ElementTree.fromstring(draw_bars("a", SCRIPT, bars))
    widths = [float(rect.attrib["width"]) for rect in svg.iter("rect")]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert svg.findtext("title") == SCRIPT
    assert draw_bars("a", "t", [Bar("LoRA", "lora", math.nan)]) == ""


def test_speed_leaves_pauses_out(tmp_path: Path) -> None:
    events = [step(n, time=float(n)) for n in range(1, 11)]
    events += [{"event": "phase", "phase": "validating", "time": 11.0}]
    events += [step(n, time=1000.0 + n) for n in range(11, 16)]
    write_attempt(tmp_path, 1, events)
    attempts = read_attempts(tmp_path)
    steps = [event for event in events if event["event"] == "step"]
    speeds = speeds_of(attempts, steps, 5)
    assert all(map(math.isnan, speeds[:5]))
    assert speeds[5:] == pytest.approx([4.0] * 10)
    unknown = [{**event, "time": None} for event in steps]
    assert speeds_of([], unknown, 5) == [20.0] * 15


# ---- TensorBoard


def test_missing_writer_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    result = run_command("report", run, "--tensorboard", run / "board")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: --tensorboard: needs tensorboardX; install it with: pip install "
        "'ascend-lora[tensorboard]'\n"
    )
    assert not (run / "board").exists()


def test_scalars_are_those_of_the_curves(run: Path) -> None:
    found = list(scalars(read_facts(run, 2e9)))
    assert [(step, value) for tag, step, value, _ in found if tag == "loss/validation"] == [
        (0, 0.5),
        (5, 0.4),
        (10, 0.45),
    ]
    assert [step for tag, step, *_ in found if tag == "loss/training"] == list(range(1, 11))


def test_event_files(run: Path) -> None:
    pytest.importorskip("tensorboardX", reason="needs the extra `tensorboard`")
    from tensorboardX.proto.event_pb2 import Event

    board = run / "board"
    for _ in range(2):  # the second replaces the first
        result = run_command("report", run, "--tensorboard", board)
        assert (result.exit_code, result.stdout, result.stderr) == (0, f"{board}\n", "")
    (path,) = board.iterdir()
    data, events = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[12 + size + 4 :]
    values = [(event.step, value) for event in events for value in event.summary.value]
    losses = {step: value.simple_value for step, value in values if value.tag == "loss/training"}
    assert losses == pytest.approx({number: 1 / number for number in range(1, 11)})
    pictures = [step for step, value in values if value.HasField("image")]
    assert pictures == [0, 5, 10]
    assert not (run / "report.html").exists()
    (run / "file").touch()
    result = run_command("report", run, "--tensorboard", run / "file")
    assert result.exit_code == 2
    assert "expected a folder, found a file" in html.unescape(result.stderr)
