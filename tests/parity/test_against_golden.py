"""Our numbers against those of diffusers, transformers, PEFT and PyTorch (golden.npz).

Theirs are in double precision and ours in single precision, so that a bound here is what single
precision costs. Compiling is what takes time, so one graph answers as many questions as it can,
and only one UNet is trained here; the others are among the slow tests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cases
import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.nn.utils import no_init_parameters
from mindspore.ops.primitive import constexpr

from diffusion import models, pipeline, schedule, winograd
from diffusion.config import TextEncoderConfig
from diffusion.layers import count_parameters
from diffusion.lora import inject, lora_parameters
from diffusion.models import compile_graphs, in_batches
from diffusion.solvers import dpm_solver_pp_2m, noise_levels
from diffusion.text_encoder import CLIPTextModel
from diffusion.unet import UNet2DConditionModel
from diffusion.vae import AutoencoderKL
from trainer.batches import Batch, noise_and_target
from trainer.config import OptimizerConfig
from trainer.data import Encode
from trainer.optimizer import AdamW, flatten
from trainer.step import DiffusionLoss, TrainStep
from weights import files
from weights.base import NETWORK_FILES, open_base
from weights.lora import adapter_size, merge, target_modules

GOLDEN = Path(__file__).parent / "golden.npz"
Golden = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def golden() -> Iterator[Golden]:
    """Theirs; ours take Winograd's convolutions wherever they can, worthwhile or not."""
    compile_graphs()
    with pytest.MonkeyPatch.context() as patch, np.load(GOLDEN) as file:
        patch.setattr(winograd, "worthwhile", constexpr(lambda *sizes: True, name="always"))
        yield dict(file)


def weights(network: nn.Cell) -> list[Parameter]:
    """The parameters, without what is made of them."""
    return [p for p in network.get_parameters() if not p.name.endswith(".transformed")]


def fill(network: nn.Cell) -> nn.Cell:
    """The network with the made-up weights."""
    made_up = {p.name: cases.weight(p.name, tuple(p.shape)) for p in weights(network)}
    models.set_weights(network, made_up.items(), "made up")
    return network.set_train(False)


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-5) -> None:
    """Largest difference relative to the largest value, of what is kept of an array."""
    ours = cases.sketch(ours)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def shapes(network: nn.Cell) -> dict[str, tuple[int, ...]]:
    return {p.name: tuple(p.shape) for p in weights(network)}


def arrays(network: nn.Cell) -> dict[str, np.ndarray]:
    """Copies: `asnumpy` shows the memory that the next step writes to."""
    return {p.name: p.asnumpy().copy() for p in weights(network)}


def add_adapters(network: nn.Cell, targets: str) -> list[Parameter]:
    """Made-up adapters in the network; their parameters in the order of their names."""
    inject(network, targets, cases.RANK, cases.ALPHA)
    models.transform_convolutions(fill(network))
    return sorted(lora_parameters(network), key=lambda parameter: parameter.name)


def merged(network: nn.Cell, targets: str) -> dict[str, np.ndarray]:
    """The tensors of an adapted network: made-up adapters in the weights, none beside them."""
    tensors = arrays(network)
    none = {name: np.zeros_like(t) for name, t in tensors.items() if "lora_up" in name}
    originals = {name: shape for name, shape in shapes(network).items() if "lora_" not in name}
    return tensors | none | merge(tensors, cases.adapters(originals, targets))


def unmerged(network: nn.Cell) -> dict[str, np.ndarray]:
    """The same without any adapter."""
    return {n: 0 * tensor if "lora_up" in n else tensor for n, tensor in arrays(network).items()}


