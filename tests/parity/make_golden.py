"""Golden values from diffusers, transformers, PEFT and PyTorch.

    python tests/parity/make_golden.py tests/parity/golden.npz

Needs the extra `parity`; the tests that compare with the file do not.
"""

from __future__ import annotations

import sys
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
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from diffusion.tokenizer import Tokenizer, clip_vocabulary

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def unet(config: UNetConfig) -> UNet2DConditionModel:
    down = ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in config.cross_attention]
    return UNet2DConditionModel(
        block_out_channels=config.block_out_channels,
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.attention_heads,
        cross_attention_dim=config.cross_attention_dim,
        use_linear_projection=config.use_linear_projection,
        norm_num_groups=config.norm_num_groups,
    )


def vae(config: VAEConfig) -> AutoencoderKL:
    levels = len(config.block_out_channels)
    return AutoencoderKL(
        block_out_channels=config.block_out_channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
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


def networks() -> dict[str, np.ndarray]:
    found = {}
    latents = tensor(cases.array("latents", 2, 4, 8, 8))
    context = tensor(cases.array("context", 2, 77, cases.CONTEXT))
    target = tensor(cases.array("target", 2, 4, 8, 8))
    timesteps = torch.tensor([3, 750])
    for name, config in cases.UNETS.items():
        network = filled(unet(config))
        found[f"unet_{name}"] = numpy(network(latents, timesteps, context).sample)
        network.requires_grad_(False)
        network.add_adapter(
            LoraConfig(
                r=cases.RANK,
                lora_alpha=cases.ALPHA,
                target_modules=["to_q", "to_k", "to_v", "to_out.0"],
            )
        )
        gradients = {}
        for path, parameter in network.named_parameters():
            if parameter.requires_grad:
                path = path.replace("lora_A.default", "lora_down")
                path = path.replace("lora_B.default", "lora_up")
                value = cases.weight(path, tuple(parameter.shape))
                parameter.data = tensor(value)
                gradients[path] = parameter
        output = network(latents, timesteps, context).sample
        ((output - target) ** 2).mean().backward()
        found[f"lora_{name}"] = numpy(output)
        ordered = [numpy(gradients[path].grad).ravel() for path in sorted(gradients)]
        found[f"lora_gradient_{name}"] = np.concatenate(ordered)
    for name, config in cases.TEXT_ENCODERS.items():
        network = filled(text_encoder(config), file_name)
        ids = torch.tensor(cases.token_ids(config.pad_token_id)).long()
        found[f"text_{name}"] = numpy(network(ids).last_hidden_state)
    network = filled(vae(cases.VAE))
    moments = network.encode(tensor(cases.array("images", 2, 3, 16, 16))).latent_dist
    found["vae_mean"], found["vae_logvar"] = numpy(moments.mean), numpy(moments.logvar)
    found["vae_decoded"] = numpy(network.decode(latents).sample)
    return found


def schedule() -> dict[str, np.ndarray]:
    scheduler = DDPMScheduler(**SCHEDULE)
    latents = torch.tensor(cases.array("latents", 6, 4, 8, 8))
    noise = torch.tensor(cases.array("noise", 6, 4, 8, 8))
    timesteps = torch.tensor(cases.TIMESTEPS)
    return {
        "add_noise": numpy(scheduler.add_noise(latents, noise, timesteps)),
        "velocity": numpy(scheduler.get_velocity(latents, noise, timesteps)),
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


def adam() -> dict[str, np.ndarray]:
    parameters = [
        torch.nn.Parameter(torch.tensor(cases.array("p1", 3, 4))),
        torch.nn.Parameter(torch.tensor(cases.array("p2", 5))),
    ]
    options = {key: cases.ADAM[key] for key in ("lr", "betas", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW(parameters, **options)
    for step in range(cases.ADAM_STEPS):
        parameters[0].grad = torch.tensor(cases.array(f"g1 {step}", 3, 4))
        parameters[1].grad = torch.tensor(cases.array(f"g2 {step}", 5))
        torch.nn.utils.clip_grad_norm_(parameters, cases.ADAM["max_norm"])
        optimizer.step()
    return {"adam": np.concatenate([numpy(p).ravel() for p in parameters])}


def pictures() -> dict[str, np.ndarray]:
    """The whole way from prompts to pixels, with guidance and a negative prompt."""
    model = cases.MODEL
    encoder = filled(text_encoder(model.text_encoder), file_name)
    denoiser, decoder = filled(unet(model.unet)), filled(vae(model.vae))
    ids = Tokenizer(clip_vocabulary(), model.text_encoder.pad_token_id)([*cases.PROMPTS, "blurry"])
    with torch.no_grad():
        hidden = encoder(torch.tensor(ids).long()).last_hidden_state
        positive, negative = hidden[:2], hidden[[2, 2]]
        size = model.resolution // model.vae.factor
        x = tensor(
            np.stack(
                [
                    cases.generator(seed, "latents").standard_normal((4, size, size))
                    for seed in (5, 6)
                ]
            ).astype(np.float32)
        )
        scheduler = dpm(model.prediction_type, cases.STEPS)
        for timestep in scheduler.timesteps:
            with_text = denoiser(x, timestep, positive).sample
            without = denoiser(x, timestep, negative).sample
            output = without + cases.SCALE * (with_text - without)
            x = scheduler.step(output, timestep, x).prev_sample
        pixels = numpy(decoder.decode(x / model.vae.scaling_factor).sample)
    levels = ((np.clip(pixels, -1, 1) + 1) * 127.5).round().astype(np.uint8)
    return {"pictures": levels.transpose(0, 2, 3, 1)}


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
            found[f"names_text_{name}"] = shapes(text_encoder(model.text_encoder), file_name)
        found["names_vae_sd15"] = shapes(vae(models["sd15"].vae))
    return found


def golden() -> dict[str, np.ndarray]:
    """Everything that the tests compare with."""
    return {**networks(), **schedule(), **solvers(), **adam(), **pictures(), **names()}


if __name__ == "__main__":
    np.savez_compressed(sys.argv[1], **golden())
