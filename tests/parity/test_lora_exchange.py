"""LoRAs that cross over: trained here and drawn with diffusers, trained with PEFT and drawn here.

Both sides draw with the small base, the same starting latents, solver and guidance, in single
precision, as users do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion.config import load_model_config
from diffusion.randomness import generator
from diffusion.tokenizer import Tokenizer, clip_vocabulary
from weights import lora_files
from weights.base import open_base
from weights.lora import TARGETS, Adapter
from weights.structure import text_encoder_shapes, unet_shapes

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
BASE = ROOT / "assets" / "emoji-base"
MODEL = load_model_config("emoji")
PROMPTS = ("ink emoji of fox", "flat emoji of pizza", "ink emoji of penguin", "flat emoji of bus")
SEEDS = (0, 1, 2, 3)
STEPS, SCALE = 10, 3.0
LEVELS = 2
"""Of 255: how far apart two pictures of the same thing may be."""


def their_pipeline() -> Any:
    """The small base in diffusers."""
    from diffusers import (
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel

    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=MODEL.prediction_type,
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(BASE / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(BASE / "text_encoder").float(),
        tokenizer=None,
        unet=UNet2DConditionModel.from_pretrained(BASE / "unet"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def token_ids(texts: tuple[str, ...]) -> np.ndarray:
    return Tokenizer(clip_vocabulary(), MODEL.text_encoder.pad_token_id)(texts)


def their_pictures(lora: Path | None) -> np.ndarray:
    """What diffusers draws with a LoRA file: uint8 (n, height, width, 3)."""
    import torch

    pipeline = their_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    noise = np.stack([generator(s, "latents").standard_normal((4, 16, 16)) for s in SEEDS])
    with torch.no_grad():
        hidden = pipeline.text_encoder(torch.tensor(token_ids((*PROMPTS, "")))).last_hidden_state
        drawn = pipeline(
            prompt_embeds=hidden[:-1],
            negative_prompt_embeds=hidden[[-1] * len(PROMPTS)],
            latents=torch.tensor(noise, dtype=torch.float32),
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            output_type="np",
        )
    return (drawn.images * 255).round().astype(np.uint8)


def our_pictures(lora: Path | None) -> np.ndarray:
    """The same, drawn here."""
    from diffusion.pipeline import Pipeline, Settings

    pipeline = Pipeline.load(MODEL, open_base(BASE))
    if lora is not None:
        pipeline.merge_loras([(lora_files.read(lora).adapters, 1.0)])
    return pipeline.text_to_image(PROMPTS, SEEDS, Settings(steps=STEPS, scale=SCALE))


def apart(ours: np.ndarray, theirs: np.ndarray) -> int:
    """The largest difference of a pixel, in levels of 255."""
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max())


@pytest.fixture(scope="module")
def base_pictures() -> np.ndarray:
    return our_pictures(None)


@pytest.fixture(scope="module")
def trained_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A LoRA of UNet and text encoder after some steps of `lora-launch`."""
    folder = tmp_path_factory.mktemp("run")
    settings = (
        f"output={folder}",
        "registry=null",
        "epochs=null",
        "images=192",
        "data.validation=null",
        "validate_every=null",
        "lora.text_encoder=true",
        "lora.rank=4",
        "lora.alpha=6",
        "optimizer.learning_rate=3e-3",
    )
    options = [part for setting in settings for part in ("--set", setting)]
    arguments = ["--devices", "1", "--json", *options, "configs/runs/emoji-ink.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    yield Path(json.loads(done.stdout)["artifact"])


def test_the_base_is_the_same_on_both_sides(base_pictures: np.ndarray) -> None:
    assert apart(base_pictures, their_pictures(None)) <= LEVELS


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_diffusers_draws_what_we_draw(
    format: str, trained_here: Path, base_pictures: np.ndarray, tmp_path: Path
) -> None:
    file = tmp_path / f"{format}.safetensors"
    found = lora_files.read(trained_here)
    assert set(found.adapters) == {"unet", "text_encoder"}
    lora_files.write(file, found.adapters, found.metadata, format)
    ours = our_pictures(trained_here)
    assert apart(ours, base_pictures) > 50
    difference = apart(ours, their_pictures(file))
    print(f"{format}: largest difference {difference} of 255")
    assert difference <= LEVELS


@pytest.fixture(scope="module")
def trained_with_peft(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA of UNet and text encoder after some steps of PyTorch, as every tool there saves it."""
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_kohya,
    )
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    torch.manual_seed(0)
    pipeline = their_pipeline()
    unet, encoder = pipeline.unet, pipeline.text_encoder
    unet.requires_grad_(False)
    encoder.requires_grad_(False)
    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=attention))
    encoder.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "fc1"]))
    trained = [p for network in (unet, encoder) for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    ids = torch.tensor(token_ids(PROMPTS))
    for _ in range(12):
        latents, target = torch.randn(4, 4, 16, 16), torch.randn(4, 4, 16, 16)
        output = unet(latents, torch.randint(0, 1000, (4,)), encoder(ids)[0]).sample
        loss = ((output - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    folder = tmp_path_factory.mktemp("peft")
    states = {name: get_peft_model_state_dict(network)
              for name, network in (("unet", unet), ("text_encoder", encoder))}  # fmt: skip
    StableDiffusionPipeline.save_lora_weights(
        folder, states["unet"], states["text_encoder"], weight_name="peft.safetensors"
    )
    both = {f"{n}.{key}": value for n, state in states.items() for key, value in state.items()}
    save_file(convert_state_dict_to_diffusers(both), folder / "diffusers.safetensors")
    save_file(convert_state_dict_to_kohya(both), folder / "kohya.safetensors")
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("dialect", ["peft", "diffusers", "kohya"])
def test_we_draw_what_diffusers_draws(
    dialect: str, trained_with_peft: dict[str, Path], base_pictures: np.ndarray
) -> None:
    ours = our_pictures(trained_with_peft[dialect])
    assert apart(ours, base_pictures) > 50
    difference = apart(ours, their_pictures(trained_with_peft["peft"]))
    print(f"{dialect}: largest difference {difference} of 255")
    assert difference <= LEVELS


@pytest.mark.parametrize(("model", "layers"), [("sd15", 12), ("sd20", 23)], ids=["sd15", "sd20"])
def test_diffusers_takes_every_key_of_a_whole_kohya_file(
    model: str, layers: int, tmp_path: Path
) -> None:
    """192 modules of the UNet and six a layer of the text encoder, three tensors each."""
    from diffusers import StableDiffusionPipeline

    config = load_model_config(model)
    adapters: dict[str, dict[str, Adapter]] = {}
    for network, targets, shapes in (
        ("unet", "transformer", unet_shapes(config.unet)),
        ("text_encoder", "text_encoder", text_encoder_shapes(config.text_encoder)),
    ):
        adapters[network] = {}
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and TARGETS[targets].fullmatch(module):
                ones = (1,) * (len(shape) - 2)
                down, up = np.ones((1, *shape[1:])), np.ones((shape[0], 1, *ones))
                adapters[network][module] = Adapter(down, up, 1.0)
    file = tmp_path / "whole.safetensors"
    lora_files.write_kohya(file, adapters, {}, np.float16)
    assert lora_files.read(file).tensors == 3 * (192 + 6 * layers)

    state, alphas = StableDiffusionPipeline.lora_state_dict(file)
    assert len(state) == 2 * (192 + 6 * layers)
    assert len(alphas) == 192 + 6 * layers
