"""One run with every option of the training engine that can be on at once, on two workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from weights import lora_files

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
INK = ROOT / "assets" / "emoji-ink"
PROMPTS = ["ink emoji of cat", "ink emoji of fish", "ink emoji of bell"]


def write_sets(folder: Path) -> None:
    """Twelve squares with a transparent corner, four pairs beside each other, eight in colour."""
    sources = sorted((INK / "train").glob("*.png"))
    for name in ("squares", "class", "held-out"):
        (folder / name).mkdir()

    def save(image: Image.Image, path: Path, caption: str) -> None:
        image.save(path)
        path.with_suffix(".txt").write_text(caption)

    for number, source in enumerate(sources[:12]):
        with Image.open(source) as image:
            alpha = np.full((64, 64), 255, np.uint8)
            alpha[:32, :32] = 0
            shown = image.convert("RGB")
            shown.putalpha(Image.fromarray(alpha))
            save(
                shown, folder / "squares" / f"{number}.png", f"thing {number}, black, ink, drawing"
            )
    for number in range(4):
        pair = Image.new("RGB", (128, 64))
        for place in range(2):
            with Image.open(sources[20 + 2 * number + place]) as image:
                pair.paste(image, (64 * place, 0))
        save(pair, folder / "squares" / f"pair {number}.png", "two, black, ink")
    for number in range(8):
        with Image.open(sources[40 + number]) as image:
            save(image.convert("L"), folder / "class" / f"{number}.png", "emoji")
    for number in range(4):
        with Image.open(sources[60 + number]) as image:
            save(image.convert("RGB"), folder / "held-out" / f"{number}.png", "ink emoji")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The attempt's folder of the run."""
    folder = tmp_path_factory.mktemp("all")
    write_sets(folder)
    config: dict[str, Any] = {
        "name": "all-options",
        "base": {"weights": str(ROOT / "assets" / "emoji-base")},
        "data": {
            "train": [
                {"folder": str(folder / "squares"), "repeats": 2, "prefix": "sks, "},
                {"folder": str(folder / "class"), "regularisation": True, "loss_weight": 0.5},
            ],
            "validation": str(folder / "held-out"),
            "shapes": 2,
            "flip": True,
            "masks": "alpha",
            "shuffle_captions": True,
            "keep_tokens": 1,
            "caption_dropout": 0.1,
        },
        "lora": {
            "rank": 4,
            "alpha": 2,
            "rank_stabilised": True,
            "targets": "attention",
            "text_encoder": True,
            "dropout": 0.1,
        },
        "optimizer": {"name": "prodigy", "ema_decay": 0.9, "warmup_steps": 2},
        "epochs": 1,
        "global_batch": 8,
        "micro_batch": 4,
        "noise_offset": 0.05,
        "zero_terminal_snr": True,
        "validate_every": 16,
        "patience": 9,
        "samples": {"prompts": PROMPTS, "every": 32, "steps": 2},
        "save_every": 3,
        "output": str(folder / "runs"),
        "cache": str(folder / "cache"),
        "registry": str(folder / "registry"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "--devices", "2", str(folder / "run.yaml")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all-options@1"
    (attempt,) = (folder / "runs").glob("all-options-*/attempt_1")
    return attempt


def events(run: Path, name: str) -> list[dict[str, Any]]:
    found = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event for event in found if event["event"] == name]


def test_the_plan_counts_sets_and_shapes(run: Path) -> None:
    """(12 + 4) × 2 samples and as many of the class; eight pairs fill a batch of their shape."""
    plan = json.loads((run / "plan.json").read_text())
    assert plan["examples"] == 24
    assert [count for *_, count in plan["shapes"]] == [56, 8]
    assert (plan["epoch_samples"], plan["repeated"], plan["steps"]) == (64, 0, 8)


def test_every_step_was_taken_and_each_shape_compiled_once(run: Path) -> None:
    steps = events(run, "step")
    assert [event["step"] for event in steps] == list(range(1, 9))
    assert not any(event["skipped"] for event in steps)
    assert np.isfinite([event["loss"] for event in steps]).all()
    assert len([event for event in events(run, "phase") if event["phase"] == "compiling"]) == 2


def test_pictures_were_drawn_at_the_start_on_the_way_and_at_the_end(run: Path) -> None:
    pictures = sorted((run.parent / "samples").iterdir())
    assert [path.name for path in pictures] == [f"step_{n:08d}.png" for n in (0, 4, 8)]
    for path in pictures:
        with Image.open(path) as image:
            assert image.size == (3 * 64, 64)
            assert [image.text[f"prompt {n}"] for n in range(3)] == PROMPTS


def test_the_best_by_validation_loss_is_published(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    losses = {event["step"]: event["loss"] for event in events(run, "validation")}
    assert list(losses) == [0, 2, 4, 6, 8]
    trained = {step: loss for step, loss in losses.items() if step}
    best = min(trained, key=lambda step: trained[step])
    assert result["published_step"] == best
    assert result["validation_loss"] == {"base": losses[0], "lora": losses[best]}
    for event in events(run, "validation"):
        assert np.mean(event["quarters"]) == pytest.approx(event["loss"])
    if best < 8:
        assert (run.parent / "checkpoints" / f"step_{best:08d}.safetensors").exists()


def test_every_adapter_of_both_networks_has_learned(run: Path) -> None:
    adapters = lora_files.read(run / "lora.safetensors").adapters
    assert {network: len(found) for network, found in adapters.items()} == {
        "unet": 32,
        "text_encoder": 18,
    }
    ups = [adapter.up for found in adapters.values() for adapter in found.values()]
    assert all(np.abs(up).max() > 0 for up in ups)
