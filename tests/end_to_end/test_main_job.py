"""The main job with the real parts: launcher, msrun, workers, registry and sampler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from weights import files

ROOT = Path(__file__).parents[2]
CONFIG = "configs/runs/emoji-ink.yaml"
STEPS = 8
pytestmark = pytest.mark.timeout(900)
"""A whole run and its scores are made in one fixture."""


@dataclass(frozen=True)
class Run:
    """What one `lora-launch` left."""

    registry: Path
    printed: dict[str, Any]
    attempt: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.attempt / "result.json").read_text())

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = (self.attempt / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == name]

    @property
    def losses(self) -> np.ndarray:
        return np.array([event["loss"] for event in self.events("step")])

    @property
    def lora(self) -> dict[str, np.ndarray]:
        return files.load(self.attempt / "lora.safetensors")


def command(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of the commands as a user would, in the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def short_run(folder: Path, devices: int, *overrides: str) -> list[str]:
    """Arguments of `lora-launch` for a short run of the demo's config."""
    settings = (
        f"output={folder}",
        f"registry={folder / 'registry'}",
        f"cache={folder.parent / 'cache'}",
        "epochs=null",
        "validate_every=null",
        "samples=null",
        "evaluation=null",
        f"images={STEPS * 16}",
        *overrides,
    )
    options = [part for setting in settings for part in ("--set", setting)]
    return ["--devices", str(devices), "--json", *options, CONFIG]


def launch(folder: Path, devices: int, *overrides: str) -> Run:
    """A short run that ends well."""
    done = command("launcher.cli", *short_run(folder, devices, *overrides))
    assert done.returncode == 0, done.stderr
    (attempt,) = folder.glob("emoji-ink-*/attempt_1")
    return Run(folder / "registry", json.loads(done.stdout), attempt)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two workers, eight images each, and scores."""
    folder = tmp_path_factory.mktemp("two")
    prompts = folder / "prompts.txt"
    prompts.write_text("ink emoji of fox\nink emoji of bus\nink emoji of pizza\n")
    settings = f"{{prompts: {prompts}, steps: 2, batch: 2}}"
    return launch(folder, 2, f"evaluation={settings}")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One worker with all sixteen images at once, and without caches."""
    return launch(tmp_path_factory.mktemp("one"), 1, "micro_batch=16", "cache=null")


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One worker, four times four images, whose activations are computed twice."""
    folder = tmp_path_factory.mktemp("accumulated")
    options = ("micro_batch=4", "gradient_checkpointing=true", "data.validation=null")
    return launch(folder, 1, *options)


def test_both_ranks_end_with_the_same_weights_to_the_bit(two: Run) -> None:
    first, second = two.result["rank_digests"]
    assert first == second


def test_only_the_lora_gradient_and_the_loss_are_all_reduced(two: Run) -> None:
    parameters = sum(
        tensor.size for name, tensor in two.lora.items() if not name.endswith(".alpha")
    )
    assert two.result["trained_parameters"] == parameters
    assert two.result["synced_bytes"] == 4 * (parameters + 2)


def same(one: Run, other: Run) -> None:
    """Loss curves within 1e-5, weights within 1e-4, relative."""
    assert len(one.losses) == len(other.losses) == STEPS
    np.testing.assert_allclose(other.losses, one.losses, rtol=1e-5)
    assert difference(one, other) <= 1e-4


def difference(one: Run, other: Run) -> float:
    """Norm of the difference of two LoRAs, relative to the first."""
    assert one.lora.keys() == other.lora.keys()
    apart = sum(float(((one.lora[k] - other.lora[k]) ** 2).sum()) for k in one.lora)
    return float(np.sqrt(apart / sum(float((one.lora[k] ** 2).sum()) for k in one.lora)))


def test_two_workers_with_caches_give_what_one_gives_without(one: Run, two: Run) -> None:
    same(one, two)
    assert not one.events("cache")
    assert [event["kind"] for event in two.events("cache")][-1] == "captions"


@pytest.mark.slow
def test_four_times_four_images_give_what_sixteen_give(one: Run, accumulated: Run) -> None:
    same(one, accumulated)


def test_the_loss_curve_is_the_committed_one(one: Run) -> None:
    """Made by this very run; a change of it is a change of what is computed."""
    curve = json.loads((Path(__file__).parent / "emoji_ink_losses.json").read_text())
    np.testing.assert_allclose(one.losses, curve["losses"], rtol=1e-4)
    np.testing.assert_allclose(
        [event["loss"] for event in one.events("validation")], curve["validation"], rtol=1e-4
    )


@pytest.mark.slow
def test_only_what_changed_is_encoded_and_a_lora_is_gone_on_from(two: Run, tmp_path: Path) -> None:
    images = tmp_path / "train"
    shutil.copytree(ROOT / "assets" / "emoji-ink" / "train", images)
    with Image.open(images / "ant.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(images / "ant.png")
    (images / "axe.txt").write_text("ink emoji of hatchet")
    cache = two.registry.parents[1] / "cache"
    options = ("images=16", "data.validation=null", "optimizer.learning_rate=1e-9")
    start = (f"registry={two.registry}", "lora.start=emoji-ink@1")
    run = launch(tmp_path, 2, f"data.train={images}", f"cache={cache}", *options, *start)
    filled = [(event["kind"], event["done"], event["total"]) for event in run.events("cache")]
    assert filled == [("images", 1, 1), ("captions", 1, 1)]
    assert difference(two, run) < 1e-3  # it went on from that version


def begin(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def newest_step(folder: Path) -> int:
    """The step of the last checkpoint in a run's folder, 0 without one."""
    steps = [int(path.stem[5:]) for path in folder.glob("checkpoints/step_*.safetensors")]
    return max(steps, default=0)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run, asked to end after a checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    launcher = begin(*short_run(folder, 2, "save_every=2"))
    while launcher.poll() is None and not any(map(newest_step, folder.glob("emoji-ink-*"))):
        time.sleep(0.02)
    launcher.terminate()
    _, said = launcher.communicate()
    assert launcher.returncode == 143, said
    (run,) = folder.glob("emoji-ink-*")
    assert f"saved after step {newest_step(run)} of {STEPS}" in said
    return run


