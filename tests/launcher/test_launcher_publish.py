from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from launcher import evaluation
from launcher.errors import LaunchError, RunFailed
from launcher.job import Job, prepare, write
from launcher.publish import Result, finish, publish, read_result, unfinished
from launcher.request import Request
from launcher.run import launch
from launcher.words import published_text, result_text
from registry import facts
from registry.api import open_registry
from registry.evaluation import spec
from trainer.config import EvaluationConfig, RunConfig

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


SCORES = {
    "table": [["", "LoRA", "base"], ["KID", "0.1 (0 to 0.2)", "0.3"]],
    "cautions": ["few pictures"],
    "sheet": "somewhere/sheet.png",
    "scores": {"kid": {"value": 0.1, "lower": 0.0, "upper": 0.2}, "kid_base": 0.3},
    "evaluation": {"pictures": {"metrics": ["kid"], "steps": 20}},
}
"""What `lora-eval --json` may say."""


@pytest.fixture
def job(config: Path) -> Job:
    """A job whose LoRA is trained."""
    job = prepare(Request(config, device_target="CPU"), datetime(2025, 1, 2))
    write(job)
    module, matrix = "lora_unet_mid_block_attentions_0_proj_in", np.ones((2, 2), np.float32)
    tensors = {f"{module}.lora_down.weight": matrix, f"{module}.lora_up.weight": matrix}
    save_file(tensors, job.attempt / "lora.safetensors")
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
    page = drawn.with_name("tiny.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert 'class="state finished"' in page


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
    ):
        assert words in text
    text = published_text(job, SCORES, "tiny@1")
    for words in (
        "KID  0.1 (0 to 0.2)  0.3",
        "caution: few pictures",
        "see somewhere/sheet.png",
        f"published as tiny@1 in {job.config.registry}",
    ):
        assert words in text
    single = dataclasses.replace(RESULT, rank_digests=RESULT.rank_digests[:1])
    assert "ranks" not in result_text(job, single)


def test_scores_and_their_sheet_are_published(job: Job) -> None:
    """Evaluated before, as if the push had failed then."""
    sheet = job.attempt / "evaluation" / "sheet.png"
    sheet.parent.mkdir()
    Image.new("RGB", (8, 8), (9, 0, 0)).save(sheet)
    said = {**SCORES, "sheet": str(sheet)}
    (job.attempt / "evaluated.json").write_text(json.dumps(said))
    assert publish(job, RESULT) == "tiny@1"
    registry = open_registry(str(job.config.registry))
    manifest = registry.resolve("tiny")
    assert manifest.metrics["kid"] == 0.1
    assert manifest.metrics["validation_loss"] == 0.4
    assert manifest.intervals["kid"] == (0.0, 0.2)
    assert spec(manifest, "kid_base") == {"pictures.steps": 20}
    assert "validation.validation_images" in spec(manifest, "validation_loss")
    drawn = registry.pull("tiny", job.folder / "out", everything=True)
    with Image.open(drawn.with_name("tiny.preview.png")) as image:
        assert image.getpixel((0, 0)) == (9, 0, 0)


def test_what_is_evaluated_follows_from_the_config(job: Job) -> None:
    wanted = EvaluationConfig(steps=9, scale=2, clip="clip.safetensors")
    config = job.config.model_copy(update={"evaluation": wanted})
    given = evaluation.arguments(dataclasses.replace(job, config=config), "lora.safetensors")
    assert f"--lora={job.attempt / 'lora.safetensors'}" in given
    assert f"--real={job.attempt / 'real.json'}" in given
    assert f"--train={job.attempt / 'training.json'}" in given
    assert "--images-per-prompt=8" in given  # of two captions
    assert {"--steps=9", "--scale=2.0", "--clip=clip.safetensors", "--devices=0"} <= set(given)
    assert not any(word.startswith("--inception") for word in given)
    told = config.model_copy(update={"evaluation": EvaluationConfig(prompts="p.txt", real="r")})
    given = evaluation.arguments(dataclasses.replace(job, config=told), "lora.safetensors")
    assert {"--prompts=p.txt", "--real=r"} <= set(given)


def test_captions_become_prompts_without_emphasis_or_options() -> None:
    captions = ["a (big) fox --s 3", "#1", "a (big) fox --s 3", "third"]
    assert evaluation.prompts_of(captions, 2) == ["a \\(big\\) fox --s 3", "#1"]


@pytest.mark.parametrize(
    ("change", "images", "reason"),
    [
        ({"evaluation": None}, 40, "`evaluation` is null"),
        ({"train": "all"}, 40, "not with `train: all`"),
        ({"data": {"validation": None}}, 0, "there is no `data.validation`"),
        ({}, 1, "`data.validation` has 1 images"),
    ],
)
def test_why_nothing_is_evaluated(
    job: Job, change: dict[str, object], images: int, reason: str
) -> None:
    values = {**job.config.model_dump(), "evaluation": {}}
    values |= {k: {**values[k], **v} if isinstance(v, dict) else v for k, v in change.items()}
    problem = evaluation.problem(RunConfig.model_validate(values), images)
    assert problem is not None
    assert reason in problem


def test_an_evaluation_that_fails_keeps_the_lora_and_says_how_to_go_on(
    job: Job, capfd: pytest.CaptureFixture[str]
) -> None:
    """The LoRA of this test is none, which lora-eval says."""
    config = job.config.model_copy(update={"evaluation": EvaluationConfig()})
    job = dataclasses.replace(job, config=config)
    keep(job, RESULT)
    with pytest.raises(LaunchError, match=r"--resume .* and with --set evaluation=null leaves"):
        publish(job, RESULT)
    assert "error: " in capfd.readouterr().err
    assert unfinished(job.folder) == job.attempt
    launch(Request(None, ("evaluation=null",), device_target="CPU", resume=job.folder))
    assert capfd.readouterr().out == "tiny@1\n"
    assert unfinished(job.folder) is None


def test_missing_files_of_the_evaluation_are_found_before_training(
    config: Path, tmp_path: Path
) -> None:
    overrides = (f"evaluation={{clip: {tmp_path / 'clip.safetensors'}}}",)
    with pytest.raises(LaunchError, match=r"evaluation\.clip: there is no file"):
        prepare(Request(config, overrides, device_target="CPU"), datetime(2025, 1, 2))
