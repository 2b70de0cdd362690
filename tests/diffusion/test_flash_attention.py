"""Attention by the fused operator, which there is on Atlas A2 devices alone.

What we give it and take from it is checked against its documentation, written out in operators that
there are on CPU; and that MindSpore takes our calls, forward and back, by compiling the UNet up to
where the device would come in.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from diffusion.attention import FlashAttention, MultiHead
from diffusion.models import compile_graphs

COMPILE = """
import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from diffusion.config import UNetConfig
from diffusion.lora import inject, lora_parameters
from diffusion.models import compile_graphs, recompute, store_as, use_flash_attention
from diffusion.unet import UNet2DConditionModel

compile_graphs()
ms.set_device("CPU")
unet = UNet2DConditionModel(
    UNetConfig(
        block_out_channels=(80, 96),
        cross_attention=(True, False),
        layers_per_block=1,
        attention_heads=(2, 2),
        cross_attention_dim=16,
        norm_num_groups=8,
    )
)
store_as(unet, ms.float16)
inject(unet, "attention", 2, 2.0)
FLASH

class Loss(nn.Cell):
    def __init__(self):
        super().__init__()
        self.unet = unet

    def construct(self, *inputs):
        return self.unet(*inputs).sum()

class Gradient(nn.Cell):
    def __init__(self):
        super().__init__()
        weights = ms.ParameterTuple(lora_parameters(unet))
        self.gradient = ops.value_and_grad(Loss(), None, weights)

    def construct(self, *inputs):
        return self.gradient(*inputs)

inputs = (
    Tensor(np.zeros((2, 4, 8, 8), np.float32)),
    Tensor(np.zeros(2, np.int32)),
    Tensor(np.zeros((2, 77, 16), np.float32)),
)
Gradient().compile(*inputs)
print("compiled")
"""


def documented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    scalar_value: float = 1.0,
    input_layout: str = "BSH",
) -> Tensor:
    """The formula of mindspore.ops.flash_attention_score, without mask, shift and dropout."""
    assert input_layout == "BSND"
    assert head_num == query.shape[2]
    assert query.shape[3] % 16 == 0
    query, key, value = (
        ops.transpose(query, (0, 2, 1, 3)),
        ops.transpose(key, (0, 2, 3, 1)),
        ops.transpose(value, (0, 2, 1, 3)),
    )
    found = ops.matmul(ops.softmax(scalar_value * ops.matmul(query, key)), value)
    return ops.transpose(found, (0, 2, 1, 3))


class Loss(nn.Cell):
    def __init__(self, attention: nn.Cell, weights: Tensor):
        super().__init__()
        self.attention = attention
        self.weights = weights

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.attention(q, k, v) * self.weights).sum()


@pytest.mark.parametrize("head_width", [40, 48])
def test_it_is_what_the_heads_apart_come_to(
    head_width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_graphs()
    monkeypatch.setattr(ops, "flash_attention_score", documented)
    draw = np.random.default_rng(0)
    width = 2 * head_width
    q, k, v, weights = (
        Tensor(draw.standard_normal((2, tokens, width)), ms.float32) for tokens in (9, 7, 7, 9)
    )
    fused, apart = FlashAttention(width, 2), MultiHead(width, 2)
    np.testing.assert_allclose(
        fused(q, k, v).asnumpy(), apart(q, k, v).asnumpy(), rtol=1e-5, atol=1e-6
    )
    gradients = [ms.grad(Loss(one, weights), (0, 1, 2))(q, k, v) for one in (fused, apart)]
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours.asnumpy(), theirs.asnumpy(), rtol=1e-4, atol=1e-5)
    assert math.isclose(fused.scale, head_width**-0.5)


@pytest.mark.parametrize("recomputed", ["", "recompute(unet)"])
def test_the_unet_and_its_gradient_compile_with_it(
    recomputed: str, tmp_path: Path, project_root: Path
) -> None:
    path = tmp_path / "compile.py"  # MindSpore reads the source of what it compiles
    path.write_text(COMPILE.replace("FLASH", f"use_flash_attention(unet)\n{recomputed}"))
    environment = {**os.environ, "MS_DEV_PRECOMPILE_ONLY": "1", "PYTHONPATH": str(project_root)}
    found = subprocess.run(
        [sys.executable, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.stdout.endswith("compiled\n"), found.stderr[-3000:]
