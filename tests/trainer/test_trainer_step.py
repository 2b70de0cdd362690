"""The compiled step: accumulation, dropout masks and the text encoder's adapters."""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from diffusion.config import TextEncoderConfig, UNetConfig
from diffusion.lora import inject, lora_masks, lora_parameters
from diffusion.text_encoder import CLIPTextModel
from diffusion.unet import UNet2DConditionModel
from trainer.batches import Batch
from trainer.config import OptimizerConfig
from trainer.optimizer import AdamW
from trainer.step import GROW_AFTER, DiffusionLoss, TrainStep, outcome

UNET = UNetConfig(
    block_out_channels=(16,),
    cross_attention=(True,),
    layers_per_block=1,
    attention_heads=(2,),
    cross_attention_dim=16,
    norm_num_groups=8,
)
TEXT = TextEncoderConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    hidden_act="quick_gelu",
    pad_token_id=0,
)
RANK = 2


@pytest.fixture(autouse=True, scope="module")
def graph_mode() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)


def batch(count: int, modules: int, text: np.ndarray, dropped: bool = False) -> Batch:
    draw = np.random.default_rng(1)
    masks = np.ones((modules, count, RANK), np.float32)
    if dropped:
        masks[:] = 0
    return Batch(
        noisy=draw.standard_normal((count, 4, 8, 8), np.float32),
        timesteps=draw.integers(1000, size=count).astype(np.int32),
        text=text[:count],
        target=draw.standard_normal((count, 4, 8, 8), np.float32),
        weights=np.ones((count, 4, 8, 8), np.float32),
        masks=masks,
    )


def part(whole: Batch, rows: slice) -> Batch:
    return Batch(
        whole.noisy[rows],
        whole.timesteps[rows],
        whole.text[rows],
        whole.target[rows],
        whole.weights[rows],
        whole.masks[:, rows],
    )


def prepared(size: int, accumulation: int) -> tuple[TrainStep, list[nn.Cell]]:
    """A UNet and a text encoder with adapters, the same for every call."""
    ms.set_seed(0)
    networks = [UNet2DConditionModel(UNET), CLIPTextModel(TEXT)]
    for network, targets in zip(networks, ("transformer", "text_encoder"), strict=True):
        for parameter in network.get_parameters():
            draw = np.random.default_rng(len(parameter.name)).standard_normal(parameter.shape)
            parameter.set_data(ms.Tensor(0.2 * draw, ms.float32))
        inject(network, targets, RANK, 4.0, seed=7, dropout_batch=size)
    parameters = [p for network in networks for p in lora_parameters(network)]
    optimizer = AdamW(parameters, OptimizerConfig(eps=1e-3))
    masks = [mask for network in networks for mask in lora_masks(network)]
    step = TrainStep(DiffusionLoss(*networks), optimizer, masks, accumulation, world_size=1)
    return step, networks


class Forward(nn.Cell):
    """A graph of its own around a network, compiled as the network is now."""

    def __init__(self, network: nn.Cell):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, *inputs: ms.Tensor) -> ms.Tensor:
        return self.network(*inputs)


def trained(step: TrainStep) -> np.ndarray:
    return step.optimizer.weights()


def test_two_micro_batches_are_one_batch_of_twice_the_size_and_masks_work() -> None:
    ids = np.random.default_rng(2).integers(50, size=(4, 77)).astype(np.int32)
    whole, _ = prepared(4, 1)
    halves, _ = prepared(2, 2)
    modules = len(whole.masks)
    full = batch(4, modules, ids)
    start = trained(whole)
    np.testing.assert_array_equal(start, trained(halves))
    for _ in range(3):
        one = whole([full], 1e-2).asnumpy()
        two = halves([part(full, slice(0, 2)), part(full, slice(2, 4))], 1e-2).asnumpy()
        np.testing.assert_allclose(two, one, rtol=1e-5)
    np.testing.assert_allclose(trained(halves), trained(whole), atol=2e-6)
    assert np.abs(trained(whole) - start).max() > 1e-3

    # With every component dropped the adapters have no gradient at all.
    found = outcome(whole([batch(4, modules, ids, dropped=True)], 1e-2))
    assert np.isfinite(found.loss)
    assert found.gradient_norm == 0
    assert found.applied
    assert not found.stop


@pytest.fixture(scope="module")
def scaled() -> TrainStep:
    """A step with loss scaling, of the UNet alone."""
    ms.set_seed(0)
    unet = UNet2DConditionModel(UNET)
    inject(unet, "attention", RANK, 4.0, seed=7)
    optimizer = AdamW(lora_parameters(unet), OptimizerConfig(eps=1e-3))
    return TrainStep(DiffusionLoss(unet, None), optimizer, [], 1, 1, scaled=True)


def test_the_loss_scale_halves_at_overflow_and_doubles_after_a_long_time_without(
    scaled: TrainStep,
) -> None:
    text = np.random.default_rng(2).standard_normal((2, 77, 16), np.float32)
    good = replace(batch(2, 0, text), masks=None)
    first = outcome(scaled([good], 0.0))
    assert (first.loss_scale, first.applied) == (65536, True)
    # The gradient does not depend on the scale.
    scaled.scaling.set_data(ms.Tensor([4, 0], ms.float32))
    assert outcome(scaled([good], 0.0)).gradient_norm == pytest.approx(first.gradient_norm)
    scaled.scaling.set_data(ms.Tensor([65536, 0], ms.float32))

    before = scaled.vectors()
    found = outcome(scaled([replace(good, target=np.full_like(good.target, 1e30))], 1e-3))
    assert not found.applied
    after = scaled.vectors()
    np.testing.assert_array_equal(after.pop("scaling"), [32768, 0])
    for name, vector in after.items():
        np.testing.assert_array_equal(vector, before[name], name)

    scaled.restore({**after, "scaling": np.array([32768, GROW_AFTER - 1], np.float32)})
    assert outcome(scaled([good], 1e-3)).applied
    np.testing.assert_array_equal(scaled.vectors()["scaling"], [65536, 0])
    assert np.abs(trained(scaled) - after["weights"]).max() > 0


def test_a_wish_to_stop_is_passed_on(scaled: TrainStep) -> None:
    text = np.zeros((2, 77, 16), np.float32)
    good = replace(batch(2, 0, text), masks=None)
    assert outcome(scaled([good], 1e-3, stop=True)).stop
    assert not outcome(scaled([good], 1e-3)).stop


def test_a_fresh_adapter_changes_nothing_and_is_drawn_by_its_module() -> None:
    unet = UNet2DConditionModel(UNET)
    inputs = (
        ms.Tensor(np.ones((1, 4, 8, 8), np.float32)),
        ms.Tensor([5], ms.int32),
        ms.Tensor(np.ones((1, 77, 16), np.float32)),
    )
    before = Forward(unet)(*inputs).asnumpy()
    modules = inject(unet, "attention", RANK, 2.0, seed=1)
    names = {name.rsplit(".lora_", 1)[0] for name in (p.name for p in lora_parameters(unet))}
    assert names == set(modules)
    assert not any(p.requires_grad for p in unet.get_parameters() if "lora" not in p.name)
    again = UNet2DConditionModel(UNET)
    inject(again, "attention", RANK, 2.0, seed=1)
    for ours, theirs in zip(lora_parameters(unet), lora_parameters(again), strict=True):
        np.testing.assert_array_equal(ours.asnumpy(), theirs.asnumpy())
    np.testing.assert_array_equal(Forward(unet)(*inputs).asnumpy(), before)
