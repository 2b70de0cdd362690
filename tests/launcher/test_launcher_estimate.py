"""The estimate for Ascend: against the published figures, those it was made from and others."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cluster.errors import ClusterError
from diffusion import flops
from diffusion.config import load_model_config
from launcher import account, estimate
from launcher.cli import main
from launcher.estimate import Estimate
from launcher.job import Job, prepare
from launcher.request import Request


@pytest.fixture
def job(config: Path) -> Job:
    return prepare(Request(config, device_target="CPU"), datetime(2025, 1, 2))


def of(
    job: Job, devices: int = 8, product: str = "A2", servers: int = 1, **changes: Any
) -> Estimate:
    """SD 1.5 at 512 × 512 in half precision, four images on each device."""
    plan = {
        "model": "sd15",
        "precision": "fp16",
        "shapes": ((512, 512, 200),),
        "trained_parameters": 797_184,
        "micro_batch": 4,
        "accumulation": 1,
        "images": 32_000,
    }
    made = dataclasses.replace(job.plan, **{**plan, **changes})
    return estimate.estimate(job.config, made, product, devices, servers)


def test_operations_of_stable_diffusion() -> None:
    """A forward pass of SD 1.5 at 512 × 512 is known as 0.8 TFLOP."""
    found = flops.model(load_model_config("sd15"), (512, 512))
    assert found["unet"].total == pytest.approx(0.80e12, rel=0.01)
    assert found["vae"].total == pytest.approx(1.12e12, rel=0.01)


def test_another_model_comes_out_as_published(job: Job) -> None:
    """SD 2.0, whose figure the rate was not taken from; published with VAE and text encoder in each
    step, which caches spare."""
    published = 16.53 * estimate.CACHED_SPEEDUP
    assert of(job, 1, model="sd20").images_per_second == pytest.approx(published, rel=0.1)


def test_one_device_is_at_21_images_a_second(job: Job) -> None:
    assert of(job, 1).images_per_second == pytest.approx(21.4, rel=0.02)


def test_eight_devices_lose_what_the_published_ones_lose(job: Job) -> None:
    """MindONE's eight 910B are at 98.2 % of eight times one."""
    one, eight = of(job, 1), of(job, 8)
    assert one.allreduce_bytes == 0
    assert eight.allreduce_bytes == 4 * (797_184 + 2)
    assert eight.images_per_second / one.images_per_second / 8 == pytest.approx(0.98, abs=0.02)


def test_more_is_more(job: Job) -> None:
    base = of(job)
    assert of(job, 16).allreduce_seconds > base.allreduce_seconds
    assert of(job, precision="fp32").compute_seconds > base.compute_seconds
    assert of(job, shapes=((768, 768, 200),)).memory_bytes > base.memory_bytes
    assert of(job, micro_batch=8).memory_bytes > base.memory_bytes
    assert of(job, micro_batch=256).fits is False
    assert of(job, product="910A").hours > base.hours


def test_the_account_adds_up(job: Job) -> None:
    found = of(job)
    assert sum(found.account.values()) == pytest.approx(found.step_seconds)
    assert all(seconds > 0 for seconds in found.account.values())
    at_peak = ("convolutions", "linear layers", "attention")
    sd15 = load_model_config("sd15")
    operations = estimate.operations(job.config, job.plan, sd15, (512, 512))
    operations -= sum(
        account.adapter_operations(level, "attention", job.config.lora.rank)
        for level in flops.unet_levels(sd15.unet, 64, 64)
    )
    time_embedding = 0.001
    assert sum(found.account[kind] for kind in at_peak) == pytest.approx(
        4 * operations / account.PEAK["A2"], rel=time_embedding
    )


def test_the_account_says_what_flash_attention_would_spare(job: Job) -> None:
    flash = dataclasses.replace(
        job, config=job.config.model_copy(update={"flash_attention": True, "precision": "fp16"})
    )
    spared = of(job).account["attention's matrices"]
    assert spared > 0.03
    assert "attention's matrices" not in of(flash).account
    # It computes the scores once more, one product of the two of a forward pass.
    products = flops.unet(load_model_config("sd15").unet, 64, 64).attention
    added = 4 * products / 2 / estimate.RATES["A2"]
    assert of(flash).step_seconds == pytest.approx(of(job).step_seconds - spared + added)
    assert of(flash).memory_bytes < of(job).memory_bytes


