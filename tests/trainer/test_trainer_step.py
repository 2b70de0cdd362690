"""The compiled step: accumulation, dropout masks, loss scale, the wish to stop."""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from diffusion.config import UNetConfig
from diffusion.lora import inject, lora_masks, lora_parameters
from diffusion.models import compile_graphs
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
RANK = 2


@pytest.fixture(autouse=True, scope="module")
def graph_mode() -> None:
    compile_graphs()


def batch(count: int, modules: int, dropped: bool = False) -> Batch:
    draw = np.random.default_rng(1)
    masks = np.zeros if dropped else np.ones
    return Batch(
        noisy=draw.standard_normal((count, 4, 8, 8), np.float32),
        timesteps=draw.integers(1000, size=count).astype(np.int32),
        text=draw.standard_normal((count, 77, 16), np.float32),
        target=draw.standard_normal((count, 4, 8, 8), np.float32),
        weights=np.ones((count, 4, 8, 8), np.float32),
        masks=masks((modules, count, RANK), np.float32),
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


def prepared(size: int, accumulation: int, scaled: bool) -> TrainStep:
    """A step of a UNet with adapters, the same for every call."""
    unet = UNet2DConditionModel(UNET)
    for parameter in unet.get_parameters():
        draw = np.random.default_rng(len(parameter.name)).standard_normal(parameter.shape)
        parameter.set_data(ms.Tensor(0.2 * draw, ms.float32))
    inject(unet, "transformer", RANK, 4.0, seed=7, dropout_batch=size)
    optimizer = AdamW(lora_parameters(unet), OptimizerConfig(eps=1e-3))
    loss = DiffusionLoss(unet, None)
    return TrainStep(loss, optimizer, lora_masks(unet), accumulation, 1, scaled)


class Forward(nn.Cell):
    """A graph of its own around a network, compiled as the network is now."""

    def __init__(self, network: nn.Cell):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, *inputs: ms.Tensor) -> ms.Tensor:
        return self.network(*inputs)


def trained(step: TrainStep) -> np.ndarray:
    return step.optimizer.weights()


@pytest.fixture(scope="module")
def whole() -> TrainStep:
    """A step of four images with loss scaling."""
    return prepared(4, 1, scaled=True)


@pytest.mark.slow
def test_two_micro_batches_are_one_batch_of_twice_the_size_scaled_or_not(whole: TrainStep) -> None:
    halves = prepared(2, 2, scaled=False)
    full = batch(4, len(whole.masks))
    start = trained(whole)
    np.testing.assert_array_equal(start, trained(halves))
    for _ in range(3):
        one = outcome(whole([full], 1e-2))
        two = outcome(halves([part(full, slice(0, 2)), part(full, slice(2, 4))], 1e-2))
        assert (one.loss_scale, two.loss_scale) == (65536, 1)
        assert two.loss == pytest.approx(one.loss, rel=1e-5)
        assert two.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-5)
    np.testing.assert_allclose(trained(halves), trained(whole), atol=2e-6)
    assert np.abs(trained(whole) - start).max() > 1e-3


def test_with_every_component_dropped_there_is_no_gradient(whole: TrainStep) -> None:
    found = outcome(whole([batch(4, len(whole.masks), dropped=True)], 0.0))
    assert np.isfinite(found.loss)
    assert found.gradient_norm == 0
    assert found.applied
    assert not found.stop


def test_the_loss_scale_halves_at_overflow_and_doubles_after_a_long_time_without(
    whole: TrainStep,
) -> None:
    good = batch(4, len(whole.masks))
    whole.restore({**whole.vectors(), "scaling": np.array([65536, 7], np.float32)})
    before = whole.vectors()
    found = outcome(whole([replace(good, target=np.full_like(good.target, 1e30))], 1e-3))
    assert not found.applied
    after = whole.vectors()
    np.testing.assert_array_equal(after.pop("scaling"), [32768, 0])
    for name, vector in after.items():
        np.testing.assert_array_equal(vector, before[name], name)

    whole.restore({**after, "scaling": np.array([32768, GROW_AFTER - 1], np.float32)})
    assert outcome(whole([good], 1e-3)).applied
    np.testing.assert_array_equal(whole.vectors()["scaling"], [65536, 0])
    assert np.abs(trained(whole) - after["weights"]).max() > 0


def test_a_wish_to_stop_is_passed_on(whole: TrainStep) -> None:
    good = batch(4, len(whole.masks))
    assert outcome(whole([good], 1e-3, stop=True)).stop
    assert not outcome(whole([good], 1e-3)).stop


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
