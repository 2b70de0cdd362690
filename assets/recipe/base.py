"""Makes the small base model again, from nothing to assets/emoji-base.

    python -m assets.recipe.base

Each step is a command that can be run by itself; a step whose result is in the build folder is
not run again.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from diffusion.config import ModelConfig, load_model_config
from weights import files
from weights.base import CHECKSUMS, NETWORK_FILES

MODEL = Path("configs/models/emoji.yaml")
STYLES = ("flat", "noto", "ink")


def run(*command: str) -> str:
    """Run a module of this project; its progress is shown, its standard output returned."""
    click.echo(f"$ python -m {' '.join(command)}", err=True)
    done = subprocess.run(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def set_scaling_factor(value: float) -> None:
    """Write the autoencoder's scaling factor into the model's YAML."""
    text = re.sub(r"scaling_factor: [\d.]+", f"scaling_factor: {value:.5f}", MODEL.read_text())
    MODEL.write_text(text)


def diffusers_configs(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The config.json of each network, with which diffusers and transformers open the folder."""
    unet, vae, text = config.unet, config.vae, config.text_encoder
    down = ["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in unet.cross_attention]
    return {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "sample_size": config.resolution // vae.factor,
            "block_out_channels": list(unet.block_out_channels),
            "down_block_types": down,
            "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
            "layers_per_block": unet.layers_per_block,
            "attention_head_dim": list(unet.attention_heads),
            "cross_attention_dim": unet.cross_attention_dim,
            "use_linear_projection": unet.use_linear_projection,
            "norm_num_groups": unet.norm_num_groups,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "sample_size": config.resolution,
            "block_out_channels": list(vae.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.block_out_channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(vae.block_out_channels),
            "layers_per_block": vae.layers_per_block,
            "latent_channels": vae.latent_channels,
            "norm_num_groups": vae.norm_num_groups,
            "mid_block_add_attention": vae.mid_block_attention,
            "scaling_factor": vae.scaling_factor,
        },
        "text_encoder": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "hidden_act": text.hidden_act,
            "max_position_embeddings": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": text.pad_token_id,
        },
    }


def pack(vae: Path, trained: Path, out: Path) -> None:
    """Copy autoencoder, UNet and text encoder into one folder, with configs and checksums."""
    sources = {"vae": vae, "unet": trained, "text_encoder": trained}
    for network, config in diffusers_configs(load_model_config("emoji")).items():
        name = NETWORK_FILES[network]
        files.dump(out / name, files.load(sources[network] / name), {"format": "pt"})
        text = json.dumps(config, indent=2) + "\n"
        (out / network / "config.json").write_text(text, encoding="utf-8")
    names = sorted(NETWORK_FILES.values())
    sums = "".join(f"{files.sha256(out / name)}  {name}\n" for name in names)
    (out / CHECKSUMS).write_text(sums, encoding="utf-8")


@click.command(epilog="Example: python -m assets.recipe.base --build build")
@click.option("--build", default="build", show_default=True, type=click.Path(path_type=Path))
@click.option(
    "--out", default="assets/emoji-base", show_default=True, type=click.Path(path_type=Path)
)
def main(build: Path, out: Path) -> None:
    """Draw the images, train autoencoder, UNet and text encoder, and pack them.

    Run it in the checkout. Two cores need about two hours.
    """
    images, vae = build / "emoji", build / "base"
    if not (images / "metadata.jsonl").is_file():
        run("assets.recipe.images", str(images))
    if not (vae / NETWORK_FILES["vae"]).is_file():
        folders = [part for style in STYLES for part in ("--images", str(images / style))]
        set_scaling_factor(float(run("trainer.autoencoder", *folders, str(vae))))
    printed = run("launcher.cli", "--devices", "1", "--json", "configs/runs/emoji-base.yaml")
    pack(vae, Path(json.loads(printed)["artifact"]), out)
    click.echo(out)


if __name__ == "__main__":
    main()