def others(*names: str) -> list[Any]:
    """Cases whose graphs would make the ordinary tests too slow; each takes half a minute."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


# ---- the UNet, through the step that training takes


class Recorded(nn.Cell):
    """A network whose last output can be read after the step that contains it."""

    def __init__(self, network: nn.Cell, name: str, shape: tuple[int, ...]):
        super().__init__(auto_prefix=False)
        self.network = network
        zeros = Tensor(np.zeros(shape, np.float32))
        self.output = Parameter(zeros, name=name, requires_grad=False)

    def construct(self, *inputs: Tensor) -> Tensor:
        output = self.network(*inputs)
        ops.assign(self.output, output)
        return output


class Trial:
    """The training step on one of `cases.UNETS`, from the same weights each time."""

    def __init__(self, name: str):
        self.name = name
        self.unet = UNet2DConditionModel(cases.UNETS[name])
        self.parameters = add_adapters(self.unet, cases.TRAINED[name])
        self.networks = [self.unet]
        self.recorded = [Recorded(self.unet, "prediction", cases.LATENTS[name])]
        self.text = cases.array("context", 2, 77, cases.UNETS[name].cross_attention_dim)
        if name in cases.JOINT:
            self.add_text_encoder(cases.TEXT_ENCODERS[name])
        self.optimizer = adamw(self.parameters)
        loss = DiffusionLoss(*self.recorded, *[None] * (2 - len(self.recorded)))
        self.step = TrainStep(loss, self.optimizer, [], accumulation=1, world_size=1)

    def add_text_encoder(self, config: TextEncoderConfig) -> None:
        encoder = CLIPTextModel(config)
        self.parameters += add_adapters(encoder, "text_encoder")
        self.text = cases.token_ids(config.pad_token_id)
        self.networks.append(encoder)
        self.recorded.append(Recorded(encoder, "hidden", (*self.text.shape, config.hidden_size)))

    def batch(self, prediction_type: str) -> Batch:
        latents = cases.array("latents", *cases.LATENTS[self.name])
        noise = cases.array("noise", *cases.LATENTS[self.name])
        timesteps = cases.STEP_TIMESTEPS
        noisy, target = noise_and_target(latents, noise, timesteps, prediction_type)
        weights = schedule.min_snr_weights(timesteps, cases.GAMMA, prediction_type)
        weights = weights[:, None, None, None] * np.ones_like(target)
        return Batch(noisy, timesteps, self.text, target, weights)

    def run(self, prediction_type: str) -> dict[str, np.ndarray]:
        """A first step from the weights as they are: what it finds and what it changes.

        Afterwards the weights are the made-up ones.
        """
        for state in self.optimizer.states():
            state.set_data(Tensor(np.zeros(state.shape, np.float32)))
        before = vector(self.parameters)
        loss, norm = self.step([self.batch(prediction_type)], cases.ADAM["lr"]).asnumpy()[:2]
        # The first moment holds the gradient after clipping.
        clipped = self.optimizer.moment1.asnumpy() / (1 - cases.ADAM["betas"][0])
        change = vector(self.parameters) - before
        for network in self.networks:
            fill(network)
        return {
            "outputs": [recorded.output.asnumpy().copy() for recorded in self.recorded],
            "loss": loss,
            "norm": norm,
            "gradient": clipped * max(1, norm / cases.ADAM["max_norm"]),
            "change": change,
        }

    def outputs(self, *tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Of UNet and text encoder, with these tensors in them for once."""
        for network, replaced in zip(self.networks, tensors, strict=True):
            models.set_weights(network, replaced.items(), "a case")
        return self.run("epsilon")["outputs"]


def adamw(parameters: list[Parameter]) -> AdamW:
    options = cases.ADAM
    return AdamW(
        parameters,
        OptimizerConfig(
            betas=options["betas"],
            eps=options["eps"],
            weight_decay=options["weight_decay"],
            max_grad_norm=options["max_norm"],
        ),
    )


def vector(parameters: list[Parameter]) -> np.ndarray:
    return np.concatenate([parameter.asnumpy().ravel() for parameter in parameters])


def norms(gradient: np.ndarray, parameters: list[Parameter]) -> np.ndarray:
    """The norm of a gradient, tensor by tensor."""
    ends = np.cumsum([parameter.size for parameter in parameters])[:-1]
    return np.array([np.linalg.norm(part) for part in np.split(gradient, ends)])


@pytest.fixture(scope="module", params=["sd1", *others("sd2", "emoji")])
def trial(request: pytest.FixtureRequest, golden: Golden) -> Trial:
    return Trial(request.param)


def test_the_networks(golden: Golden, trial: Trial) -> None:
    outputs = trial.outputs(*map(unmerged, trial.networks))
    close(outputs[0], golden[f"unet_{trial.name}"])
    if trial.name in cases.JOINT:
        close(outputs[1], golden[f"text_{trial.name}"])


