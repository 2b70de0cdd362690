"""Golden values from diffusers, transformers, PEFT and PyTorch.

    python tests/parity/make_golden.py tests/parity/golden.npz

Needs the extra `parity`; the tests that compare with the file do not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import cases
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import Timesteps
from diffusers.training_utils import compute_snr
from peft import LoraConfig, inject_adapter_in_model
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from diffusion.randomness import generator
from diffusion.tokenizer import Tokenizer, clip_vocabulary

TARGETS = {"attention": ["to_q", "to_k", "to_v", "to_out.0"]}
TARGETS["transformer"] = [*TARGETS["attention"], "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
TARGETS["text_encoder"] = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Sinusoids(torch.nn.Module):
    """Of a timestep, (n,) → (n, channels), as diffusers has them but in double precision.

    Diffusers keeps to single for these, whatever its networks are in, and `exp` and `sin` of two
    processors round so differently that the outputs do in the sixth digit.
    """

    def __init__(self, theirs: Timesteps):
        super().__init__()
        assert theirs.flip_sin_to_cos and theirs.scale == 1
        half = theirs.num_channels // 2
        powers = torch.arange(half).double() / (half - theirs.downscale_freq_shift)
        self.frequencies = torch.exp(-math.log(10_000) * powers)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        angles = timesteps[:, None].double() * self.frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


def unet(config: UNetConfig) -> UNet2DConditionModel:
    down = ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in config.cross_attention]
    network = UNet2DConditionModel(
        block_out_channels=config.block_out_channels,
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.attention_heads,
        cross_attention_dim=config.cross_attention_dim,
        use_linear_projection=config.use_linear_projection,
        norm_num_groups=config.norm_num_groups,
    )
    network.time_proj = Sinusoids(network.time_proj)
    return network


def vae(config: VAEConfig) -> AutoencoderKL:
    levels = len(config.block_out_channels)
    return AutoencoderKL(
        block_out_channels=config.block_out_channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=config.mid_block_attention,
    )


def text_encoder(config: TextEncoderConfig) -> CLIPTextModel:
    values = config.model_dump(exclude={"pad_token_id"})
    return CLIPTextModel(
        CLIPTextConfig(**values, bos_token_id=49406, eos_token_id=49407, pad_token_id=1)
    )


def file_name(name: str) -> str:
    """A text encoder's parameter as weight files spell it."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def filled(network: torch.nn.Module, rename: Any = str) -> torch.nn.Module:
    """The network with the made-up weights."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(torch.tensor(cases.weight(rename(name), tuple(parameter.shape))))
    return network.double().eval()


def tensor(array: np.ndarray) -> torch.Tensor:
    """Double precision, so that rounding is on one side of the comparison only."""
    return torch.tensor(array).double()


def numpy(values: torch.Tensor) -> np.ndarray:
    return values.detach().float().numpy()


Parameters = dict[str, torch.nn.Parameter]


def inject(network: torch.nn.Module, targets: str, rename: Any = str) -> Parameters:
    """The parameters of made-up adapters that PEFT puts into the network, by name."""
    network.requires_grad_(False)
    config = LoraConfig(r=cases.RANK, lora_alpha=cases.ALPHA, target_modules=TARGETS[targets])
    inject_adapter_in_model(config, network)
    adapters = {}
    for path, parameter in network.named_parameters():
        if parameter.requires_grad:
            path = path.replace("lora_A.default", "lora_down")
            path = rename(path.replace("lora_B.default", "lora_up"))
            parameter.data = tensor(cases.weight(path, tuple(parameter.shape)))
            adapters[path] = parameter
    return {path: adapters[path] for path in sorted(adapters)}


def gradient(name: str, parameters: Parameters) -> dict[str, np.ndarray]:
    """The gradient of all parameters in one vector, and its norm tensor by tensor."""
    parts = [numpy(parameter.grad).ravel() for parameter in parameters.values()]
    return {
        f"{name}_gradient": np.concatenate(parts),
        f"{name}_gradient_norms": np.array([np.linalg.norm(part) for part in parts]),
    }


def ddpm() -> DDPMScheduler:
    """The training schedule, its table in double precision too."""
    scheduler = DDPMScheduler(**SCHEDULE)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    return scheduler


def loss(
    prediction: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """As the training scripts of diffusers have it: min-SNR-weighted mean squared error."""
    timesteps = torch.tensor(cases.STEP_TIMESTEPS).long()
    snr = compute_snr(ddpm(), timesteps)
    weights = snr.clamp(max=cases.GAMMA)
    if prediction_type == "epsilon":
        target, weights = noise, weights / snr
    else:
        target, weights = ddpm().get_velocity(latents, noise, timesteps), weights / (snr + 1)
    error = torch.nn.functional.mse_loss(prediction, target, reduction="none")
    return (error.mean(dim=(1, 2, 3)) * weights).mean()


def update(name: str, parameters: Parameters) -> dict[str, np.ndarray]:
    """By how much AdamW with clipping changes the parameters, and the norm before clipping."""
    before = {path: parameter.detach().clone() for path, parameter in parameters.items()}
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), cases.ADAM["max_norm"])
    adamw(parameters.values()).step()
    changes = [numpy(p - before[path]).ravel() for path, p in parameters.items()]
    return {f"{name}_norm": numpy(norm), f"{name}_change": np.concatenate(changes)}


class Denoiser:
    """A UNet and what it reads, with the text encoder before it if that is trained too."""

    def __init__(self, name: str):
        self.name = name
        config = cases.UNETS[name]
        self.unet = filled(unet(config))
        self.encoder = None
        self.text = tensor(cases.array("context", 2, 77, config.cross_attention_dim))
        if name in cases.JOINT:
            self.encoder = filled(text_encoder(cases.TEXT_ENCODERS[name]), file_name)
            pad = cases.TEXT_ENCODERS[name].pad_token_id
            self.text = torch.tensor(cases.token_ids(pad)).long()
        self.latents = tensor(cases.array("latents", *cases.LATENTS[name]))
        self.noise = tensor(cases.array("noise", *cases.LATENTS[name]))
        self.timesteps = torch.tensor(cases.STEP_TIMESTEPS).long()

    def __call__(self) -> torch.Tensor:
        noisy = ddpm().add_noise(self.latents, self.noise, self.timesteps)
        text = self.text if self.encoder is None else self.encoder(self.text).last_hidden_state
        return self.unet(noisy, self.timesteps, text).sample


def training_steps(name: str) -> dict[str, np.ndarray]:
    """The first step of a LoRA: output, loss, gradient and update for each parametrisation."""
    found = {f"unet_{name}": numpy(Denoiser(name)())}
    for targets in ("attention", "transformer"):
        denoiser = Denoiser(name)
        inject(denoiser.unet, targets)
        found[f"lora_{name}_{targets}"] = numpy(denoiser())
    for prediction_type in cases.PREDICTION_TYPES:
        denoiser = Denoiser(name)
        parameters = inject(denoiser.unet, cases.TRAINED[name])
        if denoiser.encoder is not None:
            parameters |= inject(denoiser.encoder, "text_encoder", file_name)
        prediction = denoiser()
        found[f"step_{name}"] = numpy(prediction)
        value = loss(prediction, denoiser.latents, denoiser.noise, prediction_type)
        value.backward()
        step = f"step_{name}_{prediction_type}"
        found[f"{step}_loss"] = numpy(value)
        found |= gradient(step, parameters)
        found |= update(step, parameters)
    return found


def texts() -> dict[str, np.ndarray]:
    found = {}
    for name, config in cases.TEXT_ENCODERS.items():
        network = filled(text_encoder(config), file_name)
        ids = torch.tensor(cases.token_ids(config.pad_token_id)).long()
        found[f"text_{name}"] = numpy(network(ids).last_hidden_state)
        parameters = inject(network, "text_encoder", file_name)
        output = network(ids).last_hidden_state
        found[f"lora_text_{name}"] = numpy(output)
        target = tensor(cases.array("target", *output.shape))
        ((output - target) ** 2).mean().backward()
        found |= gradient(f"lora_text_{name}", parameters)
    return found


def autoencoders() -> dict[str, np.ndarray]:
    found = {}
    for name, config in cases.VAES.items():
        network = filled(vae(config))
        images, latents = (tensor(array) for array in cases.images_and_latents(name))
        moments = network.encode(images).latent_dist
        found[f"vae_{name}_mean"] = numpy(moments.mean)
        found[f"vae_{name}_std"] = numpy(moments.std)
        found[f"vae_{name}_decoded"] = numpy(network.decode(latents).sample)
    return found


def schedule() -> dict[str, np.ndarray]:
    scheduler = ddpm()
    latents = tensor(cases.array("latents", 6, 4, 8, 8))
    noise = tensor(cases.array("noise", 6, 4, 8, 8))
    timesteps = torch.tensor(cases.TIMESTEPS)
    snr = compute_snr(scheduler, torch.arange(1000))
    capped = snr.clamp(max=cases.GAMMA)
    return {
        "add_noise": numpy(scheduler.add_noise(latents, noise, timesteps)),
        "velocity": numpy(scheduler.get_velocity(latents, noise, timesteps)),
        "min_snr_epsilon": numpy(capped / snr),
        "min_snr_v_prediction": numpy(capped / (snr + 1)),
    }


def dpm(prediction_type: str, steps: int) -> DPMSolverMultistepScheduler:
    scheduler = DPMSolverMultistepScheduler(**SCHEDULE, prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    return scheduler


def solvers() -> dict[str, np.ndarray]:
    found = {}
    for prediction_type in ("epsilon", "v_prediction"):
        for steps in cases.SOLVER_STEPS:
            scheduler = dpm(prediction_type, steps)
            x = torch.tensor(cases.array("x", 2, 4, 8, 8)).double()
            for timestep in scheduler.timesteps:
                output = torch.tensor(cases.toy_prediction(x.numpy(), float(timestep)))
                x = scheduler.step(output, timestep, x).prev_sample
            found[f"solver_{prediction_type}_{steps}"] = numpy(x)
    return found


def adamw(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.AdamW:
    options = {key: cases.ADAM[key] for key in ("lr", "betas", "eps", "weight_decay")}
    return torch.optim.AdamW(parameters, **options)


def adam() -> dict[str, np.ndarray]:
    parameters = [
        torch.nn.Parameter(tensor(cases.array("p1", 3, 4))),
        torch.nn.Parameter(tensor(cases.array("p2", 5))),
    ]
    optimizer = adamw(parameters)
    for step in range(cases.ADAM_STEPS):
        parameters[0].grad = tensor(cases.array(f"g1 {step}", 3, 4))
        parameters[1].grad = tensor(cases.array(f"g2 {step}", 5))
        torch.nn.utils.clip_grad_norm_(parameters, cases.ADAM["max_norm"])
        optimizer.step()
    return {"adam": np.concatenate([numpy(p).ravel() for p in parameters])}


def pictures() -> dict[str, np.ndarray]:
    """The whole way from prompts to pixels, with guidance and a negative prompt."""
    model = cases.EMOJI
    encoder = filled(text_encoder(model.text_encoder), file_name)
    denoiser, decoder = filled(unet(model.unet)), filled(vae(model.vae))
    tokenizer = Tokenizer(clip_vocabulary(), model.text_encoder.pad_token_id)
    ids = tokenizer([*cases.PROMPTS, cases.NEGATIVE])
    size = model.resolution // model.vae.factor
    noise = [generator(s, "latents").standard_normal((4, size, size)) for s in cases.SEEDS]
    hidden = encoder(torch.tensor(ids).long()).last_hidden_state
    positive, negative = hidden[:2], hidden[[2, 2]]
    found = {}
    for prediction_type in cases.PREDICTION_TYPES:
        x = torch.tensor(np.stack(noise))
        scheduler = dpm(prediction_type, cases.STEPS)
        for timestep in scheduler.timesteps:
            with_text = denoiser(x, timestep, positive).sample
            without = denoiser(x, timestep, negative).sample
            output = without + cases.SCALE * (with_text - without)
            x = scheduler.step(output, timestep, x).prev_sample
        pixels = decoder.decode(x / model.vae.scaling_factor).sample
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
        found[f"pictures_{prediction_type}"] = levels.transpose(0, 2, 3, 1)
    return found


def names() -> dict[str, np.ndarray]:
    """Names and shapes of the published networks, which are built without memory."""
    found = {}

    def shapes(network: torch.nn.Module, rename: Any = str) -> np.ndarray:
        lines = [(rename(n), tuple(p.shape)) for n, p in network.named_parameters()]
        return np.array(cases.digest(lines))

    models: dict[str, ModelConfig] = {n: cases.published(n) for n in ("sd15", "sd20", "emoji")}
    with torch.device("meta"):
        for name, model in models.items():
            found[f"names_unet_{name}"] = shapes(unet(model.unet))
            found[f"names_vae_{name}"] = shapes(vae(model.vae))
            found[f"names_text_encoder_{name}"] = shapes(
                text_encoder(model.text_encoder), file_name
            )
    return found


@torch.no_grad()
def without_gradient() -> dict[str, np.ndarray]:
    return {**autoencoders(), **schedule(), **solvers(), **pictures(), **names()}


def golden() -> dict[str, np.ndarray]:
    """Everything that the tests compare with."""
    found = {**texts(), **adam(), **without_gradient()}
    for name in cases.UNETS:
        found |= training_steps(name)
    return {name: cases.sketch(values) for name, values in found.items()}


if __name__ == "__main__":
    np.savez_compressed(sys.argv[1], **golden())
