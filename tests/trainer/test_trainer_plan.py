"""The plan of a run: batches, lengths, sizes, and the base's weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from trainer.config import ConfigError, RunConfig, load_config
from trainer.plan import batch_split, check_base, make_plan
from weights import base, files
from weights.files import WeightsError


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
    """Five images, and a base with one attention of 8 × 8."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(5):
        Image.new("RGB", (8, 8)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text("x")
    weight = np.zeros((8, 8), np.float16)
    tensors = {
        "unet": {
            "conv_in.weight": np.zeros((64, 4, 3, 3), np.float16),
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight": weight,
        },
        "vae": {"encoder.conv_in.weight": np.zeros((16, 3, 3, 3), np.float16)},
        "text_encoder": {
            "text_model.embeddings.token_embedding.weight": np.zeros((49408, 64), np.float16),
            "text_model.encoder.layers.0.self_attn.q_proj.weight": weight,
        },
    }
    for network, arrays in tensors.items():
        files.dump(tmp_path / "base" / base.NETWORK_FILES[network][0], arrays)
    values = {
        "name": "x",
        "base": {"model": "emoji", "weights": str(tmp_path / "base")},
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
    assert make_plan(config, 1).trained_parameters == 4 * (8 + 8)
    both = changed(config, lora={"text_encoder": True, "rank": 2})
    plan = make_plan(both, 1)
    assert plan.trained_parameters == 2 * 2 * (8 + 8)
    assert plan.synced_bytes == 4 * (plan.trained_parameters + 1)


def test_a_rank_larger_than_the_layer_is_refused(config: RunConfig) -> None:
    with pytest.raises(WeightsError, match=r"lora\.rank is 9, but .*to_q is only 8 × 8; use 8"):
        make_plan(changed(config, lora={"rank": 9}), 1)


def test_a_truncated_base_is_refused(config: RunConfig) -> None:
    file = base.network_file(config.base.weights, "vae")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="damaged or truncated"):
        check_base(config)


def test_an_altered_base_is_refused(config: RunConfig) -> None:
    folder = Path(config.base.weights)
    found = check_base(config)
    sums = "".join(f"{digest}  {name}\n" for name, digest in found.items())
    (folder / "SHA256SUMS").write_text(sums)
    assert check_base(config) == found
    file = base.network_file(folder, "unet")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsError, match="the file was altered, restore it"):
        check_base(config)


def test_a_missing_network_is_named(config: RunConfig) -> None:
    base.network_file(config.base.weights, "text_encoder").unlink()
    with pytest.raises(WeightsError, match="expected text_encoder/model"):
        check_base(config)


def test_the_weights_of_another_model_are_refused(config: RunConfig) -> None:
    with pytest.raises(WeightsError, match=r"\(320, 4, 3, 3\) as in sd15, found \(64, 4, 3, 3\)"):
        check_base(changed(config, base={"model": "sd15"}))