@pytest.mark.parametrize("targets", ["attention", "transformer"])
def test_the_unet_with_a_lora_in_its_weights(golden: Golden, trial: Trial, targets: str) -> None:
    encoder = map(unmerged, trial.networks[1:])
    outputs = trial.outputs(merged(trial.unet, targets), *encoder)
    close(outputs[0], golden[f"lora_{trial.name}_{targets}"])


@pytest.mark.parametrize("prediction_type", cases.PREDICTION_TYPES)
def test_a_training_step(golden: Golden, trial: Trial, prediction_type: str) -> None:
    """Output with the LoRA beside the weights, loss, gradient, and what AdamW changes."""
    ours = trial.run(prediction_type)
    close(ours["outputs"][0], golden[f"step_{trial.name}"])
    if trial.name in cases.JOINT:
        close(ours["outputs"][1], golden[f"lora_text_{trial.name}"])
    step = f"step_{trial.name}_{prediction_type}"
    for key in ("loss", "norm", "gradient", "change"):
        close(ours[key], golden[f"{step}_{key}"])
    # Tensor by tensor: the gradients of q and k are small beside those of v.
    tensors = norms(ours["gradient"], trial.parameters)
    np.testing.assert_allclose(tensors, golden[f"{step}_gradient_norms"], rtol=3e-5)


def test_the_unet_of_sd2(golden: Golden) -> None:
    """Linear projections, its own number of heads at each level, two layers a block.

    With the LoRA beside the weights, then without it, then in them.
    """
    unet = UNet2DConditionModel(cases.UNETS["sd2"])
    add_adapters(unet, "transformer")
    latents, noise = (cases.array(name, *cases.LATENTS["sd2"]) for name in ("latents", "noise"))
    noisy = schedule.add_noise(latents, noise, cases.STEP_TIMESTEPS)
    inputs = noisy, cases.STEP_TIMESTEPS, cases.array("context", 2, 77, cases.CONTEXT)
    close(unet(*map(Tensor, inputs)).asnumpy(), golden["lora_sd2_transformer"])
    expected = {"unet_sd2": unmerged(unet)}
    for targets in ("attention", "transformer"):
        expected[f"lora_sd2_{targets}"] = merged(unet, targets)
    for key, tensors in expected.items():
        models.set_weights(unet, tensors.items(), key)
        close(unet(*map(Tensor, inputs)).asnumpy(), golden[key])


# ---- the text encoder


class Objective(nn.Cell):
    """Mean squared error of a network, and its output."""

    def __init__(self, network: nn.Cell):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, target: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        output = self.network(*inputs)
        return ((output - target) ** 2).mean(), output


