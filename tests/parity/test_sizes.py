"""Pictures of any multiple of the VAE's factor: the UNet on latents of odd height and width."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

BASE = Path(__file__).parents[2] / "assets" / "emoji-base"


@pytest.mark.parity
def test_latents_of_odd_sizes() -> None:
    import torch
    from diffusers import UNet2DConditionModel
    from mindspore import Tensor

    from diffusion import models
    from diffusion.config import recognise
    from diffusion.models import compile_graphs
    from weights.base import open_base

    compile_graphs()
    base = open_base(BASE)
    _, config = recognise(base)
    ours = models.load(config, base, "unet").set_train(False)
    theirs = UNet2DConditionModel.from_pretrained(BASE / "unet").double()
    draw = np.random.default_rng(0)
    for height, width in ((16, 16), (13, 18), (9, 11)):
        latents = draw.standard_normal((1, 4, height, width)).astype(np.float32)
        text = draw.standard_normal((1, 77, 64)).astype(np.float32)
        timesteps = np.array([500.0], np.float32)
        inputs = (latents, timesteps, text)
        found = ours(*map(Tensor, inputs)).asnumpy()
        with torch.no_grad():
            wanted = theirs(*(torch.tensor(one).double() for one in inputs)).sample.numpy()
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
