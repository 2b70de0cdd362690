from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from launcher.errors import LaunchError, RunFailed
from launcher.job import Job, prepare, write
from launcher.publish import Result, finish, publish, read_result, unfinished
from launcher.request import Request
from launcher.run import launch
from launcher.words import published_text, result_text
from registry import facts
from registry.api import open_registry
from registry.evaluation import spec

RESULT = Result(
    artifact="lora.safetensors",
    validation_loss={"base": 0.5, "lora": 0.4},
    published_step=10,
    images=40,
    steps=10,
    skipped_steps=0,
    trained_parameters=32,
    synced_bytes=132,
    rank_digests=("ab" * 32, "ab" * 32),
    base_digest="cd" * 32,
    data_digest="ef" * 32,
    seconds={"training": 2.0, "total": 70.0},
    images_per_second=20.0,
    peak_memory_bytes=1_000_000_000,
    versions={"numpy": "1.26.4"},
)


@pytest.fixture
def job(config: Path) -> Job:
    """A job whose LoRA is trained."""
    job = prepare(Request(config, device_target="CPU"), datetime(2025, 1, 2))
    write(job)
    save_file({"down": np.ones((2, 2), np.float32)}, job.attempt / "lora.safetensors")
    return job


def keep(job: Job, result: Result) -> None:
    (job.attempt / "result.json").write_text(json.dumps(dataclasses.asdict(result)))


def test_result_is_read_back(job: Job) -> None:
    keep(job, RESULT)
    assert read_result(job.attempt) == RESULT


def test_different_weights_are_an_error(job: Job) -> None:
    keep(job, dataclasses.replace(RESULT, rank_digests=("ab" * 32, "ba" * 32)))
    with pytest.raises(RunFailed) as caught:
        read_result(job.attempt)
    assert "different weights (rank 0 abababababab…, rank 1 babababababa…)" in str(caught.value)
    assert caught.value.failure.exit_code == 1


def test_versions_count_up_and_carry_their_lineage(job: Job) -> None:
    assert publish(job, RESULT) == "tiny@1"
    assert publish(job, RESULT) == "tiny@2"
    manifest = open_registry(str(job.config.registry)).resolve("tiny")
    assert manifest.metrics == {"validation_loss": 0.4, "validation_loss_base": 0.5}
    assert manifest.metadata["data"] == {"digest": "ef" * 32, "examples": 4}
    assert manifest.metadata["versions"] == {"numpy": "1.26.4", "ascend-lora": "0.1.0"}
    assert manifest.metadata["devices"] == {"count": 1, "target": "CPU", "product": None}
    assert manifest.metadata["images"] == 40
    how = spec(manifest, "validation_loss")
    assert how["validation.validation_images"] == 2
    assert how["validation.validation_digest"] == job.data.validation.digest()
    assert spec(manifest, "kid") == {}


def test_what_is_known_of_it_is_published_too(job: Job, tmp_path: Path) -> None:
    config = job.config.model_copy(
        update={"trigger_words": ("ink", "brush"), "licence": "apache-2.0"}
    )
    for step in (5, 10, 15):
        picture = job.folder / "samples" / f"step_{step:08d}.png"
        picture.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (step, 0, 0)).save(picture)
    parent = {"reference": "ink@3", "sha256": "ab" * 32}
    assert publish(dataclasses.replace(job, config=config, parent=parent), RESULT) == "tiny@1"
    registry = open_registry(str(config.registry))
    manifest = registry.resolve("tiny")
    assert facts.words(manifest, "trigger_words") == ("ink", "brush")
    rows = dict(facts.rows(manifest))
    assert rows["licence"] == "apache-2.0"
    assert rows["training"] == "40 samples, 10 steps, 70 s, 1 × CPU"
    assert rows["parent"] == "ink@3, sha256 abababababababab…"
    assert rows["base's sha256"] == "cd" * 32
    drawn = registry.pull("tiny", tmp_path / "out", everything=True).with_name("tiny.preview.png")
    with Image.open(drawn) as image:
        assert image.getpixel((0, 0)) == (10, 0, 0)


def test_a_push_that_failed_is_made_by_resume(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    keep(job, RESULT)
    folder = Path(str(job.config.registry))
    stray = folder / "stray"
    folder.mkdir(parents=True, exist_ok=True)
    stray.write_text("")
    with pytest.raises(LaunchError, match=r"is not a registry.* it with lora-launch --resume"):
        publish(job, RESULT)
    stray.unlink()
    launch(Request(None, device_target="CPU", resume=job.folder))
    assert capsys.readouterr().out == "tiny@1\n"
    assert open_registry(str(folder)).versions("tiny") == [1]
    assert unfinished(job.folder) is None


def test_a_push_that_was_cut_off_is_not_made_twice(job: Job) -> None:
    assert publish(job, RESULT) == "tiny@1"
    (job.attempt / "published.json").unlink()  # as if ended just before
    assert unfinished(job.folder) == job.attempt
    assert finish(job.folder, job.attempt) == "tiny@1"
    assert open_registry(str(job.config.registry)).versions("tiny") == [1]


def test_without_validation_there_are_no_scores(job: Job) -> None:
    result = dataclasses.replace(RESULT, validation_loss=None)
    publish(job, result)
    assert open_registry(str(job.config.registry)).resolve("tiny").metrics == {}
    assert "validation loss" not in result_text(job, result)


def test_without_a_registry_nothing_is_published(job: Job) -> None:
    config = job.config.model_copy(update={"registry": None})
    unpublished = dataclasses.replace(job, config=config)
    assert publish(unpublished, RESULT) is None
    assert "published" not in published_text(unpublished, None, None)


def test_summary(job: Job) -> None:
    text = result_text(job, RESULT)
    for words in (
        "0.5000 → 0.4000 (-20.0%)",
        "1:10, of that training 0:02, 20 images/s",
        "equal on all 2 ranks",
        "132 bytes each step",
        "attempt_1/lora.safetensors",
        f"tiny@1 in {job.config.registry}",
    ):
        assert words in text
    single = dataclasses.replace(RESULT, rank_digests=RESULT.rank_digests[:1])
    assert "ranks" not in result_text(job, single)
