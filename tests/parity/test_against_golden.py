"""Our numbers against those of diffusers, transformers, PEFT and PyTorch (golden.npz)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cases
import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.nn.utils import no_init_parameters

from diffusion import models, pipeline, schedule
from diffusion.layers import count_parameters
from diffusion.lora import inject, lora_parameters
from diffusion.solvers import dpm_solver_pp_2m, linspace_sigmas
from diffusion.text_encoder import CLIPTextModel
from diffusion.unet import UNet2DConditionModel
from diffusion.vae import AutoencoderKL
from trainer.artifact import save_base
from trainer.data import Encode
from trainer.optimizer import FlatAdamW
from weights import kohya
from weights.lora import Adapter, merge, target_modules

GOLDEN = Path(__file__).parent / "golden.npz"


@pytest.fixture(scope="module")
def golden() -> Mapping[str, np.ndarray]:
    ms.set_context(mode=ms.GRAPH_MODE)
    return np.load(GOLDEN)


def filled(network: nn.Cell) -> nn.Cell:
    for parameter in network.get_parameters():
        parameter.set_data(Tensor(cases.weight(parameter.name, tuple(parameter.shape))))
    return network.set_train(False)


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-4) -> None:
    """Largest difference relative to the largest value."""
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


UNET_INPUTS = (
    cases.array("latents", 2, 4, 8, 8),
    np.array([3, 750], np.int32),
    cases.array("context", 2, 77, cases.CONTEXT),
)
TARGET = cases.array("target", 2, 4, 8, 8)


class Objective(nn.Cell):
    """Output and mean squared error of a UNet."""

    def __init__(self, unet: nn.Cell):
        super().__init__(auto_prefix=False)
        self.unet = unet

    def construct(
        self, latents: Tensor, timesteps: Tensor, context: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        output = self.unet(latents, timesteps, context)
        return ((output - target) ** 2).mean(), output


class WithGradient(nn.Cell):
    def __init__(self, objective: Objective, parameters: list[Parameter]):
        super().__init__(auto_prefix=False)
        weights = ms.ParameterTuple(parameters)
        self.both = ops.value_and_grad(objective, None, weights, has_aux=True)

    def construct(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        (_, output), gradients = self.both(*inputs)
        return (output, *gradients)


def made_up_adapters(unet: nn.Cell, targets: str) -> dict[str, Adapter]:
    shapes = {p.name: tuple(p.shape) for p in unet.get_parameters()}
    found = {}
    for module in target_modules(shapes, targets):
        out, *rest = shapes[f"{module}.weight"]
        ones = (1,) * (len(rest) - 1)
        down = cases.weight(f"{module}.lora_down.weight", (cases.RANK, *rest))
        up = cases.weight(f"{module}.lora_up.weight", (out, cases.RANK, *ones))
        found[module] = Adapter(down, up, cases.ALPHA)
    return found


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_unet_with_and_without_lora(golden: Mapping[str, np.ndarray], name: str) -> None:
    """Output of the base, of base and LoRA apart and merged, and the gradient of the LoRA."""
    unet = filled(UNet2DConditionModel(cases.UNETS[name]))
    inputs = [Tensor(array) for array in UNET_INPUTS]
    close(unet(*inputs).asnumpy(), golden[f"unet_{name}"])

    adapters = made_up_adapters(unet, "attention")
    tensors = {p.name: p.asnumpy() for p in unet.get_parameters()}
    models.set_weights(unet, merge(tensors, adapters), "merged")
    close(unet(*inputs).asnumpy(), golden[f"lora_{name}"])

    models.set_weights(unet, tensors, "base")
    assert inject(unet, "attention", cases.RANK, cases.ALPHA) == list(adapters)
    parameters = sorted(lora_parameters(unet), key=lambda parameter: parameter.name)
    for parameter in parameters:
        parameter.set_data(Tensor(cases.weight(parameter.name, tuple(parameter.shape))))
    output, *gradients = WithGradient(Objective(unet), parameters)(*inputs, Tensor(TARGET))
    close(output.asnumpy(), golden[f"lora_{name}"])
    ours = np.concatenate([gradient.asnumpy().ravel() for gradient in gradients])
    # Golden is double precision; PyTorch's own single precision is 2.3e-4 away from it here.
    close(ours, golden[f"lora_gradient_{name}"], 3e-4)


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_text_encoder(golden: Mapping[str, np.ndarray], name: str) -> None:
    config = cases.TEXT_ENCODERS[name]
    encoder = filled(CLIPTextModel(config))
    ids = cases.token_ids(config.pad_token_id)
    close(encoder(Tensor(ids)).asnumpy(), golden[f"text_{name}"])


def test_autoencoder(golden: Mapping[str, np.ndarray]) -> None:
    vae = filled(AutoencoderKL(cases.VAE))
    moments = Encode(vae)(Tensor(cases.array("images", 2, 3, 16, 16))).asnumpy()
    close(moments[:, :4], golden["vae_mean"])
    close(2 * np.log(moments[:, 4:]), golden["vae_logvar"])
    close(vae(Tensor(UNET_INPUTS[0])).asnumpy(), golden["vae_decoded"])


def test_pictures_from_prompts(golden: Mapping[str, np.ndarray], tmp_path: Path) -> None:
    """Tokenizer, text encoder, guidance, solver and decoder together; one level of 255."""
    networks = {name: filled(models.build(cases.MODEL, name)) for name in ("unet", "vae")}
    networks["text_encoder"] = filled(models.build(cases.MODEL, "text_encoder"))
    save_base(
        tmp_path,
        {name: {p.name: p.asnumpy() for p in n.get_parameters()} for name, n in networks.items()},
    )
    drawing = pipeline.Pipeline(cases.MODEL, tmp_path)
    for name, network in networks.items():  # in full precision: files hold float16
        arrays = {p.name: p.asnumpy() for p in network.get_parameters()}
        models.set_weights(getattr(drawing, name), arrays, name)
    settings = pipeline.Settings(steps=cases.STEPS, scale=cases.SCALE, negative="blurry")
    ours = drawing.text_to_image(cases.PROMPTS, [5, 6], settings)
    assert np.abs(ours.astype(int) - golden["pictures"].astype(int)).max() <= 1
    alone = drawing.text_to_image(cases.PROMPTS[1:], [6], settings)
    np.testing.assert_array_equal(alone[0], ours[1])


def test_noise_and_velocity(golden: Mapping[str, np.ndarray]) -> None:
    latents, noise = cases.array("latents", 6, 4, 8, 8), cases.array("noise", 6, 4, 8, 8)
    close(schedule.add_noise(latents, noise, cases.TIMESTEPS), golden["add_noise"])
    close(schedule.velocity(latents, noise, cases.TIMESTEPS), golden["velocity"])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", cases.SOLVER_STEPS)
def test_dpm_solver(golden: Mapping[str, np.ndarray], prediction_type: str, steps: int) -> None:
    def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
        root = np.sqrt(sigma**2 + 1)
        timestep = int(np.abs(schedule.SIGMAS - sigma).argmin())
        output = cases.toy_prediction(x / root, timestep)
        return (
            x - sigma * output
            if prediction_type == "epsilon"
            else x / root**2 - (sigma / root) * output
        )

    sigmas = linspace_sigmas(steps)
    x = cases.array("x", 2, 4, 8, 8).astype(np.float64) * np.sqrt(sigmas[0] ** 2 + 1)
    close(dpm_solver_pp_2m(denoise, x, sigmas), golden[f"solver_{prediction_type}_{steps}"], 1e-4)


def test_adamw_with_clipping(golden: Mapping[str, np.ndarray]) -> None:
    parameters = [
        Parameter(Tensor(cases.array("p1", 3, 4)), name="p1"),
        Parameter(Tensor(cases.array("p2", 5)), name="p2"),
    ]
    options = cases.ADAM
    optimizer = FlatAdamW(
        parameters, options["betas"], options["eps"], options["weight_decay"], options["max_norm"]
    )
    for step in range(cases.ADAM_STEPS):
        parts = (cases.array(f"g1 {step}", 3, 4), cases.array(f"g2 {step}", 5))
        gradient = np.concatenate([part.ravel() for part in parts])
        scalars = (options["lr"], *optimizer.corrections(step + 1), 0.0)
        norm = optimizer(Tensor(gradient), *(Tensor(s, ms.float32) for s in scalars))
        assert float(norm.asnumpy()) == pytest.approx(float(np.linalg.norm(gradient)), rel=1e-6)
    ours = np.concatenate([parameter.asnumpy().ravel() for parameter in parameters])
    close(ours, golden["adam"], 1e-6)
    close(optimizer.average.asnumpy(), golden["adam"], 1e-6)


PUBLISHED = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd20": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
}
LORA_AT_RANK_4 = {"sd15": 797_184, "sd20": 829_952}


@pytest.mark.parametrize("name", ["sd15", "sd20"])
def test_full_size_networks(golden: Mapping[str, np.ndarray], name: str) -> None:
    """Parameter counts as published; names and shapes as in diffusers and transformers."""
    config = cases.published(name)
    for network, short in (("unet", "unet"), ("text_encoder", "text"), ("vae", "vae")):
        with no_init_parameters():
            cell = models.build(config, network)
        assert count_parameters(cell) == PUBLISHED[name][network]
        shapes = [(p.name, tuple(p.shape)) for p in cell.get_parameters()]
        reference = "names_vae_sd15" if network == "vae" else f"names_{short}_{name}"
        assert cases.digest(shapes) == golden[reference]
        if network == "unet":
            modules = target_modules([n for n, _ in shapes], "attention")
            of = dict(shapes)
            size = sum(4 * sum(of[f"{module}.weight"][:2]) for module in modules)
            assert size == LORA_AT_RANK_4[name]
            assert len(target_modules([n for n, _ in shapes], "transformer")) == 192


@pytest.mark.parametrize("name", ["sd21", "sd21-v"])
def test_the_other_models_have_the_networks_of_sd20(name: str) -> None:
    config, reference = cases.published(name), cases.published("sd20")
    assert (config.unet, config.vae) == (reference.unet, reference.vae)
    assert config.text_encoder == reference.text_encoder


@pytest.mark.parametrize("targets", ["attention", "transformer"])
def test_a_kohya_file_gives_back_what_was_written(targets: str, tmp_path: Path) -> None:
    unet = UNet2DConditionModel(cases.UNETS["sd1"])
    adapters = made_up_adapters(unet, targets)
    path = tmp_path / "lora.safetensors"
    kohya.write(path, {"unet": adapters}, {"ss_network_dim": "2"})
    read = kohya.read(path, {"unet": list(adapters)})["unet"]
    assert read.keys() == adapters.keys()
    for module, adapter in adapters.items():
        np.testing.assert_array_equal(read[module].down, adapter.down)
        np.testing.assert_array_equal(read[module].up, adapter.up)
        assert read[module].alpha == cases.ALPHA
