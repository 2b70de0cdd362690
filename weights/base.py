"""A base model, in whichever form it lies on the disk: what it is, what is in it, its tensors.

Three forms are known: a folder in the diffusers layout, a file of the original Stable Diffusion
(CompVis, Stability AI), and a MindSpore checkpoint of MindONE's. Which of them a path holds is
found out from the names in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from weights import files, names, structure
from weights.files import FLOATS, TensorFile, WeightsError, open_tensors
from weights.names import Piece
from weights.structure import NETWORKS, Shapes

NETWORK_FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
"""Where a diffusers folder keeps its networks."""

CHECKSUMS = "SHA256SUMS"

_UNET, _VAE, _TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
_CLIP, _OPENCLIP = "cond_stage_model.transformer.", "cond_stage_model.model."

_NOT_NEEDED = re.compile(
    r"model_ema\..*|(model_)?(betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus.*|posterior_.*)"
    r"|lvlb_weights|logvar|scale_factor|global_step|state_dict|embedding_manager\..*"
    r"|denoiser\..*|first_stage_model\.(loss|model_ema)\..*"
    r"|.*\.position_ids|(cond_stage_model\.(model|transformer)\.)?(text_projection(\.weight)?"
    r"|logit_scale)|cond_stage_model\.logit_scale|cond_stage_model\.(model\.)?(visual|attn_mask).*"
)
_FOREIGN = (
    (r"conditioner\.embedders\.|add_embedding\.linear_1|.*label_emb\.", "Stable Diffusion XL"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "Stable Diffusion 3"),
    (r"(model\.diffusion_model\.)?(double_blocks|single_transformer_blocks)\.", "Flux"),
    (r"transformer_blocks\.\d+\.attn\.add_[kqv]_proj\.", "Stable Diffusion 3 or Flux"),
    (r"control_model\.|controlnet_cond_embedding\.|input_hint_block\.", "ControlNet"),
    (r".*\.lora_(down|up|A|B)\.|.*[._]lora(_linear_layer)?\.(down|up)\.|lora_(unet|te)", "LoRA"),
)
_FOREIGN_FOLDERS = {"text_encoder_2": "Stable Diffusion XL", "transformer": "transformer model"}


@dataclass(frozen=True)
class Source:
    """Where a tensor lies: the file, its name there, and which part of it, if it is fused."""

    file: TensorFile
    name: str
    piece: Piece | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        whole = self.whole
        if self.piece is None or not whole:
            return whole
        return (whole[0] // self.piece[1], *whole[1:])

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the tensor in the file, fused or not."""
        return self.file.entries[self.name].shape

    @property
    def dtype(self) -> str:
        return self.file.entries[self.name].dtype

    def read(self) -> np.ndarray:
        array = self.file.read(self.name)
        if self.piece is None:
            return array
        index, number = self.piece
        rows = array.shape[0] // number
        return array[index * rows : (index + 1) * rows].copy()  # the rest need not stay in memory


@dataclass(frozen=True)
class Network:
    """One network of a base: its structure, and where each tensor of it lies."""

    structure: structure.UNet | structure.VAE | structure.TextEncoder
    shapes: Shapes
    """Of every tensor of the network, by its name in diffusers or transformers."""
    sources: Mapping[str, Source]

    def tensors(
        self, dtype: type = np.float32, allow_nan: bool = False
    ) -> Iterator[tuple[str, np.ndarray]]:
        """(name, array of `dtype`), one at a time, so that no second copy is ever in memory.

        Raises WeightsError if a tensor holds NaN or infinity, unless `allow_nan`.
        """
        for name, shape in self.shapes.items():
            source = self.sources[name]
            array = source.read().reshape(shape)
            if not allow_nan and (bad := files.count_not_finite(array)):
                raise WeightsError(
                    f"{source.file.path}: {source.name} has {bad} of {array.size} values that "
                    "are NaN or infinite; use another copy, or allow them if you know better "
                    "(base.allow_nan in a run, --allow-nan in a command)"
                )
            yield name, array.astype(dtype, copy=False)


@dataclass(frozen=True)
class Prediction:
    """Which parametrisation the weights were trained with, and what says so."""

    type: str
    """"epsilon" or "v_prediction"."""
    source: str


