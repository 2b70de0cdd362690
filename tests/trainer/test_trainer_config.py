"""The run config: what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trainer.config import ConfigError
from trainer.config_file import dump_config, load_config

CONFIG = {
    "name": "my-style",
    "base": {"model": "sd15", "weights": "base"},
    "data": {"train": "images"},
    "epochs": 10,
    "global_batch": 8,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    return file


def test_what_is_left_out_has_a_default_and_one_folder_is_a_list_of_one(path: Path) -> None:
    config = load_config(path)
    assert config.lora.rank == 4
    assert config.lora.scale == 1
    assert [one.folder for one in config.data.train] == ["images"]


def test_overrides_reach_into_sections_and_read_scientific_numbers(path: Path) -> None:
    config = load_config(path, ["lora.rank=16", "lora.alpha=8", "optimizer.learning_rate=1e-3"])
    assert config.lora.scale == 0.5
    assert config.optimizer.learning_rate == 1e-3


def test_a_rank_stabilised_scale_divides_by_the_root(path: Path) -> None:
    config = load_config(path, ["lora.rank=16", "lora.alpha=8", "lora.rank_stabilised=true"])
    assert config.lora.scale == 2


def test_a_dumped_config_reads_back_equal(path: Path) -> None:
    config = load_config(path, ["lora.text_encoder=true", "min_snr_gamma=null"])
    again = path.with_name("again.yaml")
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.rnk=4", "unknown key `lora.rnk`; did you mean `rank`?"),
        ("optimiser.eps=1", "unknown key `optimiser`; did you mean `optimizer`?"),
        ("lora.rank=0", "`lora.rank`: input should be greater than or equal to 1, found 0"),
        ("images=80", "give either `epochs` or `images`, and not both"),
        ("name=My Style", "`name`: string should match pattern"),
        ("name.first=x", "`name` is a value, not a section"),
        ("lora", "expected key=value, for example --set lora.rank=8"),
        ("data.train=null", "`data.train`"),
    ],
)
def test_a_bad_value_is_named_with_its_key(path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no such config file"),
        ("a: [1", "expected YAML, found a syntax error"),
        ("- 1", "expected `key: value` lines, found list"),
        ("name: x", "`base` is missing; add it"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert said in str(caught.value)
    assert str(file) in str(caught.value)
