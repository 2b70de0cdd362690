"""What needs PyTorch beside our code: `make parity`."""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cases

from weights import lora_files
from weights.files import open_tensors

pytestmark = pytest.mark.parity
GOLDEN = Path(__file__).parent / "golden.npz"


def test_the_golden_file_is_what_the_peers_say() -> None:
    import make_golden

    made, kept = make_golden.golden(), np.load(GOLDEN)
    assert made.keys() == set(kept.files)
    for name, values in made.items():
        if values.dtype.kind == "U":
            assert values == kept[name], name
            continue
        difference = np.abs(values.astype(float) - kept[name].astype(float)).max()
        allowed = 1 if values.dtype == np.uint8 else 2e-7 * np.abs(kept[name]).max()
        assert difference <= allowed, name


def test_sinusoids_in_double_precision_are_those_of_diffusers() -> None:
    import make_golden
    import torch
    from diffusers.models.embeddings import Timesteps

    theirs = Timesteps(320, flip_sin_to_cos=True, downscale_freq_shift=0)
    timesteps = torch.arange(1000)
    difference = make_golden.Sinusoids(theirs)(timesteps) - theirs(timesteps)
    # Angles up to 1000 in single precision are off by as much.
    assert difference.abs().max() <= 2e-4


@pytest.mark.parametrize("targets", ["attention", "transformer"])
@pytest.mark.parametrize("name", list(cases.UNETS))
def test_diffusers_opens_our_lora(name: str, targets: str, tmp_path: Path) -> None:
    """A kohya file of ours in a diffusers pipeline gives the outputs that our networks give.

    Those of ours, merged and injected, are compared with the same golden values elsewhere.
    """
    import make_golden
    import torch
    from diffusers import StableDiffusionPipeline

    denoiser = make_golden.Denoiser(name)
    unet, config = denoiser.unet, cases.TEXT_ENCODERS[name]
    encoder = make_golden.filled(make_golden.text_encoder(config), make_golden.file_name)
    shapes = {
        "unet": {n: tuple(p.shape) for n, p in unet.named_parameters()},
        "text_encoder": {
            make_golden.file_name(n): tuple(p.shape) for n, p in encoder.named_parameters()
        },
    }
    path = tmp_path / "lora.safetensors"
    adapters = {
        "unet": cases.adapters(shapes["unet"], targets),
        "text_encoder": cases.adapters(shapes["text_encoder"], "text_encoder"),
    }
    lora_files.write_kohya(path, adapters, {"ss_network_dim": str(cases.RANK)})

    pipeline = StableDiffusionPipeline(
        vae=make_golden.vae(cases.VAES["sd"]),
        text_encoder=encoder,
        tokenizer=None,
        unet=unet,
        scheduler=make_golden.dpm("epsilon", 2),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(path)
    unet.double()  # the adapters come in single precision
    encoder.double()

    golden = np.load(GOLDEN)
    ids = torch.tensor(cases.token_ids(config.pad_token_id)).long()
    with torch.no_grad():
        outputs = {
            f"lora_{name}_{targets}": denoiser(),
            f"lora_text_{name}": encoder(ids).last_hidden_state,
        }
    for key, output in outputs.items():
        found, expected = cases.sketch(output.numpy()), golden[key]
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max(), key


def test_the_hash_of_a_lora_is_the_one_that_kohya_computes(tmp_path: Path) -> None:
    """`precalculate_safetensors_hashes` of sd-scripts: PyTorch's writer, `ss_*` keys alone."""
    import torch
    from safetensors.torch import save

    shapes = {f"mid_block.attentions.0.{name}.weight": (8, 8) for name in ("proj_in", "proj_out")}
    path = tmp_path / "lora.safetensors"
    adapters = {"unet": cases.adapters(shapes, "transformer")}
    lora_files.write_kohya(path, adapters, {"ss_v2": "False"})
    written = open_tensors(path)
    tensors = {name: torch.tensor(written.read(name)) for name in written.entries}
    file = io.BytesIO(save(tensors, {"ss_v2": "False"}))
    length = int.from_bytes(file.read(8), "little")
    file.seek(8 + length)
    assert written.metadata["sshs_model_hash"] == hashlib.sha256(file.read()).hexdigest()