@pytest.fixture(scope="module")
def killed(stopped: Path) -> Path:
    """The same, gone on with until a worker was killed after the next checkpoint."""
    before = newest_step(stopped)
    launcher = begin("--devices", "2", "--resume", str(stopped))
    while launcher.poll() is None and newest_step(stopped) == before:
        time.sleep(0.02)
    workers = [
        process
        for process in psutil.Process(launcher.pid).children(recursive=True)
        if process.environ().get("MS_ROLE") == "MS_WORKER"
    ]
    workers[-1].kill()
    _, said = launcher.communicate()
    assert launcher.returncode == 137
    assert "killed by signal 9" in said
    assert not (stopped / "attempt_2" / "result.json").exists()
    return stopped


def test_a_stopped_and_killed_run_goes_on_to_the_same_weights_to_the_bit(
    two: Run, killed: Path
) -> None:
    refused = command("launcher.cli", "--resume", str(killed), "--set", "lora.rank=4", "--dry-run")
    assert refused.returncode == 2
    assert "lora.rank was 16, is 4" in refused.stderr

    done = command("launcher.cli", "--devices", "2", "--resume", str(killed), "--json")
    assert done.returncode == 0, done.stderr
    assert "of which" in done.stderr
    resumed = Run(killed.parent / "registry", json.loads(done.stdout), killed / "attempt_3")
    assert 0 < len(resumed.losses) < STEPS
    np.testing.assert_array_equal(resumed.losses, two.losses[-len(resumed.losses) :])
    assert resumed.lora.keys() == two.lora.keys()
    for name, tensor in two.lora.items():
        np.testing.assert_array_equal(resumed.lora[name], tensor)
    assert resumed.result["validation_loss"] == two.result["validation_loss"]

    again = command("launcher.cli", "--resume", str(killed))
    assert again.returncode == 2
    assert "this run has ended" in again.stderr


def test_a_checkpoint_is_four_times_the_lora(killed: Path, two: Run) -> None:
    lora = (two.attempt / "lora.safetensors").stat().st_size
    checkpoints = sorted((killed / "checkpoints").iterdir())
    assert 1 <= len(checkpoints) <= 2
    for path in checkpoints:
        assert 3.5 * lora < path.stat().st_size < 4.5 * lora


