"""LoRAs that adapt the convolutions too: what they take, and that files keep them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.weights import made
from weights import lora_files
from weights.files import WeightsError
from weights.lora import Adapter, adapter_size, check_rank, target_modules

SHAPES = {network: made.shapes("sd1")[network] for network in ("unet", "text_encoder")}
MODULES = target_modules(SHAPES["unet"], "convolution")
RANK = 2


def adapters() -> dict[str, dict[str, Adapter]]:
    rng = np.random.default_rng(0)
    found = {}
    for module in MODULES:
        out, *rest = SHAPES["unet"][f"{module}.weight"]
        down = rng.standard_normal((RANK, *rest), np.float32)
        up = rng.standard_normal((out, RANK, *(1 for _ in rest[1:])), np.float32)
        found[module] = Adapter(down, up, 3.0)
    return {"unet": found}


def test_the_modules_are_those_of_locon() -> None:
    """In Stable Diffusion 1.x: of 22 residual blocks and 6 samplers, beside 192 of transformers."""
    transformer = target_modules(SHAPES["unet"], "transformer")
    assert set(transformer) < set(MODULES)
    added = [module for module in MODULES if module not in transformer]
    kinds = [re.findall(r"\w+samplers\.0\.conv$|\w+$", module)[0] for module in added]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "conv1": 22,
        "time_emb_proj": 22,
        "conv2": 22,
        "conv_shortcut": 14,
        "downsamplers.0.conv": 3,
        "upsamplers.0.conv": 3,
    }
    rest = {n.removesuffix(".weight") for n in SHAPES["unet"] if n.endswith(".weight")}
    left = {module for module in rest - set(MODULES) if "norm" not in module}
    assert left == {
        "conv_in",
        "conv_out",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
    }
    assert target_modules(SHAPES["text_encoder"], "convolution") == []


def test_size_and_rank_count_the_kernel() -> None:
    assert adapter_size((320, 320, 3, 3), 4) == 4 * (320 + 320 * 9)
    check_rank("conv1", (320, 4, 3, 3), 36)
    with pytest.raises(WeightsError, match="320 × 36"):
        check_rank("conv1", (320, 4, 3, 3), 37)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_a_file_gives_them_back_as_they_were(format: str, tmp_path: Path) -> None:
    wanted = adapters()["unet"]
    lora_files.write(tmp_path / "a.safetensors", {"unet": wanted}, {}, format)
    found = lora_files.read(tmp_path / "a.safetensors").adapters["unet"]
    assert set(found) == set(wanted)
    for module, adapter in wanted.items():
        np.testing.assert_array_equal(found[module].down, adapter.down)
        np.testing.assert_array_equal(found[module].up, adapter.up)
        assert found[module].alpha == adapter.alpha


def test_mindone_has_no_place_for_them(tmp_path: Path) -> None:
    only = {m: a for m, a in adapters()["unet"].items() if ".resnets." in m}
    with pytest.raises(WeightsError, match="MindONE adapts the attention only"):
        lora_files.write(tmp_path / "a.ckpt", {"unet": only}, {}, "mindone")
    assert list(tmp_path.iterdir()) == []
