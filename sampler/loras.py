"""LoRAs and the base that they are drawn with: found, read and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampler.errors import SampleError

if TYPE_CHECKING:
    from diffusion.config import ModelConfig
    from registry.manifest import Manifest
    from weights.base import Base
    from weights.lora import Adapters

_HEADER_BASE = "ss_new_sd_model_hash"


@dataclass(frozen=True)
class Lora:
    """A LoRA's file, and what is known of it."""

    reference: str
    file: Path
    sha256: str
    base: Mapping[str, Any]
    """Of the base it was trained on, what is known of "weights" (path), "digest" and "model"."""
    zero_terminal_snr: bool = False
    manifest: Manifest | None = None


def find(text: str, location: str | None) -> Lora:
    """A LoRA file of any dialect, or NAME[@VERSION|@ALIAS|@sha256:…] in the registry.

    Raises SampleError, RegistryError or WeightsError.
    """
    return _in_file(Path(text)) if os.path.isfile(text) else _in_registry(text, location)


def _in_file(path: Path) -> Lora:
    from weights import files

    header = files.metadata(path) if path.suffix == ".safetensors" else {}
    base = {"digest": header[_HEADER_BASE]} if header.get(_HEADER_BASE) else {}
    zero_terminal = header.get("lora.zero_terminal_snr") == "true"
    return Lora(str(path), path, files.sha256(path), base, zero_terminal)


def _in_registry(text: str, location: str | None) -> Lora:
    from registry.api import open_registry

    if not location:
        raise SampleError(
            f"there is no file {text}, and no registry is named; give --registry or set "
            "LORA_REGISTRY"
        )
    file, manifest = open_registry(location).fetch(text)
    base = manifest.metadata.get("base")
    config = manifest.metadata.get("config")
    return Lora(
        manifest.reference,
        file,
        manifest.files[0].sha256,
        base if isinstance(base, dict) else {},
        bool(isinstance(config, dict) and config.get("zero_terminal_snr")),
        manifest,
    )


@dataclass(frozen=True)
class Model:
    """A base model, opened and recognised."""

    base: Base
    digest: str
    name: str
    config: ModelConfig


def open_model(
    loras: Sequence[Lora], path: str | None, model: str | None, other_base: bool = False
) -> Model:
    """The base that the LoRAs were trained on, or the one at `path`.

    Raises SampleError if none is named, or it is not the one that they were trained on and
    `other_base` is not set; ModelConfigError or WeightsError.
    """
    from diffusion.config import recognise
    from weights.base import combined_digest, open_base

    if path is None:
        known = [str(lora.base["weights"]) for lora in loras if "weights" in lora.base]
        if not known:
            names = ", ".join(lora.reference for lora in loras) or "no LoRA"
            raise SampleError(f"{names}: nothing says where the base is; name it with --base")
        path = known[0]
        if not os.path.exists(path):
            raise SampleError(
                f"{loras[0].reference} was trained on {path}, and nothing is there from here; say "
                "with --base where it is"
            )
    base = open_base(path)
    digest = combined_digest(base.digests())
    for lora in loras:
        wanted = lora.base.get("digest")
        if wanted and wanted != digest and not other_base:
            raise SampleError(
                f"{lora.reference} was trained on a base with digest {str(wanted)[:12]}…, "
                f"{base.path} has {digest[:12]}…; name the right one with --base, or use this one "
                "with --other-base"
            )
        model = model or lora.base.get("model")
    name, config = recognise(base, model)
    return Model(base, digest, name, config)


def read_adapters(lora: Lora, base: Base, ignore_unknown: bool = False) -> Adapters:
    """The LoRA's matrices in the shapes of the base. Raises WeightsError."""
    from weights.lora import fit
    from weights.lora_files import read

    shapes = {network: parts.shapes for network, parts in base.networks.items()}
    found = read(lora.file, ignore_unknown).adapters
    return fit(found, shapes, lora.reference, str(base.path), ignore_unknown)
