"""LoRA files of other tools, published with where they came from."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from registry.api import Registry
from registry.errors import RegistryError, os_errors
from registry.references import check_name
from registry.weight_tools import Operand, export, is_lora
from weights import lora_files
from weights.files import sha256


def in_order(files: Sequence[Path]) -> list[Path]:
    """From the oldest to the newest. Raises RegistryError if one is not there."""
    with os_errors("read the files"):
        return sorted(files, key=lambda file: (file.stat().st_mtime, file.name))


def publish(
    registry: Registry,
    file: Path,
    name: str | None,
    metadata: Mapping[str, Any],
    ignore_unknown: bool,
) -> tuple[str, bool]:
    """Publish a file unless it has been, and say under what reference and whether it is new.

    Raises RegistryError or WeightsError if it is no LoRA.
    """
    if not file.is_file():
        raise RegistryError(f"there is no file {file} to import; correct the path")
    name = name or _name(file.stem)
    if not name:
        raise RegistryError(f"{file.name} has no letters for a model name; give one with --name")
    check_name(name)
    with os_errors(f"read {file}"):
        digest = sha256(file)
    if found := _imported(registry, name, digest):
        return found, False
    if not is_lora(file):
        raise RegistryError(f"{file} is no LoRA; the registry keeps nothing else")
    lora = lora_files.read(file, ignore_unknown, allow_nan=False)
    origin = {"file": file.name, "sha256": digest, "format": lora.dialect}
    pictures = (file.with_suffix(ending) for ending in (".preview.png", ".png"))
    sample = next((picture for picture in pictures if picture.is_file()), None)
    with tempfile.TemporaryDirectory() as folder:
        source = file
        if not (file.suffix == ".safetensors" and lora.dialect.startswith("kohya")):
            source = Path(folder, f"{name}.safetensors")
            dtype = "float16" if set(lora.dtypes) == {"float16"} else "float32"
            export(Operand(file, file.name), source, "kohya", dtype, False, ignore_unknown, False)
        manifest = registry.push(
            name,
            source,
            metadata={**metadata, "imported_from": origin},
            samples=[sample] if sample else [],
        )
    return manifest.reference, True


def _name(stem: str) -> str:
    """A file's name as that of a model: `Final_v3 (really)` is `final_v3-really`."""
    return re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")[:64]


def _imported(registry: Registry, name: str, digest: str) -> str | None:
    """The version that was made of a file, if there is one."""
    if not registry.store.names(f"models/{name}/versions"):
        return None
    for manifest in registry.manifests([(name, n) for n in registry.versions(name)]):
        origin = manifest.metadata.get("imported_from")
        made_of = origin.get("sha256") if isinstance(origin, dict) else None
        if digest in (made_of, manifest.files[0].sha256):
            return manifest.reference
    return None
