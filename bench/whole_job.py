"""From a folder of images to a saved LoRA, beside diffusers' recipe (train_text_to_image_lora.py).

    python -m bench.whole_job [--size small quarter] [--epochs 30] [--rounds 1]

Both are commands that start, read the 200 images of the assets with their captions, train a LoRA of
rank 4 on the attention of the UNet in batches of 16, and save it. Small is the small base; quarter
has Stable Diffusion 1.5's whole VAE and text encoder and a quarter of its UNet's channels, with
random weights. The recipe is written here after diffusers' example: VAE and text encoder run in
every step, and accelerate holds the loop; only the tokenizer is ours. Ours begins with empty
caches; a second run finds them full.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import turns
from bench.training_step import model_of

BASE, IMAGES = turns.ROOT / "assets/emoji-base", turns.ROOT / "assets/emoji-ink/train"
BATCH, RANK, SIZE, RATE = 16, 4, 64, 1e-4


def make_base(folder: Path) -> None:
    """Random weights of the quarter in diffusers' layout, and its description beside them."""
    import yaml

    from tests.parity import make_golden

    config = model_of("quarter")
    make_golden.unet(config.unet).save_pretrained(folder / "unet")
    make_golden.vae(config.vae).save_pretrained(folder / "vae")
    make_golden.text_encoder(config.text_encoder).save_pretrained(folder / "text_encoder")
    (folder / "model.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))


def recipe(base: Path, epochs: int, out: Path) -> None:
    """diffusers' way."""
    import numpy as np
    import torch
    import torch.nn.functional as functional
    from accelerate import Accelerator
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from diffusers.optimization import get_scheduler
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from PIL import Image
    from transformers import CLIPTextModel

    from diffusion.tokenizer import Tokenizer, clip_vocabulary

    torch.set_num_threads(2)
    torch.manual_seed(0)
    accelerator = Accelerator()
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction" if base == BASE else "epsilon",
    )
    text_encoder = CLIPTextModel.from_pretrained(base / "text_encoder").float()
    text_encoder.requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(base / "vae").float().requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(base / "unet").float().requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets
    )
    unet.add_adapter(config)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=1e-2)
    tokenizer = Tokenizer(clip_vocabulary(), 49407)

    class Pictures(torch.utils.data.Dataset):
        paths = sorted(IMAGES.glob("*.png"))

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
            path = self.paths[row]
            with Image.open(path) as image:
                small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.asarray(small, np.float32) / 127.5 - 1).permute(2, 0, 1)
            ids = tokenizer([path.with_suffix(".txt").read_text().strip()])[0]
            return pixels, torch.from_numpy(ids).long()

    loader = torch.utils.data.DataLoader(Pictures(), batch_size=BATCH, shuffle=True)
    steps = epochs * len(loader)
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=steps)
    unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)
    for _ in range(epochs):
        unet.train()
        for pixels, ids in loader:
            with accelerator.accumulate(unet):
                latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, 1000, (len(latents),))
                noisy = scheduler.add_noise(latents, noise, timesteps)
                text = text_encoder(ids, return_dict=False)[0]
                target = noise
                if scheduler.config.prediction_type == "v_prediction":
                    target = scheduler.get_velocity(latents, noise, timesteps)
                predicted = unet(noisy, timesteps, text, return_dict=False)[0]
                loss = functional.mse_loss(predicted.float(), target.float(), reduction="mean")
                accelerator.gather(loss.repeat(BATCH)).mean().item()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=layers)


def seconds(command: list[str]) -> float:
    """How long a command takes, with the threads that both sides have."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONWARNINGS": "ignore"}
    begun = time.monotonic()
    subprocess.run(command, check=True, cwd=turns.ROOT, env=environment, capture_output=True)
    return time.monotonic() - begun


def ours(base: Path, folder: Path, epochs: int) -> Callable[[], float]:
    """lora-launch with one worker."""
    config = folder / "timed.yaml"
    named = "emoji" if base == BASE else base / "model.yaml"
    config.write_text(f"""
name: timed
base: {{weights: {base}, model: {named}}}
data: {{train: {IMAGES}, resolution: {SIZE}}}
lora: {{rank: {RANK}}}
optimizer: {{learning_rate: {RATE}}}
global_batch: {BATCH}
min_snr_gamma: null
evaluation: null
""")

    def run() -> float:
        settings = (f"output={folder / 'runs'}", f"cache={folder / 'cache'}", f"epochs={epochs}")
        words = [part for setting in settings for part in ("--set", setting)]
        launch = [sys.executable, "-m", "launcher.cli", "--devices", "1", *words]
        return seconds([*launch, str(config)])

    return run


def compare(size: str, epochs: int, rounds: int) -> list[turns.Figure]:
    """Seconds of the whole job, with empty and with full caches."""
    times: dict[str, list[float]] = {"cold": [], "warm": [], "diffusers": []}
    with tempfile.TemporaryDirectory() as name:
        folder, base = Path(name), BASE
        if size == "quarter":
            base = folder / "base"
            make_base(base)
        run = ours(base, folder, epochs)
        words = ["-m", "bench.whole_job", "--epochs", str(epochs), "--base", str(base)]
        for _ in range(rounds):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            times["cold"].append(run())
            times["diffusers"].append(
                seconds([sys.executable, *words, "--recipe", str(folder / "theirs")])
            )
            times["warm"].append(run())
    what = f"images to LoRA, {size}, {epochs} epochs of 200"
    peer = "diffusers' recipe"
    return [
        turns.figure(what, times["cold"], times["diffusers"], "s", peer, 0.4),
        turns.figure(f"{what}, caches full", times["warm"], times["diffusers"], "s", peer),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, metavar="OUT", help="Be the other side.")
    parser.add_argument("--base", type=Path, default=BASE, help="Of the other side.")
    parser.add_argument("--size", nargs="+", choices=["small", "quarter"], default=["small"])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    if given.recipe:
        recipe(given.base, given.epochs, given.recipe)
        return
    for size in given.size:
        figures = compare(size, given.epochs, given.rounds)
        turns.show(figures)
        turns.keep(figures)


if __name__ == "__main__":
    main()
