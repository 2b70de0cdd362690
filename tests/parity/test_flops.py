"""Counted operations against PyTorch's own counter on the published networks."""

from __future__ import annotations

import pytest

from diffusion import flops
from diffusion.config import load_model_config

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(
    ("name", "size"), [("emoji", (16, 16)), ("emoji", (15, 9)), ("sd15", (32, 32))]
)
def test_operations_are_those_of_the_published_networks(name: str, size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from tests.parity import make_golden

    model = load_model_config(name)

    def counted(call: object) -> int:
        # The fused attention of CPU is not counted by it.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as found:
            call()  # type: ignore[operator]
        return int(found.get_total_flops())

    unet, vae = make_golden.unet(model.unet), make_golden.vae(model.vae)
    encoder = make_golden.text_encoder(model.text_encoder)
    latents, text = torch.randn(1, 4, *size), torch.randn(1, 77, model.unet.cross_attention_dim)
    ids = torch.zeros(1, 77, dtype=torch.long)
    assert flops.unet(model.unet, *size).total == counted(
        lambda: unet(latents, torch.tensor([5]), text)
    )
    assert flops.vae_encoder(model.vae, 64, 64).total == counted(
        lambda: vae.encode(torch.randn(1, 3, 64, 64))
    )
    assert flops.text_encoder(model.text_encoder).total == counted(lambda: encoder(ids))
