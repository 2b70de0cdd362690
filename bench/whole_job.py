"""From a folder of images to a saved LoRA, beside diffusers' recipe (train_text_to_image_lora.py).

    python -m bench.whole_job [--size small quarter full] [--epochs 30] [--rounds 1]

Both are commands that start, read the 200 images of the assets with their captions, train a LoRA of
rank 4 on the attention of the UNet in batches of 16, and save it. Small is the small base; quarter
has Stable Diffusion 1.5's whole VAE and text encoder and a quarter of its UNet's channels, with
random weights, and sees the images at 64 × 64 too. Full is Stable Diffusion 1.5 at 256 × 256 with
four images, one at a time, for the memory that it takes. The recipe is written here after
diffusers' example: VAE and text encoder run in every step, and accelerate holds the loop; only the
tokenizer is ours. Ours begins with empty caches; a second run finds them full.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench import turns
from bench.training_step import model_of

BASE, IMAGES = turns.ROOT / "assets/emoji-base", turns.ROOT / "assets/emoji-ink/train"
RANK, RATE = 4, 1e-4


@dataclass(frozen=True)
class Job:
    """What both sides are told."""

    base: Path
    images: Path
    pixels: int
    batch: int
    epochs: int


PIXELS = {"small": 64, "quarter": 64, "full": 256}
COUNTS = {"small": 200, "quarter": 200, "full": 4}
BATCHES = {"small": 16, "quarter": 16, "full": 1}


def make_base(folder: Path, size: str) -> None:
    """Random weights in diffusers' layout, and their description beside them."""
    import yaml

    from tests.parity import make_golden

    config = model_of(size)
    make_golden.unet(config.unet).save_pretrained(folder / "unet")
    make_golden.vae(config.vae).save_pretrained(folder / "vae")
    make_golden.text_encoder(config.text_encoder).save_pretrained(folder / "text_encoder")
    (folder / "model.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))


def recipe(job: Job, out: Path) -> None:
    """diffusers' way; prints the memory that it took."""
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
        prediction_type="v_prediction" if job.base == BASE else "epsilon",
    )
    text_encoder = CLIPTextModel.from_pretrained(job.base / "text_encoder").float()
    text_encoder.requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(job.base / "vae").float().requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(job.base / "unet").float().requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets
    )
    unet.add_adapter(config)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=1e-2)
    tokenizer = Tokenizer(clip_vocabulary(), 49407)

    class Pictures(torch.utils.data.Dataset):
        paths = sorted(job.images.glob("*.png"))

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
            path = self.paths[row]
            with Image.open(path) as image:
                small = image.convert("RGB").resize((job.pixels, job.pixels), 2)
            pixels = torch.from_numpy(np.asarray(small, np.float32) / 127.5 - 1).permute(2, 0, 1)
            ids = tokenizer([path.with_suffix(".txt").read_text().strip()])[0]
            return pixels, torch.from_numpy(ids).long()

    loader = torch.utils.data.DataLoader(Pictures(), batch_size=job.batch, shuffle=True)
    steps = job.epochs * len(loader)
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=steps)
    unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)
    for _ in range(job.epochs):
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
                accelerator.gather(loss.repeat(job.batch)).mean().item()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=layers)
    print(turns.peak_memory())


@dataclass(frozen=True)
class Took:
    """What a run took."""

    seconds: float
    memory: int
    """Bytes of the process that trains, at its highest."""


def timed(command: list[str]) -> tuple[float, str]:
    """Seconds of a command with the threads that both sides have, and its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONWARNINGS": "ignore"}
    begun = time.monotonic()
    done = subprocess.run(
        command, cwd=turns.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} has ended with {done.returncode}:\n{done.stderr}")
    return time.monotonic() - begun, done.stdout


def ours(job: Job, folder: Path, number: int) -> Took:
    """lora-launch with one worker."""
    config, runs = folder / "timed.yaml", folder / f"runs{number}"
    named = "emoji" if job.base == BASE else job.base / "model.yaml"
    config.write_text(f"""
name: timed
base: {{weights: {job.base}, model: {named}}}
data: {{train: {job.images}, resolution: {job.pixels}}}
lora: {{rank: {RANK}}}
optimizer: {{learning_rate: {RATE}}}
global_batch: {job.batch}
epochs: {job.epochs}
min_snr_gamma: null
evaluation: null
output: {runs}
cache: {folder / "cache"}
""")
    seconds, _ = timed([sys.executable, "-m", "launcher.cli", "--devices", "1", str(config)])
    (result,) = runs.glob("*/attempt_1/result.json")
    return Took(seconds, json.loads(result.read_text())["peak_memory_bytes"])


def theirs(job: Job, folder: Path) -> Took:
    """The recipe, in a process of its own."""
    told = json.dumps({key: str(value) for key, value in vars(job).items()})
    words = ["-m", "bench.whole_job", "--job", told, "--recipe", str(folder / "theirs")]
    seconds, output = timed([sys.executable, *words])
    return Took(seconds, int(output.split()[-1]))


def compare(size: str, epochs: int, rounds: int) -> list[turns.Figure]:
    """Seconds of the whole job, with empty and with full caches; memory."""
    sides: dict[str, list[Took]] = {"empty": [], "theirs": [], "full": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, images = BASE, folder / "images"
        if size != "small":
            base = folder / "base"
            make_base(base, size)
        images.mkdir()
        for path in sorted(IMAGES.glob("*.png"))[: COUNTS[size]]:
            shutil.copy(path, images)
            shutil.copy(path.with_suffix(".txt"), images)
        job = Job(base, images, PIXELS[size], BATCHES[size], epochs)
        for number in range(rounds):
            sides["empty"].append(ours(job, folder, 2 * number))
            sides["theirs"].append(theirs(job, folder))
            sides["full"].append(ours(job, folder, 2 * number + 1))
            shutil.rmtree(folder / "cache")
    seconds = {name: [one.seconds for one in took] for name, took in sides.items()}
    memory = {name: [one.memory / 1e9 for one in took] for name, took in sides.items()}
    what = f"{size}, {epochs} epochs of {COUNTS[size]}"
    peer = "diffusers' recipe"
    goal = 0.4 if size != "full" and epochs == 30 else None
    figures = []
    for caches, words, aim in (("empty", "", goal), ("full", ", caches full", None)):
        job_name = f"images to LoRA, {what}{words}"
        figures.append(turns.figure(job_name, seconds[caches], seconds["theirs"], "s", peer, aim))
        memory_name = f"memory of the job, {what}{words}"
        figures.append(turns.figure(memory_name, memory[caches], memory["theirs"], "GB", peer, 1.0))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, metavar="OUT", help="Be the other side.")
    parser.add_argument("--job", help="Of the other side, in JSON.")
    parser.add_argument("--size", nargs="+", choices=[*PIXELS], default=["small"])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    if given.recipe:
        told = json.loads(given.job)
        paths = {key: Path(told[key]) for key in ("base", "images")}
        numbers = {key: int(told[key]) for key in ("pixels", "batch", "epochs")}
        recipe(Job(**paths, **numbers), given.recipe)
        return
    for size in given.size:
        figures = compare(size, given.epochs, given.rounds)
        turns.show(figures)
        turns.keep(figures)


if __name__ == "__main__":
    main()
