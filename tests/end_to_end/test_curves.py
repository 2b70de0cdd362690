"""The same run on 1, 2 and 4 workers, accumulated, and killed ten times: takes minutes."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image, ImageDraw

from tests.end_to_end.test_main_job import Run, begin, difference, launch, newest_step, short_run
from weights import files

STEPS = 40
KILLS = 10
pytestmark = pytest.mark.slow

CASES = {
    "1 worker": (1, "micro_batch=16"),
    "2 workers": (2, "micro_batch=8"),
    "4 workers": (4, "micro_batch=4"),
    "1 worker, 4 x 4 accumulated": (1, "micro_batch=4"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return {
        name: launch(tmp_path_factory.mktemp("run"), devices, split, f"images={16 * STEPS}")
        for name, (devices, split) in CASES.items()
    }


def test_the_curves_lie_over_each_other(runs: dict[str, Run], project_root: Path) -> None:
    first = runs["1 worker"]
    for name, run in runs.items():
        curve = float(np.abs(run.losses / first.losses - 1).max())
        weights = difference(first, run)
        print(f"{name}: loss curve within {curve:.1e}, weights within {weights:.1e}")
        assert curve <= 1e-5
        assert weights <= 1e-4
    (project_root / "build").mkdir(exist_ok=True)
    draw(runs).save(project_root / "build" / "curves.png")


def draw(runs: dict[str, Run]) -> Image.Image:
    """All curves in one picture, each thinner than the one before, so that all can be seen."""
    image = Image.new("RGB", (640, 400), "white")
    pen = ImageDraw.Draw(image)
    colours = ["#c6dbef", "#fdae6b", "#31a354", "#000000"]
    everything = np.concatenate([run.losses for run in runs.values()])
    low, high = everything.min(), everything.max()
    for number, (name, run) in enumerate(runs.items()):
        heights = 370 - 340 * (run.losses - low) / (high - low)
        points = list(zip(np.linspace(20, 620, len(heights)), heights, strict=True))
        pen.line(points, colours[number], width=10 - 3 * number)
        pen.text((400, 10 + 14 * number), name, colours[number])
    return image


def test_ten_kills_at_random_moments_change_nothing(runs: dict[str, Run], tmp_path: Path) -> None:
    """Each time a worker is killed while it trains; a run without a checkpoint begins anew."""
    whole = runs["2 workers"]
    moments = random.Random(0)
    went_on_from = []
    for _ in range(KILLS):
        arguments = arguments_for(tmp_path)
        before = set(attempts(tmp_path))
        launcher = begin(*arguments)
        while launcher.poll() is None and not trains(set(attempts(tmp_path)) - before):
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 1.5))
        children = psutil.Process(launcher.pid).children(recursive=True)
        workers = [p for p in children if p.environ().get("MS_ROLE") == "MS_WORKER"]
        moments.choice(workers).kill()
        _, said = launcher.communicate()
        assert launcher.returncode == 1, said
        went_on_from.append(newest_step(run_of(tmp_path)))
    launcher = begin(*arguments_for(tmp_path))
    _, said = launcher.communicate()
    assert launcher.returncode == 0, said
    (lora,) = run_of(tmp_path).glob("attempt_*/lora.safetensors")
    assert files.sha256(lora) == files.sha256(whole.attempt / "lora.safetensors")
    print(f"{KILLS} kills, went on from steps {went_on_from}; the same file to the bit")


def run_of(folder: Path) -> Path:
    (run,) = folder.glob("emoji-ink-*")
    return run


def arguments_for(folder: Path) -> list[str]:
    """To go on with the run in a folder, or to begin it."""
    found = list(folder.glob("emoji-ink-*"))
    if found and newest_step(found[0]):
        return ["--devices", "2", "--resume", str(found[0])]
    for run in found:
        shutil.rmtree(run)
    return short_run(folder, 2, f"images={16 * STEPS}", "save_every=3")


def attempts(folder: Path) -> list[Path]:
    return list(folder.glob("emoji-ink-*/attempt_*"))


def trains(attempts: set[Path]) -> bool:
    """Has one of the attempts taken a step?"""
    logs = [attempt / "events.jsonl" for attempt in attempts]
    return any(log.exists() and '"event": "step"' in log.read_text() for log in logs)