class WithGradient(nn.Cell):
    """Output and gradient of an objective."""

    def __init__(self, objective: Objective, parameters: list[Parameter]):
        super().__init__(auto_prefix=False)
        weights = ms.ParameterTuple(parameters)
        self.both = ops.value_and_grad(objective, None, weights, has_aux=True)

    def construct(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        (_, output), gradients = self.both(*inputs)
        return output, flatten(gradients)


@pytest.mark.parametrize("name", ["sd2", *others("sd1", "emoji")])
def test_the_text_encoder_with_and_without_a_lora(golden: Golden, name: str) -> None:
    """Last hidden states: of the base, with adapters in the weights and beside them."""
    config = cases.TEXT_ENCODERS[name]
    encoder = CLIPTextModel(config)
    parameters = add_adapters(encoder, "text_encoder")
    both = WithGradient(Objective(encoder), parameters)
    ids = cases.token_ids(config.pad_token_id)
    inputs = Tensor(cases.array("target", *ids.shape, config.hidden_size)), Tensor(ids)
    output, gradient = (found.asnumpy() for found in both(*inputs))
    close(output, golden[f"lora_text_{name}"])
    close(gradient, golden[f"lora_text_{name}_gradient"])
    found = norms(gradient, parameters)
    np.testing.assert_allclose(found, golden[f"lora_text_{name}_gradient_norms"], rtol=3e-5)

    with_none, with_all = unmerged(encoder), merged(encoder, "text_encoder")
    models.set_weights(encoder, with_none.items(), "base")
    close(both(*inputs)[0].asnumpy(), golden[f"text_{name}"])
    models.set_weights(encoder, with_all.items(), "merged")
    close(both(*inputs)[0].asnumpy(), golden[f"lora_text_{name}"])


# ---- the autoencoder, and the whole way


@pytest.fixture(scope="module")
def drawing(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Pipeline:
    """A pipeline over a folder of made-up weights, which are in full precision there."""
    folder = tmp_path_factory.mktemp("base")
    for name, file in NETWORK_FILES.items():
        files.dump(folder / file, arrays(fill(models.build(cases.EMOJI, name))), {})
    return pipeline.Pipeline.load(cases.EMOJI, open_base(folder))


@pytest.mark.parametrize("name", list(cases.VAES))
def test_the_autoencoder(golden: Golden, drawing: pipeline.Pipeline, name: str) -> None:
    """Mean and standard deviation of the latents, and pixels; one with attention, one without."""
    vae = drawing.vae
    if name != "emoji":
        vae = models.transform_convolutions(fill(AutoencoderKL(cases.VAES[name])))
    images, latents = cases.images_and_latents(name)
    moments = Encode(vae)(Tensor(images)).asnumpy()
    close(moments[:, :4], golden[f"vae_{name}_mean"])
    close(np.exp(moments[:, 4:] / 2), golden[f"vae_{name}_std"])
    close(in_batches(vae, latents, len(latents)), golden[f"vae_{name}_decoded"])


def test_pictures_from_prompts(golden: Golden, drawing: pipeline.Pipeline) -> None:
    """Tokenizer, text encoder, guidance, solver and decoder together; one level of 255."""
    settings = pipeline.Settings(steps=cases.STEPS, scale=cases.SCALE)
    for prediction_type in cases.PREDICTION_TYPES:
        drawing.config = cases.EMOJI.model_copy(update={"prediction_type": prediction_type})
        ours = drawing.text_to_image(cases.PROMPTS, cases.SEEDS, settings, cases.NEGATIVE)
        theirs = golden[f"pictures_{prediction_type}"]
        assert np.abs(cases.sketch(ours).astype(int) - theirs.astype(int)).max() <= 1
    alone = drawing.text_to_image(cases.PROMPTS[1:], cases.SEEDS[1:], settings, cases.NEGATIVE)
    np.testing.assert_array_equal(alone[0], ours[1])


def test_the_networks_of_emoji(golden: Golden, drawing: pipeline.Pipeline) -> None:
    """With the graphs that draw: text encoder and UNet, and both with a LoRA in their weights."""
    networks = {"unet": drawing.unet, "text_encoder": drawing.text_encoder}
    tensors = {name: arrays(network) for name, network in networks.items()}
    loras = {
        targets: {"unet": cases.adapters(shapes(drawing.unet), targets)}
        for targets in ("attention", "transformer")
    }
    text = {"text_encoder": cases.adapters(shapes(drawing.text_encoder), "text_encoder")}
    for adapters, unet, encoder in (
        ({}, "unet_emoji", "text_emoji"),
        (loras["attention"], "lora_emoji_attention", "text_emoji"),
        (loras["transformer"], "lora_emoji_transformer", "text_emoji"),
        ({**loras["transformer"], **text}, "step_emoji", "lora_text_emoji"),
    ):
        drawing.merge_loras([(adapters, 1.0)])
        hidden, prediction = predict(drawing)
        close(hidden, golden[encoder])
        close(prediction, golden[unet])
    drawing.merge_loras([])
    for name, network in networks.items():
        for parameter, array in arrays(network).items():
            np.testing.assert_array_equal(array, tensors[name][parameter])


def predict(drawing: pipeline.Pipeline) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states, and what the UNet makes of them."""
    ids = cases.token_ids(cases.EMOJI.text_encoder.pad_token_id)
    hidden = in_batches(drawing.text_encoder, ids, len(ids))
    latents, noise = (cases.array(name, *cases.LATENTS["emoji"]) for name in ("latents", "noise"))
    noisy = schedule.add_noise(latents, noise, cases.STEP_TIMESTEPS)
    timesteps = cases.STEP_TIMESTEPS.astype(np.float32)
    with models.evaluating(drawing.unet):
        prediction = drawing.unet(Tensor(noisy), Tensor(timesteps), Tensor(hidden))
    return hidden, prediction.asnumpy()


# ---- schedule, solver and optimizer


def test_noise_and_velocity(golden: Golden) -> None:
    latents, noise = cases.array("latents", 6, 4, 8, 8), cases.array("noise", 6, 4, 8, 8)
    close(schedule.add_noise(latents, noise, cases.TIMESTEPS), golden["add_noise"], 1e-6)
    close(schedule.velocity(latents, noise, cases.TIMESTEPS), golden["velocity"], 1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_at_every_timestep(golden: Golden, prediction_type: str) -> None:
    ours = schedule.min_snr_weights(np.arange(1000), cases.GAMMA, prediction_type)
    # Each weight by itself: the smallest are a hundred times smaller than the largest.
    np.testing.assert_allclose(ours, golden[f"min_snr_{prediction_type}"], rtol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", cases.SOLVER_STEPS)
def test_dpm_solver(golden: Golden, prediction_type: str, steps: int) -> None:
    def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
        root = np.sqrt(sigma**2 + 1)
        timestep = int(np.abs(schedule.SIGMAS - sigma).argmin())
        output = cases.toy_prediction(x / root, timestep)
        return (
            x - sigma * output
            if prediction_type == "epsilon"
            else x / root**2 - (sigma / root) * output
        )

    sigmas = noise_levels("dpm++2m", steps)
    x = cases.array("x", 2, 4, 8, 8).astype(np.float64) * np.sqrt(sigmas[0] ** 2 + 1)
    # The reference keeps its sigmas in single precision.
    found = dpm_solver_pp_2m(denoise, x, sigmas)
    close(found, golden[f"solver_{prediction_type}_{steps}"], 2e-6)


def test_adamw_with_clipping(golden: Golden) -> None:
    parameters = [
        Parameter(Tensor(cases.array("p1", 3, 4)), name="p1"),
        Parameter(Tensor(cases.array("p2", 5)), name="p2"),
    ]
    optimizer = adamw(parameters)
    decay = 0.5
    average = vector(parameters)
    for step in range(cases.ADAM_STEPS):
        parts = (cases.array(f"g1 {step}", 3, 4), cases.array(f"g2 {step}", 5))
        gradient = np.concatenate([part.ravel() for part in parts])
        scalars = (Tensor(s, ms.float32) for s in (cases.ADAM["lr"], decay))
        norm, *_ = optimizer(Tensor(gradient), *scalars).asnumpy()
        assert norm == pytest.approx(float(np.linalg.norm(gradient)), rel=1e-6)
        average = decay * average + (1 - decay) * vector(parameters)
    close(vector(parameters), golden["adam"], 1e-6)
    close(optimizer.average.asnumpy(), average, 1e-6)


# ---- full size: names and shapes


PUBLISHED = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd20": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
}
LORA_AT_RANK_4 = {"sd15": 797_184, "sd20": 829_952}
LAYERS = {"sd15": 12, "sd20": 23}


def unallocated(model: str, network: str) -> nn.Cell:
    with no_init_parameters():
        return models.build(cases.published(model), network)


@pytest.mark.parametrize("network", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("model", ["sd15", "sd20", "emoji"])
def test_names_and_sizes_are_the_published_ones(golden: Golden, model: str, network: str) -> None:
    """Parameter counts as published; names and shapes as in diffusers and transformers."""
    cell = unallocated(model, network)
    assert cases.digest(shapes(cell).items()) == golden[f"names_{network}_{model}"]
    if model in PUBLISHED:
        assert count_parameters(cell) == PUBLISHED[model][network]


@pytest.mark.parametrize("model", ["sd15", "sd20"])
def test_the_size_of_a_lora_is_the_published_one(model: str) -> None:
    unet = shapes(unallocated(model, "unet"))
    attention = [unet[f"{module}.weight"] for module in target_modules(unet, "attention")]
    assert sum(adapter_size(shape, 4) for shape in attention) == LORA_AT_RANK_4[model]
    assert len(target_modules(unet, "transformer")) == 192
    text = shapes(unallocated(model, "text_encoder"))
    assert len(target_modules(text, "text_encoder")) == 6 * LAYERS[model]


@pytest.mark.parametrize("name", ["sd21", "sd21-v"])
def test_the_other_models_have_the_networks_of_sd20(name: str) -> None:
    config, reference = cases.published(name), cases.published("sd20")
    unet = config.unet.model_copy(update={"upcast_attention": False})
    assert (unet, config.vae) == (reference.unet, reference.vae)
    assert config.text_encoder == reference.text_encoder
