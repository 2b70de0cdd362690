"""Stable Diffusion at its published size, with random weights: `make full-size`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TENSORS = {"sd15": 686 + 248 + 196, "sd21": 686 + 248 + 372}
LORA_MATRICES = 2 * 16 * 8
"""Down and up of q, k, v and out of two attentions in sixteen transformers."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", TENSORS)
def test_the_published_size_is_written_read_run_and_trained(model: str, tmp_path: Path) -> None:
    folder = tmp_path / model
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "rehearsal.py"), model, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=2))

    assert found["tensors"] == TENSORS[model]
    for layout, counts in found["counts"].items():
        assert (counts["read"], counts["left_over"]) == (TENSORS[model], 0), layout
        loading = found["measured"][f"load {layout}"]
        network = found["counts"]["diffusers"]["gb"]
        assert loading["peak_gb"] <= 1.3 * counts["gb"] + network + 0.5, layout
    assert found["differing"]["diffusers"] == found["differing"]["original"] == []
    # The ancestor keeps these in half precision.
    assert all("embedding" in name for name in found["differing"]["mindone"])

    outputs = found["outputs"]
    assert outputs["text encoder"][2:] == [1, 77, {"sd15": 768, "sd21": 1024}[model]]
    assert outputs["VAE decoder"][2:] == [1, 3, 512, 512]
    assert outputs["VAE encoder"][2:] == [1, 8, 64, 64]  # mean and deviation
    assert outputs["UNet"][2:] == [1, 4, 64, 64]
    for name, (mean, deviation, *_) in outputs.items():
        assert math.isfinite(mean) and deviation > 0, name
    assert outputs["moved"] == [LORA_MATRICES, LORA_MATRICES]