@dataclass(frozen=True)
class Base:
    """A base model, opened: nothing but the index is in memory."""

    path: Path
    layout: str
    """"diffusers folder", "original Stable Diffusion file" or "MindONE checkpoint"."""
    networks: Mapping[str, Network]
    prediction: Prediction | None
    """None if nothing beside the weights says it."""
    not_needed: tuple[str, ...]
    """Known tensors that no network here uses: EMA copies, schedules, OpenCLIP's last layer."""
    left_over: tuple[str, ...]
    """Tensors that belong to none of the networks."""
    files: tuple[Path, ...]

    @property
    def tensors(self) -> int:
        """How many tensors the networks have."""
        return sum(len(network.shapes) for network in self.networks.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of the networks' tensors, the most frequent first."""
        found = [
            source.dtype
            for network in self.networks.values()
            for source in network.sources.values()
        ]
        return tuple(sorted(set(found), key=lambda dtype: -found.count(dtype)))

    @property
    def family(self) -> str:
        """ "Stable Diffusion 1.x", "Stable Diffusion 2.x" or "Stable Diffusion of another size"."""
        unet = self.networks["unet"].structure
        assert isinstance(unet, structure.UNet)
        return family(unet)

    def load(self, network: str, dtype: type = np.float32) -> dict[str, np.ndarray]:
        """All tensors of one network, by name; WeightsError as `Network.tensors`."""
        return dict(self.networks[network].tensors(dtype))

    def digests(self) -> dict[str, str]:
        """sha256 of each file, by its path inside the folder (a file's own name for a file).

        A `SHA256SUMS` file in the folder, if there is one, must agree: else WeightsError.
        """
        folder = self.path if self.path.is_dir() else self.path.parent
        found = {path.relative_to(folder).as_posix(): files.sha256(path) for path in self.files}
        sums = folder / CHECKSUMS
        if sums.is_file():
            for line in sums.read_text().splitlines():
                expected, _, name = line.partition("  ")
                if name in found and found[name] != expected:
                    raise WeightsError(
                        f"{folder / name}: expected sha256 {expected[:12]}… as in {CHECKSUMS}, "
                        f"found {found[name][:12]}…; the file was altered, restore it"
                    )
        return found


def family(unet: structure.UNet) -> str:
    """What a UNet of this structure is called."""
    if unet.block_out_channels == (320, 640, 1280, 1280):
        generation = {768: "1.x", 1024: "2.x"}.get(unet.cross_attention_dim)
        if generation:
            return f"Stable Diffusion {generation}"
    return "Stable Diffusion of another size"


def combined_digest(found: Mapping[str, str]) -> str:
    """One sha256 for a base: of the file itself, or of a folder's sorted SHA256SUMS lines."""
    if len(found) == 1 and "/" not in next(iter(found)):
        return next(iter(found.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(found.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def open_base(path: str | Path, networks: Sequence[str] = NETWORKS, ema: bool = False) -> Base:
    """Find out what base model lies at `path` and where each tensor of these networks is.

    With `ema` the UNet is taken from the EMA copy that some original files hold beside it.
    Raises WeightsError, one sentence, if the path holds no Stable Diffusion 1.x or 2.x, a tensor
    is missing, does not fit or is not a number, or one inside a network is unknown.
    """
    path = Path(path)
    if os.path.isdir(path):
        found = _open_folder(path, networks)
        if ema:
            raise WeightsError(f"{path}: a diffusers folder holds no EMA copy; leave --ema out")
        return found
    if not os.path.exists(path):
        raise WeightsError(f"{path}: there is no such base model; check the path")
    return _open_file(path, networks, ema)


# ---- a folder in the diffusers layout


def _open_folder(folder: Path, networks: Sequence[str]) -> Base:
    for name, model in _FOREIGN_FOLDERS.items():
        if (folder / name).is_dir():
            raise WeightsError(
                f"{folder}: this is a {model} ({name}/ is there), expected Stable Diffusion 1.x "
                "or 2.x; name another base"
            )
    opened: dict[str, Network] = {}
    not_needed: list[str] = []
    paths: list[Path] = []
    rename: dict[str, Callable[[str], str]] = {
        "unet": lambda name: name,
        "vae": names.current_vae,
        "text_encoder": names.current_text,
    }
    for network in networks:
        tensors = [open_tensors(path) for path in _network_files(folder, network)]
        paths += (file.path for file in tensors)
        _refuse_foreign(tensors[0].path, (name for file in tensors for name in file.entries))
        sources: dict[str, Source] = {}
        for file in tensors:
            for name in file.entries:
                if _NOT_NEEDED.fullmatch(name):
                    not_needed.append(f"{network}/{name}")
                    continue
                if (current := rename[network](name)) in sources:
                    raise WeightsError(
                        f"{file.path}: {name} is there twice, also as {sources[current].name}; "
                        "download the folder again"
                    )
                sources[current] = Source(file, name)
        opened[network] = _network(network, tensors[0].path, sources)
    return Base(
        folder,
        "diffusers folder",
        opened,
        _scheduler_prediction(folder),
        tuple(not_needed),
        (),
        tuple(paths),
    )


def _network_files(folder: Path, network: str) -> list[Path]:
    """The file, or the shards, of one network; full precision before half."""
    plain = folder / NETWORK_FILES[network]
    for path in (plain, plain.with_name(f"{plain.stem}.fp16.safetensors")):
        if path.is_file():
            return [path]
        *stem, _ = path.name.split(".")
        for index in (
            path.with_name(f"{path.name}.index.json"),
            path.with_name(".".join([stem[0], "safetensors.index", *stem[1:], "json"])),
        ):
            if index.is_file():
                return _shards(index)
    for pickle in (plain.with_suffix(".bin"), folder / network / "pytorch_model.bin"):
        if pickle.is_file():
            open_tensors(pickle)
    inside = sorted(
        file.name for file in folder.glob("*.*") if file.suffix in (".safetensors", ".ckpt")
    )
    if inside:
        remedy = f"to use {inside[0]}, name the file itself: {folder / inside[0]}"
    else:
        remedy = "name a folder in the diffusers layout, or a .safetensors or MindSpore .ckpt file"
    raise WeightsError(f"{folder}: expected {NETWORK_FILES[network]}, found no such file; {remedy}")


def _shards(index: Path) -> list[Path]:
    """The files that a `.safetensors.index.json` names; none may lie outside its folder."""
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        valid = [name for name in named if re.fullmatch(r"[\w-][\w.-]*\.safetensors", name)]
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise WeightsError(
            f'{index}: expected {{"weight_map": {{tensor: file}}}}, found something else; '
            "download it again"
        ) from error
    if valid != named or not named:
        wrong = next((name for name in named if name not in valid), "no file")
        raise WeightsError(
            f"{index}: expected names of .safetensors files in the same folder, found {wrong!r}; "
            "download it again from a source you trust"
        )
    return [index.parent / name for name in named]


def _scheduler_prediction(folder: Path) -> Prediction | None:
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    found = config.get("prediction_type", "epsilon") if isinstance(config, dict) else None
    if found not in ("epsilon", "v_prediction"):
        return None
    return Prediction(str(found), "scheduler/scheduler_config.json")


# ---- one file


def _open_file(path: Path, networks: Sequence[str], ema: bool) -> Base:
    file = open_tensors(path)
    _refuse_foreign(path, file.entries)
    mindone = any(name.endswith((".gamma", ".embedding_table")) for name in file.entries)
    if not any(name.startswith(_UNET) for name in file.entries):
        part = next((n for n in NETWORKS if _looks_like(n, file.entries)), None)
        raise WeightsError(
            f"{path}: expected a whole Stable Diffusion file, found "
            + (f"only a {part}; " if part else "none of its tensors; ")
            + "name a file with UNet, VAE and text encoder, or a diffusers folder"
        )
    original = {names.from_mindone(name) if mindone else name: name for name in file.entries}
    opened: dict[str, Network] = {}
    used: set[str] = set()
    not_needed = [name for name in file.entries if _NOT_NEEDED.fullmatch(name)]
    readers = {"unet": _unet_sources, "vae": _vae_sources, "text_encoder": _text_sources}
    for network in networks:
        sources, spare = readers[network](file, original, mindone)
        if network == "unet" and ema:
            sources = _ema_sources(file, sources)
        opened[network] = _network(network, path, sources)
        used |= {source.name for source in sources.values()}
        not_needed += spare
    used |= set(not_needed)
    left_over = [name for name in file.entries if name not in used]
    prefixes = {"unet": _UNET, "vae": _VAE, "text_encoder": _TEXT}
    strange = [name for name in left_over if name.startswith(tuple(prefixes[n] for n in networks))]
    if strange and not ema:
        raise WeightsError(
            f"{path}: {len(strange)} tensors fit no network of Stable Diffusion 1.x or 2.x "
            f"({', '.join(strange[:3])}{', …' if len(strange) > 3 else ''}); check what it is"
        )
    return Base(
        path,
        "MindONE checkpoint" if mindone else "original Stable Diffusion file",
        opened,
        _file_prediction(path, file.metadata),
        tuple(sorted(not_needed)),
        tuple(left_over),
        (path,),
    )


def _unet_sources(
    file: TensorFile, original: Mapping[str, str], _: bool
) -> tuple[dict[str, Source], list[str]]:
    found = {n.removeprefix(_UNET): key for n, key in original.items() if n.startswith(_UNET)}
    matches = (re.match(r"input_blocks\.(\d{1,3})\.0\.op\.", n) for n in found)
    downs = sorted({int(match[1]) for match in matches if match})
    if not downs or downs[0] < 2 or max(downs[0], len(downs)) > structure.MOST:
        raise WeightsError(
            f"{file.path}: the UNet's input_blocks.N.0.op are not there; copy or download it again"
        )
    layers, levels = downs[0] - 1, len(downs) + 1
    attends = tuple(
        any(n.startswith(f"input_blocks.{(layers + 1) * i + 1}.1.") for n in found)
        for i in range(levels)
    )
    table = names.backwards(names.unet_modules(levels, layers, attends))
    translated = {names.translate(n, table): Source(file, key) for n, key in found.items()}
    return {name: source for name, source in translated.items() if name is not None}, []


def _vae_sources(
    file: TensorFile, original: Mapping[str, str], _: bool
) -> tuple[dict[str, Source], list[str]]:
    found = {n.removeprefix(_VAE): key for n, key in original.items() if n.startswith(_VAE)}
    blocks = {
        (int(match[1]), int(match[2]))
        for n in found
        if (match := re.match(r"encoder\.down\.(\d{1,3})\.block\.(\d{1,3})\.", n))
    }
    if not blocks or max(map(max, blocks)) >= structure.MOST:
        raise WeightsError(
            f"{file.path}: the VAE ({_VAE}encoder.down.…) is not there; name a file with UNet, "
            "VAE and text encoder"
        )
    levels, layers = (1 + max(numbers) for numbers in zip(*blocks, strict=True))
    table = names.backwards(names.vae_modules(levels, layers))
    translated = {names.translate(n, table): Source(file, key) for n, key in found.items()}
    return {name: source for name, source in translated.items() if name is not None}, []


def _text_sources(
    file: TensorFile, original: Mapping[str, str], mindone: bool
) -> tuple[dict[str, Source], list[str]]:
    """Also returns what is not needed: OpenCLIP's last layer, whose output SD 2.x never sees."""
    sources: dict[str, Source] = {}
    openclip = mindone or any(n.startswith(_OPENCLIP) for n in original)
    prefix = _OPENCLIP if openclip and not mindone else _CLIP
    found = {n.removeprefix(prefix): key for n, key in original.items() if n.startswith(prefix)}
    found = {n: key for n, key in found.items() if not _NOT_NEEDED.fullmatch(key)}
    if not openclip:
        return {names.current_text(n): Source(file, key) for n, key in found.items()}, []
    layer = re.compile(r"transformer\.resblocks\.(\d{1,3})\.")
    layers = [int(match[1]) for n in found if (match := layer.match(n))]
    whole = f"{prefix}logit_scale" in original or f"{prefix}text_projection" in original
    last = max(layers, default=0)
    dropped = last if whole or last == 23 else None
    spare = []
    for n, key in found.items():
        if dropped is not None and n.startswith(f"transformer.resblocks.{dropped}."):
            spare.append(key)
            continue
        for name, piece in names.from_openclip(n):
            sources[name] = Source(file, key, piece)
    return sources, spare


def _ema_sources(file: TensorFile, sources: Mapping[str, Source]) -> dict[str, Source]:
    """The EMA copies of a UNet's tensors: the same names without dots, under `model_ema.`."""
    found = {}
    for name, source in sources.items():
        flat = source.name.removeprefix("model.").replace(".", "")
        key = f"model_ema.{flat}"
        if key not in file.entries:
            raise WeightsError(
                f"{file.path}: there is no EMA copy of {source.name}; leave --ema out"
            )
        found[name] = Source(file, key)
    return found


def _file_prediction(path: Path, metadata: Mapping[str, str]) -> Prediction | None:
    """From the header (ModelSpec, kohya), or from the YAML file that lies beside some models."""
    said = metadata.get("modelspec.prediction_type")
    if said in ("epsilon", "v"):
        return Prediction("epsilon" if said == "epsilon" else "v_prediction", "its ModelSpec")
    if "-768-v" in metadata.get("modelspec.architecture", ""):
        return Prediction("v_prediction", "its ModelSpec")
    beside = path.with_suffix(".yaml")
    try:
        params: Any = yaml.safe_load(beside.read_text(encoding="utf-8"))["model"]["params"]
        said = str(params.get("parameterization", "eps"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError,
            yaml.YAMLError):  # fmt: skip
        return None
    kinds = {"eps": "epsilon", "v": "v_prediction", "velocity": "v_prediction"}
    return Prediction(kinds[said], beside.name) if said in kinds else None


# ---- common


def _network(network: str, path: Path, sources: Mapping[str, Source]) -> Network:
    """Check that the sources are a network of this kind, whole and of numbers."""
    try:
        found = structure.RECOGNISE[network](
            {name: source.shape for name, source in sources.items()}
        )
    except WeightsError as error:
        raise WeightsError(
            f"{path}: expected the {network} of Stable Diffusion 1.x or 2.x, but {error}; check "
            "what the file is"
        ) from error
    if isinstance(found, structure.UNet) and found.in_channels != 4:
        kind = {9: "an inpainting", 8: "an editing or upscaling", 5: "a depth"}
        raise WeightsError(
            f"{path}: this is {kind.get(found.in_channels, 'another')} model, its UNet takes "
            f"{found.in_channels} channels, expected 4; name a text-to-image model"
        )
    shapes = structure.shapes_of(found)
    missing = [name for name in shapes if name not in sources]
    if missing:
        raise WeightsError(
            f"{path}: {len(missing)} of the {len(shapes)} tensors of the {network} are missing "
            f"(first: {missing[0]}); the file is not complete, copy or download it again"
        )
    strange = [source.name for name, source in sources.items() if name not in shapes]
    if strange:
        raise WeightsError(
            f"{path}: {len(strange)} tensors fit no place in the {network} (first: "
            f"{strange[0]}); check what the file is"
        )
    for name, shape in shapes.items():
        source = sources[name]
        expected = (shape[0] * source.piece[1], *shape[1:]) if source.piece else shape
        if not _fits(source.whole, expected):
            raise WeightsError(
                f"{path}: {source.name} is {_by(source.whole)}, expected {_by(expected)} as in the "
                f"rest of the {network}; the file is damaged or of another model"
            )
        if source.dtype not in FLOATS:
            raise WeightsError(
                f"{path}: {source.name} is of dtype {source.dtype}, expected one of "
                f"{', '.join(FLOATS)}; convert the file to float16 first"
            )
    return Network(found, shapes, sources)


def _fits(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Equal but for the two ones of a 1×1 convolution, which some files have and some have not."""
    return found == expected or _flat(found) == _flat(expected)


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "a single number"


def _refuse_foreign(path: Path, keys: Iterator[str] | Mapping[str, Any]) -> None:
    patterns = [(re.compile(pattern), model) for pattern, model in _FOREIGN]
    for name in keys:
        for pattern, model in patterns:
            if pattern.match(name):
                raise WeightsError(
                    f"{path}: this is a {model} file ({name}), expected the base model of "
                    "Stable Diffusion 1.x or 2.x; name another one"
                )


def _looks_like(network: str, keys: Mapping[str, Any]) -> bool:
    telling = {
        "unet": ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"),
        "vae": ("encoder.conv_in.weight",),
        "text_encoder": ("text_model.final_layer_norm.weight",),
    }
    return all(name in keys for name in telling[network])