def test_the_version_is_published_with_both_validation_losses(two: Run) -> None:
    shown = command(
        "registry.cli", "show", "emoji-ink@1", "--registry", str(two.registry), "--json"
    )
    assert shown.returncode == 0, shown.stderr
    manifest = json.loads(shown.stdout)
    assert manifest["metrics"]["validation_loss"] == two.result["validation_loss"]["lora"]
    assert manifest["metrics"]["validation_loss_base"] == two.result["validation_loss"]["base"]
    assert manifest["files"][0]["sha256"] == files.sha256(two.attempt / "lora.safetensors")


def test_the_sampler_draws_base_and_lora_and_again(two: Run, tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    arguments = ["--registry", str(two.registry), "--lora", "emoji-ink@1", "--steps", "2"]
    prompts = ["--prompt", "ink emoji of fox", "--prompt", "ink emoji of pizza"]
    words = [*arguments, *prompts, "--compare", "--seed", "3", "--out", str(out), "--json"]
    done = command("sampler.cli", *words)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    with Image.open(said["sheet"]) as sheet:
        assert np.asarray(sheet.convert("L")).std() > 10
    base, lora, _, _ = said["pictures"]
    assert base["loras"] == []
    assert lora["loras"][0]["reference"] == "emoji-ink@1"
    assert lora["loras"][0]["sha256"] == files.sha256(two.attempt / "lora.safetensors")
    drawn = Path(lora["file"])
    assert drawn.read_bytes() != Path(base["file"]).read_bytes()
    words = ["--again", str(drawn), "--registry", str(two.registry), "--out", str(again)]
    done = command("sampler.cli", *words)
    assert done.returncode == 0, done.stderr
    assert (again / drawn.name).read_bytes() == drawn.read_bytes()


def test_what_is_published_is_scored_beside_the_base(two: Run) -> None:
    """With as few pictures and steps nothing good, but everything that is to be said of it."""
    shown = command(
        "registry.cli", "show", "emoji-ink@1", "--registry", str(two.registry), "--json"
    )
    manifest = json.loads(shown.stdout)
    metrics, key = manifest["metrics"], "kid_efficientnet_lite0"
    assert {key, f"{key}_base", f"{key}_difference"} <= metrics.keys()
    assert metrics[f"{key}_difference"] == pytest.approx(metrics[key] - metrics[f"{key}_base"])
    lower, upper = manifest["intervals"][key]
    assert lower < metrics[key] < upper
    how = manifest["evaluation"][key]
    assert (how["pictures"], how["steps"], how["real"]["pictures"]) == (3, 2, 40)
    near = manifest["evaluation"]["nearest_efficientnet_lite0"]
    assert near["training"]["pictures"] == 200
    assert how["base_digest"] == two.result["base_digest"]
    assert metrics["validation_loss"] == two.result["validation_loss"]["lora"]
    assert any(file["path"].endswith("preview.png") for file in manifest["files"])
    assert any(file["path"] == "emoji-ink.html" for file in manifest["files"])
    drawn = sorted((two.attempt / "evaluation").glob("*/0*.png"))
    assert len(drawn) == 6


def test_steps_and_pictures_are_counted_for_a_scraper(two: Run) -> None:
    """In files of all processes, which the endpoint puts together."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(two.attempt / "metrics"))
    text = generate_latest(registry).decode()
    assert "lora_pictures_drawn_total 6.0" in text
    assert "lora_pictures_judged_total" in text
    for rank_id in (0, 1):
        labels = f'part="step",rank_id="{rank_id}",run="emoji-ink"'
        assert f"lora_step_seconds_count{{{labels}}} {STEPS - 1}.0" in text


def test_the_sampler_refuses_another_base(two: Run, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(ROOT / "assets" / "emoji-base", base)
    (base / "SHA256SUMS").unlink()
    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    arguments = ["--registry", str(two.registry), "--lora", "emoji-ink@1", "--base", str(base)]
    done = command("sampler.cli", *arguments, "--prompt", "x", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: emoji-ink@1 was trained on a base with digest")
    assert not (tmp_path / "out").exists()


def test_the_sampler_names_the_versions_that_exist(two: Run, tmp_path: Path) -> None:
    arguments = ["--registry", str(two.registry), "--lora", "emoji-ink@7", "--prompt", "x"]
    done = command("sampler.cli", *arguments, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "emoji-ink has no version 7" in done.stderr
    assert "Traceback" not in done.stderr
