"""Writing a base model: in any of the three forms, with LoRAs merged into it or not."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from weights import checkpoint, files, names, structure
from weights.base import NETWORK_FILES, Base
from weights.files import WeightsError
from weights.lora import Adapters, add
from weights.structure import NETWORKS

LAYOUTS = ("diffusers", "original", "mindone")
"""A diffusers folder, an original `.safetensors` file, MindONE's `.ckpt`."""

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".ckpt", ".msgpack", ".h5", ".onnx", ".pt", ".pth"}


class _Lazy(Mapping[str, np.ndarray]):
    """Arrays that are made when they are asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], np.ndarray]]):
        self._makers = makers

    def __getitem__(self, name: str) -> np.ndarray:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def write_base(
    path: str | Path,
    base: Base,
    layout: str,
    adapters: Adapters,
    dtype: type | None = None,
    weight: float = 1.0,
) -> None:
    """Write `base`, with `weight` · ΔW of the adapters added, in one of LAYOUTS.

    `dtype` is that of all tensors; None keeps each as it is (bfloat16 becomes float32). A folder's
    other files (configs, tokenizer, scheduler) are copied into a folder. The adapters must fit
    (`lora.fit`). Raises WeightsError if the disk is full; nothing half-written is left.
    """
    path = Path(path)
    tensors = {network: _tensors(base, network, adapters, dtype, weight) for network in NETWORKS}
    if layout == "diffusers":
        try:
            _write_folder(path, base, tensors)
        except (OSError, SafetensorError) as error:
            raise files.cannot_write(path, error) from error
    elif layout == "original":
        flat = _original(base, tensors)
        files.dump(path, flat, {"format": "pt", **_specification(base)})
    else:
        checkpoint.write(path, _mindone(base, tensors))


def _tensors(
    base: Base, network: str, adapters: Adapters, dtype: type | None, weight: float
) -> _Lazy:
    found = base.networks[network]
    mine = adapters.get(network, {})

    def maker(name: str) -> Callable[[], np.ndarray]:
        def make() -> np.ndarray:
            array = found.sources[name].read().reshape(found.shapes[name])
            if dtype is not None:
                array = files.cast(array, dtype, name)
            adapter = mine.get(name.removesuffix(".weight"))
            if adapter is not None and name.endswith(".weight"):
                array = add(array, adapter, weight)
            return array

        return make

    return _Lazy({name: maker(name) for name in found.shapes})


def _write_folder(folder: Path, base: Base, tensors: Mapping[str, _Lazy]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        part = Path(name) / folder.name
        for network in NETWORKS:
            file = part / NETWORK_FILES[network]
            file.parent.mkdir(parents=True)
            files.save(file, tensors[network], {"format": "pt"}, folder)
        if base.path.is_dir():
            _copy_the_rest(base.path, part)
        scheduler = part / "scheduler" / "scheduler_config.json"
        if base.prediction is not None and not scheduler.is_file():
            scheduler.parent.mkdir()
            config = {"prediction_type": base.prediction.type}
            scheduler.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in part.rglob("*"):
            files.settle(file)
        if folder.exists():
            folder.rename(Path(name) / "replaced")
        part.rename(folder)


def _copy_the_rest(source: Path, target: Path) -> None:
    """All but the networks' weights and their checksums."""
    for file in sorted(source.rglob("*")):
        inside = file.relative_to(source)
        is_weights = inside.parts[0] in NETWORKS and file.suffix in _WEIGHT_SUFFIXES
        is_index = file.name.endswith(".index.json")
        if not file.is_file() or is_weights or is_index or inside.name == "SHA256SUMS":
            continue
        if len(inside.parts) == 1 and file.suffix in _WEIGHT_SUFFIXES:
            continue
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / inside)


def _original(base: Base, tensors: Mapping[str, _Lazy], openclip: bool | None = None) -> _Lazy:
    """The tensors under their original names; each is made when it is asked for."""
    unet = base.networks["unet"].structure
    vae = base.networks["vae"].structure
    assert isinstance(unet, structure.UNet) and isinstance(vae, structure.VAE)
    levels = len(unet.block_out_channels)
    tables = {
        "unet": names.unet_modules(levels, unet.layers_per_block, unet.cross_attention),
        "vae": names.vae_modules(len(vae.block_out_channels), vae.layers_per_block),
    }
    prefixes = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
    makers: dict[str, Callable[[], np.ndarray]] = {}
    for network, table in tables.items():
        for name in tensors[network]:
            original = names.translate(name, table)
            assert original is not None, name
            makers[prefixes[network] + original] = _maker(
                tensors[network], name, convolution=".mid.attn_1." in original
            )
    text = tensors["text_encoder"]
    if openclip is None:
        openclip = unet.use_linear_projection  # Stable Diffusion 2.x
    if not openclip:
        makers |= {f"cond_stage_model.transformer.{name}": _maker(text, name) for name in text}
        return _Lazy(makers)
    makers |= _openclip(text, "cond_stage_model.model.")
    return _Lazy(makers | _unused_layer(base, text))


