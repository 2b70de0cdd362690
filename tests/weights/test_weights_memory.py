"""Memory: a base costs no more than its networks, whatever the form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from tests.weights import made
from weights import structure

ROOT = Path(__file__).parents[2]

WIDE = made.Model(
    structure.UNet(4, 4, (32, 64, 64), (False, True, False), 1, 64, True),
    structure.VAE((16, 32), 1, 4, False),
    structure.TextEncoder(2000, 640, 2560, 8, 77),
)
"""Nearly all of it is the text encoder; no tensor is more than a few percent."""
CONFIG = {
    "prediction_type": "epsilon",
    "resolution": 64,
    "unet": asdict(WIDE.unet) | {"attention_heads": [4, 4, 4]},
    "vae": asdict(WIDE.vae) | {"norm_num_groups": 8, "scaling_factor": 1.0},
    "text_encoder": asdict(WIDE.text_encoder)
    | {"num_attention_heads": 4, "hidden_act": "gelu", "pad_token_id": 0},
}

MEASURE = """
import sys

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

import mindspore
from diffusion.config import ModelConfig
from diffusion.models import load
from weights.base import open_base

config = ModelConfig.model_validate_json(sys.argv[2])
before = status("VmHWM:")
base = open_base(sys.argv[1])
networks = [load(config, base, name) for name in base.networks]
sizes = [p.size for network in networks for p in network.get_parameters()]
print(status("VmHWM:") - before, 4 * sum(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("form", ["MindONE", "original", "diffusers"])
def test_loading_takes_little_more_than_the_networks(form: str, tmp_path: Path) -> None:
    found = {
        network: {name: np.full(shape, 0.01, np.float32) for name, shape in shapes.items()}
        for network, shapes in made.shapes(WIDE).items()
    }
    path = tmp_path / "base"
    if form == "MindONE":
        path.write_bytes(made.ckpt_bytes(made.mindone(WIDE, found)))
    elif form == "original":
        made.write_safetensors(path, made.original(WIDE, found))
    else:
        made.write_folder(path, found)
    files = [path] if path.is_file() else list(path.rglob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), json.dumps(CONFIG)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak, networks = map(int, done.stdout.split())
    print(f"{form}: {size / 1e6:.0f} MB, networks {networks / 1e6:.0f} MB, {peak / 1e6:.0f} MB")
    assert networks > 150e6
    assert peak <= 1.25 * networks