def test_there_is_no_account_of_what_was_not_counted(job: Job) -> None:
    assert of(job, precision="fp32").account == {}
    encoding = dataclasses.replace(job, config=job.config.model_copy(update={"cache": None}))
    assert of(encoding).account == {}


def test_what_is_encoded_in_every_step_takes_time_and_memory(job: Job) -> None:
    encoding = dataclasses.replace(job, config=job.config.model_copy(update={"cache": None}))
    with_caches, without = of(job), of(encoding)
    costs = flops.model(load_model_config("sd15"), (512, 512))
    more = 4 * (costs["vae"].total + costs["text_encoder"].total) / estimate.RATES["A2"]
    assert without.compute_seconds == pytest.approx(with_caches.compute_seconds + more)
    # The VAE in float32, the text encoder in half precision.
    weights = 4 * 83_653_863 + 2 * 123_060_480
    assert without.parts["weights"] == with_caches.parts["weights"] + weights


def test_adapters_of_a_higher_rank_take_longer(job: Job) -> None:
    def with_rank(rank: int) -> Job:
        lora = job.config.lora.model_copy(update={"rank": rank})
        return dataclasses.replace(job, config=job.config.model_copy(update={"lora": lora}))

    found = [of(with_rank(rank)).compute_seconds for rank in (4, 64, 128)]
    assert found[0] < found[1] < found[2]
    assert found[2] - found[1] == pytest.approx(64 / 60 * (found[1] - found[0]))


def test_attention_in_float32_takes_more_of_all(job: Job) -> None:
    half, upcast = of(job, model="sd20"), of(job, model="sd21-v")
    assert upcast.account["attention"] == 4 * half.account["attention"]
    matrices = "attention's matrices"
    assert upcast.account[matrices] == 2 * half.account[matrices]
    assert upcast.parts["attention"] == 2 * half.parts["attention"]
    assert upcast.compute_seconds > half.compute_seconds


def test_a_910a_is_estimated_in_what_it_takes(job: Job) -> None:
    found = of(job, product="910A")
    assert (found.precision, found.account) == ("fp32", {})
    assert found.step_seconds > 3 * of(job).step_seconds


def test_devices_of_two_servers_are_further_apart(job: Job) -> None:
    plan = dataclasses.replace(job.plan, model="sd15", shapes=((512, 512, 200),), devices=8)
    (one,) = estimate.estimates(job.config, plan, "A2")
    (two,) = estimate.estimates(job.config, plan, "A2", servers=2)
    assert two.allreduce_seconds > one.allreduce_seconds
    assert estimate.estimates(job.config, plan, "A3") == []


def test_without_images_all_but_the_hours_is_known(job: Job) -> None:
    side = job.config.data.resolution or load_model_config("emoji").resolution
    with_images = dataclasses.replace(job.plan, shapes=((side, side, 4),))
    without = dataclasses.replace(job.plan, shapes=(), images=0)
    for known, found in zip(
        estimate.estimates(job.config, with_images),
        estimate.estimates(job.config, without),
        strict=True,
    ):
        assert found == dataclasses.replace(known, hours=None)
    assert "the images are not at hand: squares " in estimate.text([found])
    assert "not at hand" not in estimate.text([known])
    assert "nothing was published" in estimate.text([])


def test_an_estimate_is_in_the_precision_of_ascend_wherever_it_is_made(job: Job) -> None:
    assert (job.plan.device_target, job.plan.precision) == ("CPU", "fp32")
    assert [one.precision for one in estimate.estimates(job.config, job.plan)] == ["fp32", "fp16"]


def test_all_weights_are_estimated_too(job: Job) -> None:
    config = job.config.model_copy(update={"train": "all"})
    plan = dataclasses.replace(job.plan, model="sd15", trained_parameters=None, devices=8)
    (found,) = estimate.estimates(config, plan, "A2")
    # UNet and text encoder of SD 1.5, gradient, loss and stop in float32.
    assert found.allreduce_bytes == 4 * (859_520_964 + 123_060_480 + 2)
    assert found.precision == "fp32"


