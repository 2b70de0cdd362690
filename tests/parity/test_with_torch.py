"""What can only be compared in one process with PyTorch: `make parity`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cases

pytestmark = pytest.mark.parity
GOLDEN = Path(__file__).parent / "golden.npz"


def test_the_golden_file_is_what_the_peers_say() -> None:
    import make_golden

    made, kept = make_golden.golden(), np.load(GOLDEN)
    assert made.keys() == set(kept.files)
    for name, values in made.items():
        if values.dtype.kind == "U":
            assert values == kept[name], name
        else:
            difference = np.abs(values.astype(float) - kept[name].astype(float)).max()
            assert difference <= 1e-5 * max(1.0, np.abs(kept[name]).max()), name


@pytest.mark.parametrize("targets", ["attention", "transformer"])
def test_diffusers_opens_our_lora(targets: str, tmp_path: Path) -> None:
    """A kohya file of ours, opened by diffusers, gives its UNet our merged output."""
    import make_golden
    import mindspore as ms
    import torch
    from diffusers import StableDiffusionPipeline
    from test_against_golden import UNET_INPUTS, filled, made_up_adapters

    from diffusion import models
    from diffusion.unet import UNet2DConditionModel
    from weights import kohya
    from weights.lora import merge

    ms.set_context(mode=ms.GRAPH_MODE)
    ours = filled(UNet2DConditionModel(cases.UNETS["sd1"]))
    adapters = made_up_adapters(ours, targets)
    path = tmp_path / "lora.safetensors"
    kohya.write(path, {"unet": adapters}, {"ss_network_dim": str(cases.RANK)})
    tensors = {p.name: p.asnumpy() for p in ours.get_parameters()}
    models.set_weights(ours, merge(tensors, adapters), "merged")
    expected = ours(*(ms.Tensor(array) for array in UNET_INPUTS)).asnumpy()

    theirs = make_golden.filled(make_golden.unet(cases.UNETS["sd1"]))
    state, alphas = StableDiffusionPipeline.lora_state_dict(path, unet_config=theirs.config)
    StableDiffusionPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=theirs)
    latents, timesteps, context = map(torch.tensor, UNET_INPUTS)
    theirs.float()
    with torch.no_grad():
        found = theirs(latents, timesteps, context).sample.numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
