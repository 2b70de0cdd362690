"""The plan of a run: batches, lengths, sizes, and the base's weights."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from diffusion.config import ModelConfigError
from trainer.cache import write
from trainer.config import ConfigError, RunConfig
from trainer.config_file import load_config
from trainer.plan import batch_split, make_plan, open_run_base, run_cache
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
    plan, _ = make_plan(config, 2)
    assert (plan.steps, plan.images, plan.examples) == (4, 16, 5)
    assert plan.epochs == pytest.approx(3.2)


def test_the_size_of_the_lora_is_known_before_a_network_is_built(config: RunConfig) -> None:
    """Four attentions of 128 that look at themselves and at a text of 64; three layers of text."""
    attention = 4 * (8 * (128 + 128) - 2 * (128 - 64))
    assert make_plan(config, 1)[0].trained_parameters == 4 * attention
    both = changed(config, lora={"text_encoder": True, "rank": 2})
    text = 3 * (4 * (64 + 64) + 2 * (64 + 256))
    plan, _ = make_plan(both, 1)
    assert plan.trained_parameters == 2 * (attention + text)
    assert plan.synced_bytes == 4 * (plan.trained_parameters + 2)


def test_a_rank_larger_than_the_layer_is_refused(config: RunConfig) -> None:
    with pytest.raises(
        WeightsError, match=r"lora\.rank is 65, but .*to_k is only 128 × 64; use 64"
    ):
        make_plan(changed(config, lora={"rank": 65}), 1)


def test_the_model_is_recognised(config: RunConfig) -> None:
    plan, _ = make_plan(config, 1)
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
    assert make_plan(config, 1)[0].base_digest == combined_digest(open_run_base(config).digests())
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


@pytest.mark.parametrize(
    ("name", "examples", "parameters"),
    [("sd15-pokemon", 833, 797_184), ("sd20-chinese-art", 100, 829_952)],
)
def test_the_examples_of_the_ancestor_are_planned_without_weights_at_hand(
    name: str, examples: int, parameters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many images as its two sets have, in its form; the LoRA's size is the published one."""
    config = load_config(ROOT / "configs" / "runs" / f"{name}.yaml")
    monkeypatch.chdir(tmp_path)
    plan, _ = make_plan(config, 8, "Ascend", may_lack=True)
    assert plan.not_at_hand == (
        f"the weights {config.base.weights}",
        f"the images {config.data.train[0].folder}",
    )
    folder = Path(config.data.train[0].folder)
    folder.mkdir(parents=True)
    Image.new("RGB", (512, 512)).save(folder / "0.png")
    for number in range(1, examples):
        shutil.copy(folder / "0.png", folder / f"{number}.png")
    rows = [f"{number}.png,a picture" for number in range(examples)]
    (folder / "img_txt.csv").write_text("\n".join(["dir,text", *rows]))
    plan, _ = make_plan(config, 8, "Ascend", may_lack=True)
    assert plan.not_at_hand == (f"the weights {config.base.weights}",)
    assert plan.trained_parameters == parameters
    assert (plan.micro_batch, plan.accumulation, plan.precision) == (4, 1, "fp16")
    assert plan.examples == examples
    assert plan.images == -(-72 * examples // 32) * 32
    one, _ = make_plan(config, 1, "Ascend", may_lack=True)
    assert (one.steps, one.micro_batch, one.accumulation) == (plan.steps, 4, 8)
    with pytest.raises(WeightsError, match="there is no such base model"):
        make_plan(config, 8, "Ascend")


def test_what_is_cached_is_counted(config: RunConfig, tmp_path: Path) -> None:
    cached = config.model_copy(update={"cache": str(tmp_path / "cache")})
    plan, scan = make_plan(cached, 1)
    assert plan.cached == (0, 1)  # five images of the same bytes
    cache = run_cache(cached, plan)
    path = cache.latents_path(scan.training.examples[0])
    write(path, np.zeros((1, 8, 16, 16)))
    assert make_plan(cached, 1)[0].cached == (1, 1)
    # Another image, another shape, a mirrored one or another VAE is another entry.
    other = dataclasses.replace
    example = scan.training.examples[0]
    paths = {
        path,
        cache.latents_path(other(example, sha256="0" * 64)),
        cache.latents_path(other(example, shape=(80, 48))),
        other(cache, flip=True).latents_path(example),
        other(cache, masks="alpha").latents_path(example),
        other(cache, vae_key="0" * 64).latents_path(example),
    }
    assert len(paths) == 6
    assert other(cache, text_key="0" * 64).text_path("x") != cache.text_path("x")


def test_precision_follows_from_the_device(config: RunConfig) -> None:
    assert make_plan(config, 1, "CPU")[0].precision == "fp32"
    assert make_plan(config, 1, "Ascend")[0].precision == "fp16"
    with pytest.raises(ConfigError, match="bf16 is not possible on CPU"):
        make_plan(config.model_copy(update={"precision": "bf16"}), 1, "CPU")


def test_flash_attention_is_for_ascend_in_half_precision(config: RunConfig) -> None:
    flash = config.model_copy(update={"flash_attention": True})
    assert make_plan(flash, 1, "Ascend")[0].precision == "fp16"
    with pytest.raises(ConfigError, match="not on CPU in fp32; take it away"):
        make_plan(flash, 1, "CPU")
    with pytest.raises(ConfigError, match="not on Ascend in fp32"):
        make_plan(flash.model_copy(update={"precision": "fp32"}), 1, "Ascend")


def test_zero_terminal_snr_needs_a_model_that_predicts_v(config: RunConfig) -> None:
    asked = config.model_copy(update={"zero_terminal_snr": True})
    assert make_plan(asked, 1)[0].model == "emoji"
    lacking = asked.model_copy(
        update={"base": asked.base.model_copy(update={"model": "sd15", "weights": "nowhere"})}
    )
    with pytest.raises(ConfigError, match="sd15 predicts epsilon"):
        make_plan(lacking, 1, may_lack=True)