def _openclip(text: _Lazy, prefix: str) -> dict[str, Callable[[], np.ndarray]]:
    """The text encoder in OpenCLIP's form, with q, k and v fused."""
    makers: dict[str, Callable[[], np.ndarray]] = {}
    for name in text:
        key = prefix + names.to_openclip(name)
        if key in makers:
            continue
        if ".in_proj_" in key:
            module, leaf = name.rpartition(".")[0].rpartition(".")[0], name.rpartition(".")[2]
            parts = [f"{module}.{part}.{leaf}" for part in names.FUSED]
            makers[key] = _fused(text, parts)
        else:
            makers[key] = _maker(text, name)
    return makers


def _unused_layer(base: Base, text: _Lazy) -> dict[str, Callable[[], np.ndarray]]:
    """What programs for Stable Diffusion 2.x expect of OpenCLIP and never use.

    A last layer (a copy of the one before, as kohya-ss/sd-scripts writes it), the projection and
    the logit scale.
    """
    encoder = base.networks["text_encoder"].structure
    assert isinstance(encoder, structure.TextEncoder)
    width, last = encoder.hidden_size, encoder.num_hidden_layers - 1
    prefix = "cond_stage_model.model."
    makers = {
        key.replace(f".resblocks.{last}.", f".resblocks.{last + 1}."): make
        for key, make in _openclip(text, prefix).items()
        if f".resblocks.{last}." in key
    }
    makers[f"{prefix}text_projection"] = lambda: np.eye(width, dtype=np.float16)
    makers[f"{prefix}logit_scale"] = lambda: np.array(1, np.float16)
    return makers


def _mindone(base: Base, tensors: Mapping[str, _Lazy]) -> _Lazy:
    """The tensors under MindONE's names; the embedding tables in float16, as it publishes them."""
    halves = {"embedding_table", "positional_embedding"}
    original = _original(base, tensors, openclip=False)
    found = {name: name for name in original if not name.startswith("cond_stage_model.")}
    makers = {names.to_mindone(name): _maker(original, name) for name in found}
    for key, make in _openclip(tensors["text_encoder"], "cond_stage_model.transformer.").items():
        name = names.to_mindone(key)
        makers[name] = _half(make) if name.rpartition(".")[2] in halves else make
    return _Lazy(makers)


def _maker(
    tensors: Mapping[str, np.ndarray], name: str, convolution: bool = False
) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        array = tensors[name]
        return array.reshape(*array.shape, 1, 1) if convolution and array.ndim == 2 else array

    return make


def _fused(tensors: Mapping[str, np.ndarray], parts: list[str]) -> Callable[[], np.ndarray]:
    return lambda: np.concatenate([tensors[name] for name in parts])


def _half(make: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    return lambda: make().astype(np.float16)


def _specification(base: Base) -> dict[str, str]:
    """ModelSpec's prediction type, so that the next reader need not be told."""
    if base.prediction is None:
        return {}
    return {"modelspec.prediction_type": "v" if base.prediction.type != "epsilon" else "epsilon"}


def default_layout(base: Base) -> str:
    """The layout that a base was read in."""
    layouts = {"diffusers folder": "diffusers", "MindONE checkpoint": "mindone"}
    return layouts.get(base.layout, "original")


def check_out(path: str | Path, layout: str) -> None:
    """Raise WeightsError if a name does not go with the layout that is written under it."""
    suffix = {"original": ".safetensors", "mindone": ".ckpt", "diffusers": ""}[layout]
    if layout != "diffusers" and Path(path).suffix != suffix:
        raise WeightsError(f"{path}: expected a name that ends in {suffix} for {layout}; change it")
    if layout == "diffusers" and Path(path).suffix in _WEIGHT_SUFFIXES:
        raise WeightsError(f"{path}: expected a folder for diffusers, found a file name; change it")