def test_a_small_network_is_said_to_take_longer(job: Job) -> None:
    (small,) = estimate.estimates(job.config, job.plan, "A2")
    large = of(job)
    assert (small.too_small, large.too_small) == (True, False)
    assert (small.compute_seconds, small.account) == (estimate.LEAST_SECONDS, {})
    assert "≥ 20 ms" in estimate.text([small])
    assert "≥" not in estimate.text([large])
    often = dataclasses.replace(job.plan, accumulation=100)
    (found,) = estimate.estimates(job.config, often, "A2")
    assert found.compute_seconds == 100 * estimate.LEAST_SECONDS


def test_what_flash_attention_would_change_is_said(job: Job) -> None:
    plan = dataclasses.replace(job.plan, model="sd15", shapes=((512, 512, 200),), micro_batch=4)
    (plain,) = estimate.estimates(job.config, plan, "A2")
    assert plain.fused is not None
    assert plain.fused.step_seconds < plain.step_seconds
    assert plain.fused.memory_bytes < plain.memory_bytes
    assert "with flash_attention=true: " in estimate.text([plain])
    config = job.config.model_copy(update={"flash_attention": True})
    assert estimate.estimates(config, plan, "A2") == [plain.fused]


def test_what_does_not_fit_comes_with_what_would_help(job: Job) -> None:
    assert "too much: a smaller micro_batch, " in estimate.text([of(job, micro_batch=256)])


def test_more_devices_than_a_server_has_are_several_servers(job: Job) -> None:
    assert of(job, 16).allreduce_seconds == of(job, 16, servers=1).allreduce_seconds
    assert of(job, 32).allreduce_seconds == of(job, 32, servers=2).allreduce_seconds


def test_adapters_of_more_layers_go_through_more_memory(job: Job) -> None:
    def adapters(targets: str) -> float:
        lora = job.config.lora.model_copy(update={"targets": targets})
        config = job.config.model_copy(update={"lora": lora})
        return of(dataclasses.replace(job, config=config)).account["adapters"]

    attention, transformer, convolution = map(adapters, ("attention", "transformer", "convolution"))
    # Eight layers of c to c; and two more, c to 8 c and 4 c to c.
    assert transformer / attention == pytest.approx((16 + 4 + 9 + 5) / 16)
    assert convolution > transformer


def test_probabilities_that_are_kept_are_counted(job: Job) -> None:
    again = job.config.model_copy(update={"gradient_checkpointing": True})
    # 8 heads of 4096 positions, to themselves and to 77 tokens, in half precision.
    largest = 2 * 4 * 8 * 4096 * (4096 + 77)
    kept, recomputed = of(job), of(dataclasses.replace(job, config=again))
    assert recomputed.parts["attention"] == 3 * largest
    assert kept.parts["attention"] > 7 * largest  # five such blocks, and two to work in


@pytest.mark.parametrize(("product", "devices"), [("A2", 8), ("A3", 16)])
def test_without_an_npu_a_usual_server_is_assumed(config: Path, product: str, devices: int) -> None:
    told = Request(config, ("global_batch=16",), None, "Ascend", product=product, dry_run=True)
    assert prepare(told, datetime(2025, 1, 2)).plan.devices == devices
    many = dataclasses.replace(told, devices="64")
    with pytest.raises(ClusterError, match=r"no NPU, and a server of 16 .*--nnodes for more"):
        prepare(many, datetime(2025, 1, 2))


def test_as_a_command(config: Path) -> None:
    run = CliRunner()
    words = ["--device-target", "CPU", "--dry-run", "--estimate", str(config)]
    found = run.invoke(main, words)
    assert found.exit_code == 0, found.stderr
    assert "this project had no NPU to measure on" in found.stdout
    values = json.loads(run.invoke(main, ["--json", *words]).stdout)["estimate"]
    assert [one["product"] for one in values] == ["910A", "A2"]
    one = ["--product", "a2", *words]
    (value,) = json.loads(run.invoke(main, ["--json", *one]).stdout)["estimate"]
    assert (value["product"], value["device_memory_bytes"]) == ("A2", 64e9)
    without = run.invoke(main, ["--estimate", str(config)])
    assert (without.exit_code, "needs --dry-run" in without.stderr) == (2, True)
