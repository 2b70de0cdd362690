"""A base model's folder: where its networks' weights lie and whether they are unaltered."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from weights import files
from weights.files import WeightsError

NETWORK_FILES = {
    "unet": ("unet/diffusion_pytorch_model.safetensors",),
    "vae": ("vae/diffusion_pytorch_model.safetensors",),
    "text_encoder": ("text_encoder/model.safetensors",),
}
CHECKSUMS = "SHA256SUMS"


def network_file(folder: str | Path, network: str) -> Path:
    """The weight file of one network ("unet", "vae" or "text_encoder") in a diffusers folder.

    Raises WeightsError if folder or file is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"{folder}: there is no such base model folder; check base.weights")
    for name in NETWORK_FILES[network]:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(
        f"{folder}: expected {NETWORK_FILES[network][0]}, found no such file; base.weights must "
        "name a folder in the diffusers layout"
    )


def digests(folder: str | Path, networks: tuple[str, ...]) -> dict[str, str]:
    """sha256 of the weight files of these networks, by path inside the folder.

    A `SHA256SUMS` file in the folder, if there is one, must agree: else WeightsError.
    """
    folder = Path(folder)
    found = {}
    for network in networks:
        path = network_file(folder, network)
        files.metadata(path)
        found[path.relative_to(folder).as_posix()] = files.sha256(path)
    sums = folder / CHECKSUMS
    if sums.is_file():
        for line in sums.read_text().splitlines():
            expected, _, name = line.partition("  ")
            if name in found and found[name] != expected:
                raise WeightsError(
                    f"{folder / name}: expected sha256 {expected[:12]}… as in {CHECKSUMS}, found "
                    f"{found[name][:12]}…; the file was altered, restore it"
                )
    return found


def combined_digest(found: dict[str, str]) -> str:
    """One sha256 for several files, as `sha256sum` of their sorted SHA256SUMS lines."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(found.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def load_network(folder: str | Path, network: str) -> dict[str, np.ndarray]:
    """The tensors of one network, by name, in float32."""
    tensors = files.load(network_file(folder, network))
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
