"""What a picture follows from, as plain values, and how it is written into a PNG."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sampler.errors import SampleError

RECORD = "lora-sample"
"""Text chunk of a PNG with everything that the picture follows from, as JSON."""
SHEET_RECORD = "lora-sample-sheet"
"""That of a sheet: which pictures are on it."""
PARAMETERS = "parameters"
"""The same in the form that A1111's web UI writes, which many programs read."""

SOLVERS = (
    "ddim",
    "dpm++2m",
    "dpm++2m-karras",
    "euler",
    "euler-karras",
    "euler-a",
    "unipc",
    "unipc-karras",
)
"""The keys of diffusion.solvers.SOLVERS, which needs numpy."""
SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class Used:
    """A LoRA in a picture."""

    reference: str
    """`name@version`, or the path of a file."""
    sha256: str
    weight: float

    @property
    def name(self) -> str:
        """For people: the reference, or the file's name."""
        return os.path.basename(self.reference)


@dataclass(frozen=True)
class Picture:
    """One picture to be drawn."""

    prompt: str
    negative: str
    seed: int
    loras: tuple[Used, ...]
    """None for the base alone."""
    steps: int
    solver: str
    scale: float
    width: int
    height: int
    spacing: str | None = None
    eta: float | None = None
    rescale: float = 0.0
    zero_terminal_snr: bool = False
    """Along the schedule whose last timestep is nothing but noise, as its LoRA was trained."""
    batch: int = 1
    """Pictures in one pass of the network, and which of them this is: with more than one, the last
    bits depend on it."""
    row: int = 0


@dataclass(frozen=True)
class Setup:
    """What all pictures of one call have in common."""

    base: str
    """Path of the base's weights."""
    base_digest: str
    model: str
    apart: bool
    """LoRAs stay beside the weights, instead of being merged into them."""
    precision: str
    """"fp32", "fp16" or "bf16"."""
    device_target: str
    versions: Mapping[str, str]


def record(picture: Picture, setup: Setup) -> dict[str, Any]:
    """Both as one JSON object."""
    return {**asdict(picture), **asdict(setup)}


def from_record(values: Mapping[str, Any], source: Path | str) -> tuple[Picture, Setup]:
    """The opposite of `record`. Raises SampleError if `values` are none."""
    try:
        own = {field.name: values[field.name] for field in fields(Picture)}
        common = {field.name: values[field.name] for field in fields(Setup)}
        own["loras"] = tuple(Used(**used) for used in own["loras"])
        return Picture(**own), Setup(**common)
    except (KeyError, TypeError, AttributeError) as error:
        raise SampleError(
            f"{source}: what it says of how it was drawn is not what this version of lora-sample "
            "writes; draw it from its `parameters`"
        ) from error


def parameters(picture: Picture, setup: Setup) -> str:
    """A1111's text: prompt, negative prompt, settings. LoRAs stand in the prompt as `<lora:…>`."""
    from diffusion.solvers import SOLVERS

    loras = "".join(f" <lora:{used.name}:{used.weight:g}>" for used in picture.loras)
    facts = {
        "Steps": picture.steps,
        "Sampler": SOLVERS[picture.solver].title,
        "CFG scale": f"{picture.scale:g}",
        "Seed": picture.seed,
        "Size": f"{picture.width}x{picture.height}",
        "Model hash": setup.base_digest[:10],
        "Model": Path(setup.base).stem,
    }
    if picture.eta is not None:
        facts["Eta"] = f"{picture.eta:g}"
    if picture.spacing:
        facts["Timestep spacing"] = picture.spacing
    if picture.rescale:
        facts["Guidance rescale"] = f"{picture.rescale:g}"
    if picture.loras:
        hashes = ", ".join(f"{used.name}: {used.sha256[:10]}" for used in picture.loras)
        facts["Lora hashes"] = json.dumps(hashes, ensure_ascii=False)
    lines = [picture.prompt + loras]
    if picture.negative:
        lines.append(f"Negative prompt: {picture.negative}")
    lines.append(", ".join(f"{key}: {value}" for key, value in facts.items()))
    return "\n".join(lines)


def write(path: Path, pixels: Any, picture: Picture, setup: Setup) -> None:
    """Write uint8 (height, width, 3) as a PNG with its record, whole or not at all. The same
    picture gives the same bytes. Raises WeightsError if the disk does not take it."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from weights.files import atomic_path

    info = PngInfo()
    info.add_itxt(PARAMETERS, parameters(picture, setup))
    info.add_itxt(RECORD, json.dumps(record(picture, setup), ensure_ascii=False))
    make_folder(path.parent)
    with atomic_path(path) as part:
        Image.fromarray(pixels).save(part, format="PNG", pnginfo=info)


def make_folder(folder: Path) -> None:
    """Make a folder that pictures go to. Raises SampleError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SampleError(
            f"{folder}: cannot make this folder ({error.strerror}); choose another --out"
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SampleError(f"{folder}: there is no permission to write; choose another --out")


def is_sheet(path: Path) -> bool:
    """Is this a page of pictures that lora-sample or lora-eval has put together?"""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            return SHEET_RECORD in getattr(image, "text", {})
    except (OSError, ValueError):
        return False


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in a PNG; None if there is none. Raises SampleError if it is no picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()  # text may come after the pixels
            text = getattr(image, "text", {}).get(RECORD)
    except FileNotFoundError as error:
        raise SampleError(f"there is no picture {path}; check the path") from error
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise SampleError(
            f"{path}: expected a PNG, found what does not decode ({error})"
        ) from error
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
