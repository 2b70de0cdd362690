"""The plan of a run: batches, lengths, sizes, and the base's weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from diffusion.config import ModelConfigError
from trainer.config import ConfigError, RunConfig
from trainer.config_file import load_config
from trainer.plan import batch_split, make_plan, open_run_base
from weights.base import NETWORK_FILES, combined_digest
from weights.files import WeightsError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("global_batch", "devices", "most", "expected"),
    [
        (16, 1, 8, (8, 2)),
        (16, 2, 8, (8, 1)),
        (16, 8, 8, (2, 1)),
        (24, 2, 8, (6, 2)),
        (14, 2, 4, (1, 7)),
        (32, 1, 32, (32, 1)),
    ],
)
def test_the_global_batch_is_kept_on_any_number_of_devices(
    global_batch: int, devices: int, most: int, expected: tuple[int, int]
) -> None:
    micro, accumulation = batch_split(global_batch, devices, most)
    assert (micro, accumulation) == expected
    assert devices * micro * accumulation == global_batch


def test_a_batch_that_does_not_divide_names_what_would() -> None:
    with pytest.raises(ConfigError, match="numbers of devices: 1, 2, 3, 4, 6, 12"):
        batch_split(12, 8, 8)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Five images, and a copy of the small base."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(5):
        Image.new("RGB", (8, 8)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text("x")
    shutil.copytree(ROOT / "assets" / "emoji-base", tmp_path / "base")
    values = {
        "name": "x",
        "base": {"weights": str(tmp_path / "base")},
        "data": {"train": str(images)},
        "epochs": 3,
        "global_batch": 4,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return load_config(tmp_path / "run.yaml")


def changed(config: RunConfig, **sections: dict[str, object]) -> RunConfig:
    values = config.model_dump()
    for name, section in sections.items():
        values[name].update(section)
    return RunConfig.model_validate(values)


def test_the_length_is_a_whole_number_of_batches(config: RunConfig) -> None:
    plan = make_plan(config, 2)
    assert (plan.steps, plan.images, plan.examples) == (4, 16, 5)
    assert plan.epochs == pytest.approx(3.2)


def test_the_size_of_the_lora_is_known_before_a_network_is_built(config: RunConfig) -> None:
    """Four attentions of 128 that look at themselves and at a text of 64; three layers of text."""
    attention = 4 * (8 * (128 + 128) - 2 * (128 - 64))
    assert make_plan(config, 1).trained_parameters == 4 * attention
    both = changed(config, lora={"text_encoder": True, "rank": 2})
    text = 3 * (4 * (64 + 64) + 2 * (64 + 256))
    plan = make_plan(both, 1)
    assert plan.trained_parameters == 2 * (attention + text)
    assert plan.synced_bytes == 4 * (plan.trained_parameters + 1)


def test_a_rank_larger_than_the_layer_is_refused(config: RunConfig) -> None:
    with pytest.raises(
        WeightsError, match=r"lora\.rank is 65, but .*to_k is only 128 × 64; use 64"
    ):
        make_plan(changed(config, lora={"rank": 65}), 1)


def test_the_model_is_recognised(config: RunConfig) -> None:
    plan = make_plan(config, 1)
    assert (plan.model, plan.base) == (
        "emoji",
        "diffusers folder, Stable Diffusion of another size, float16",
    )


def test_a_truncated_base_is_refused(config: RunConfig) -> None:
    file = Path(config.base.weights, NETWORK_FILES["vae"])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="damaged or truncated"):
        make_plan(config, 1)


def test_an_altered_base_is_refused(config: RunConfig) -> None:
    folder = Path(config.base.weights)
    assert make_plan(config, 1).base_digest == combined_digest(open_run_base(config).digests())
    file = folder / NETWORK_FILES["unet"]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsError, match="the file was altered, restore it"):
        make_plan(config, 1)


def test_a_missing_network_is_named(config: RunConfig) -> None:
    Path(config.base.weights, NETWORK_FILES["text_encoder"]).unlink()
    with pytest.raises(WeightsError, match="expected text_encoder/model"):
        make_plan(config, 1)


def test_the_weights_of_another_model_are_refused(config: RunConfig) -> None:
    with pytest.raises(ModelConfigError, match=r"unet has block_out_channels \(64, 128, 128\)"):
        make_plan(changed(config, base={"model": "sd15"}), 1)
