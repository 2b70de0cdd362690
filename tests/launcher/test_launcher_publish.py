from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from launcher.errors import RunFailed
from launcher.job import Job, prepare, write
from launcher.publish import Result, publish, read_result
from launcher.request import Request
from launcher.words import result_text
from registry.api import open_registry

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
    assert manifest.metadata["versions"] == {"numpy": "1.26.4"}


def test_without_validation_there_are_no_scores(job: Job) -> None:
    result = dataclasses.replace(RESULT, validation_loss=None)
    publish(job, result)
    assert open_registry(str(job.config.registry)).resolve("tiny").metrics == {}
    assert "validation loss" not in result_text(job, result, "tiny@1")


def test_without_a_registry_nothing_is_published(job: Job) -> None:
    config = job.config.model_copy(update={"registry": None})
    unpublished = dataclasses.replace(job, config=config)
    assert publish(unpublished, RESULT) is None
    assert "published" not in result_text(unpublished, RESULT, None)


def test_summary(job: Job) -> None:
    text = result_text(job, RESULT, "tiny@1")
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
    assert "ranks" not in result_text(job, single, None)
