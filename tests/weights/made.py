"""Made-up models and weight files, written byte by byte from the published descriptions.

Nothing here uses the code under test but for the shapes of the networks, which a test of their own
compares with MindSpore's. The names follow diffusers' `convert_diffusers_to_original_stable_
diffusion.py` and MindONE's `tools/model_conversion`.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from weights import structure

Arrays = dict[str, np.ndarray]

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model",
    "vae": "vae/diffusion_pytorch_model",
    "text_encoder": "text_encoder/model",
}
"""Where a diffusers folder keeps its networks, without the suffix."""


# ---- models


@dataclass(frozen=True)
class Model:
    """A Stable Diffusion with the blocks of a published one, and a few channels only."""

    unet: structure.UNet
    vae: structure.VAE
    text_encoder: structure.TextEncoder

    @property
    def openclip(self) -> bool:
        """Are its original files those of Stability AI, with OpenCLIP's text encoder?"""
        return self.unet.use_linear_projection


MODELS = {
    "sd1": Model(
        structure.UNet(4, 4, (4, 8, 12, 12), (True, True, True, False), 2, 6, False),
        structure.VAE((3, 4, 5, 5), 2, 4, True),
        structure.TextEncoder(17, 6, 10, 12, 9),
    ),
    "sd2": Model(
        structure.UNet(4, 4, (4, 8, 12, 12), (True, True, True, False), 2, 10, True),
        structure.VAE((3, 4, 5, 5), 2, 4, True),
        structure.TextEncoder(17, 10, 14, 23, 9),
    ),
    "emoji": Model(
        structure.UNet(4, 4, (4, 8, 8), (False, True, False), 1, 6, True),
        structure.VAE((2, 3, 5), 1, 4, False),
        structure.TextEncoder(17, 6, 10, 3, 9),
    ),
}


def described(model: str | Model) -> Model:
    return MODELS[model] if isinstance(model, str) else model


def shapes(model: str | Model) -> dict[str, structure.Shapes]:
    """Of each network."""
    made = described(model)
    return {
        "unet": structure.unet_shapes(made.unet),
        "vae": structure.vae_shapes(made.vae),
        "text_encoder": structure.text_encoder_shapes(made.text_encoder),
    }


def exact(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random float32 values that float16 and bfloat16 hold exactly."""
    return (rng.integers(-100, 101, shape) / 64).astype(np.float32)


@cache
def weights(model: str | Model, seed: int = 0) -> dict[str, Arrays]:
    """Random weights of each network, by their names in diffusers; not to be written to."""
    rng = np.random.default_rng(seed)
    found = {
        network: {name: exact(rng, shape) for name, shape in wanted.items()}
        for network, wanted in shapes(model).items()
    }
    for arrays in found.values():
        for array in arrays.values():
            array.flags.writeable = False
    return found


# ---- names

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
           "norm2": "out_layers.0", "conv2": "out_layers.3",
           "conv_shortcut": "skip_connection"}  # fmt: skip
_STEM = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
         "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0",
         "conv_out": "out.2"}  # fmt: skip


def original_unet(name: str, model: Model) -> str:
    """The CompVis name, without "model.diffusion_model."."""
    layers = model.unet.layers_per_block
    if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name):
        side, i, kind, j, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        first = (layers + 1) * i
        block = f"input_blocks.{first + j + 1}" if side == "down" else f"output_blocks.{first + j}"
        if kind == "resnets":
            part, _, leaf = rest.partition(".")
            return f"{block}.0.{_RESNET[part]}.{leaf}"
        if kind == "attentions":
            return f"{block}.1.{rest}"
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
        place = 2 if model.unet.cross_attention[-1 - i] else 1
        return f"output_blocks.{first + layers}.{place}.{rest}"
    if name.startswith("mid_block.attentions.0."):
        return name.replace("mid_block.attentions.0", "middle_block.1")
    if match := re.fullmatch(r"mid_block\.resnets\.(\d)\.(\w+)\.(\w+)", name):
        return f"middle_block.{2 * int(match[1])}.{_RESNET[match[2]]}.{match[3]}"
    module, _, leaf = name.rpartition(".")
    return f"{_STEM[module]}.{leaf}"


def original_vae(name: str, model: Model) -> str:
    """The CompVis name, without "first_stage_model."."""
    last = len(model.vae.block_out_channels) - 1
    name = re.sub(
        r"decoder\.up_blocks\.(\d)", lambda match: f"decoder.up.{last - int(match[1])}", name
    )
    for ours, theirs in (
        ("encoder.down_blocks.", "encoder.down."),
        (".downsamplers.0.", ".downsample."),
        (".upsamplers.0.", ".upsample."),
        ("mid_block.resnets.0.", "mid.block_1."),
        ("mid_block.resnets.1.", "mid.block_2."),
        (".resnets.", ".block."),
        ("mid_block.attentions.0.", "mid.attn_1."),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
        ("group_norm", "norm"),
        ("attn_1.to_q.", "attn_1.q."),
        ("attn_1.to_k.", "attn_1.k."),
        ("attn_1.to_v.", "attn_1.v."),
        ("attn_1.to_out.0.", "attn_1.proj_out."),
    ):
        name = name.replace(ours, theirs)
    return name


def openclip(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """A text encoder under OpenCLIP's names, q, k and v as one."""
    found: Arrays = {}
    for name, array in arrays.items():
        short = name.removeprefix("text_model.")
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)", short):
            layer = name.rpartition(f".{match[2]}_proj.")[0]
            fused = [arrays[f"{layer}.{part}_proj.{match[3]}"] for part in "qkv"]
            found[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"] = np.vstack(
                fused
            ) if array.ndim == 2 else np.hstack(fused)  # fmt: skip
            continue
        for ours, theirs in (
            ("encoder.layers.", "transformer.resblocks."),
            ("embeddings.token_embedding.weight", "token_embedding.weight"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("final_layer_norm", "ln_final"),
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("self_attn.out_proj", "attn.out_proj"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ):
            short = short.replace(ours, theirs)
        found[short] = array
    return found


def unused(arrays: Mapping[str, np.ndarray], width: int) -> Arrays:
    """What a whole OpenCLIP holds beyond Stable Diffusion 2.x: the last layer and two more."""
    layers = 1 + max(
        int(m[1]) for n in arrays if (m := re.match(r"transformer.resblocks.(\d+)", n))
    )
    last = f"transformer.resblocks.{layers - 1}."
    more = {
        name.replace(last, f"transformer.resblocks.{layers}."): array + 1
        for name, array in arrays.items()
        if name.startswith(last)
    }
    return more | {
        "text_projection": np.ones((width, width), np.float32),
        "logit_scale": np.array(4.6, np.float32),
    }


def original(model: str | Model, found: Mapping[str, Arrays] | None = None) -> Arrays:
    """All tensors under the names, and in the shapes, of the original files."""
    made, found = described(model), found or weights(model)
    named: Arrays = {}
    for name, array in found["unet"].items():
        named[f"model.diffusion_model.{original_unet(name, made)}"] = array
    for name, array in found["vae"].items():
        theirs = original_vae(name, made)
        convolution = ".mid.attn_1." in theirs and array.ndim == 2
        named[f"first_stage_model.{theirs}"] = array[..., None, None] if convolution else array
    text = found["text_encoder"]
    if not made.openclip:
        return named | {f"cond_stage_model.transformer.{name}": text[name] for name in text}
    text = openclip(text)
    text |= unused(text, made.text_encoder.hidden_size)
    return named | {f"cond_stage_model.model.{name}": array for name, array in text.items()}


def mindone_name(name: str) -> str:
    """MindONE's name of an original one, the text encoder's in OpenCLIP's form."""
    module, _, leaf = name.rpartition(".")
    norm = {"weight": "gamma", "bias": "beta"}.get(leaf, leaf)
    if name.startswith("model.diffusion_model."):
        if re.search(r"\.(in|out)_layers\.0$", module):
            return f"{module[:-2]}_norm.{norm}"
        if re.search(r"\.(in_layers\.2|out_layers\.3)$", module):
            return f"{module[:-2]}_conv.conv.{leaf}"
        if re.search(r"(input_blocks\.0\.0|\.op|\.skip_connection|\.out\.2|\d\.conv)$", module):
            return f"{module}.conv.{leaf}"
        if re.search(r"(\.norm[123]?|\.out\.0)$", module):
            return f"{module}.{norm}"
        return name
    if name.startswith("first_stage_model."):
        is_norm = re.search(r"\.(norm[12]?|norm_out)$", module)
        return f"{module}.{norm}" if is_norm else name
    name = name.replace("transformer.resblocks", "transformer_layer.resblocks")
    name = name.replace("token_embedding.weight", "embedding_table")
    name = name.replace(".attn.in_proj_", ".attn.attn.in_proj.")
    name = name.replace(".attn.out_proj.", ".attn.attn.out_proj.").replace(".mlp.c_", ".c_")
    if re.search(r"\.ln_(1|2|final)$", module):
        name = f"{name.rpartition('.')[0]}.{norm}"
    return name


def mindone(model: str | Model, found: Mapping[str, Arrays] | None = None) -> Arrays:
    """All tensors under MindONE's names, the embedding tables in float16."""
    found = found or weights(model)
    named = {
        mindone_name(name): array
        for name, array in original(model, found).items()
        if not name.startswith("cond_stage_model.")
    }
    for name, array in openclip(found["text_encoder"]).items():
        theirs = mindone_name(f"cond_stage_model.transformer.{name}")
        half = "embedding" in theirs
        named[theirs] = array.astype(np.float16) if half else array
    return named


# ---- files


def safetensors_bytes(
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    dtype: str | None = None,
) -> bytes:
    """A safetensors file; floats are stored as `dtype`, if it is given."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    content, position = [], 0
    for name, array in tensors.items():
        kind, data = _stored(np.asarray(array), dtype)
        header[name] = {
            "dtype": kind,
            "shape": list(np.shape(array)),
            "data_offsets": [position, position + len(data)],
        }
        content.append(data)
        position += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(content)


def _stored(array: np.ndarray, dtype: str | None) -> tuple[str, bytes]:
    if array.dtype.kind != "f":
        return f"{array.dtype.kind.upper()}{8 * array.itemsize}", array.tobytes()
    kind = dtype or f"F{8 * array.itemsize}"
    if kind == "BF16":
        return kind, (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return kind, array.astype({"F16": np.float16, "F32": np.float32, "F64": float}[kind]).tobytes()


def write_safetensors(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    dtype: str | None = None,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors_bytes(tensors, metadata, dtype))
    return path


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], **metadata: str) -> Path:
    """A float16 safetensors file of zeros that takes no room on the disk, however large."""
    header: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape, dtype=np.int64))
        offsets = [position, position + size]
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": offsets}
        position += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return path


def number(value: int) -> bytes:
    """A protobuf varint."""
    out = bytearray()
    while value > 127:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def field(tag: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return number(8 * tag + 2) + number(len(content)) + content


def value(name: str, kind: str, shape: tuple[int, ...], content: bytes) -> bytes:
    """One `Value` of a checkpoint."""
    dims = b"".join(number(8) + number(size) for size in shape)
    tensor = dims + field(2, kind.encode()) + field(3, content)
    return field(1, field(1, name.encode()) + field(2, tensor))


KINDS = {"float16": "Float16", "float32": "Float32", "float64": "Float64", "int64": "Int64"}


def ckpt_bytes(
    tensors: Mapping[str, np.ndarray], parts: int = 1, crc: bool = False, after: bytes = b""
) -> bytes:
    """A MindSpore checkpoint; tensors of more than one row in that many Values."""
    out = []
    for name, array in tensors.items():
        flat = np.ascontiguousarray(array).reshape(-1)
        for piece in np.array_split(flat, parts) if flat.size >= parts else [flat]:
            out.append(value(name, KINDS[array.dtype.name], array.shape, piece.tobytes()))
    content = b"".join([*out, after])
    if crc:
        content += b"crc_num" + zlib.crc32(content).to_bytes(10, "big")
    return content


APPENDED = b"".join(
    (
        value("lora_rank", "Int64", (), np.int64(4).tobytes()),
        value("epoch_num", "Int64", (), np.int64(4).tobytes()),
        value("learning_rate", "Float32", (), np.float32(0.5).tobytes()),
        value("note", "str", (0,), "made up".encode("utf-32-le")),
    )
)
"""What `append_dict` of `mindspore.save_checkpoint` leaves in a file."""


def write_folder(
    folder: Path,
    found: Mapping[str, Arrays],
    dtype: str | None = None,
    rename: Callable[[str], str] = str,
    suffix: str = ".safetensors",
    prediction_type: str | None = None,
) -> Path:
    """A diffusers folder."""
    for network, arrays in found.items():
        named = {rename(name): array for name, array in arrays.items()}
        write_safetensors(folder / f"{WEIGHTS[network]}{suffix}", named, {"format": "pt"}, dtype)
    if prediction_type:
        say(folder, prediction_type)
    return folder


def say(folder: Path, prediction_type: str) -> None:
    """The scheduler's file, which says what the model predicts."""
    path = folder / "scheduler" / "scheduler_config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"prediction_type": prediction_type}))


def write_shards(folder: Path, found: Mapping[str, Arrays]) -> Path:
    """A diffusers folder with each network in three files and an index."""
    for network, arrays in found.items():
        stem = folder / WEIGHTS[network]
        weight_map = {}
        for i, names in enumerate(np.array_split(list(arrays), 3)):
            shard = stem.with_name(f"{stem.name}-0000{i + 1}-of-00003.safetensors")
            write_safetensors(shard, {name: arrays[name] for name in names})
            weight_map |= {str(name): shard.name for name in names}
        index = stem.with_name(f"{stem.name}.safetensors.index.json")
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# ---- LoRAs

Matrices = tuple[np.ndarray, np.ndarray]
"""Down and up of a module."""
Lora = dict[tuple[str, str], Matrices]
"""By network and module path in diffusers or transformers."""

ATTENTION = r".*\.attn[12]\.to_(q|k|v|out\.0)|.*\.self_attn\.(q|k|v|out)_proj"
ALL = rf"{ATTENTION}|.*\.attentions\.\d\.proj_(in|out)|.*\.ff\.net\.(0\.proj|2)|.*\.mlp\.fc[12]"
CONVOLUTIONS = r".*\.(conv1|conv2|conv_shortcut|time_emb_proj|conv)"


def lora(model: str, modules: str, rank: int = 2, seed: int = 0, shared: bool = False) -> Lora:
    """Random matrices for the modules of UNet and text encoder whose path matches `modules`.

    With `shared`, q, k and v of a layer of the text encoder have one down matrix.
    """
    rng = np.random.default_rng(seed)
    found: Lora = {}
    for network in ("unet", "text_encoder"):
        downs: Arrays = {}
        for name, shape in shapes(model)[network].items():
            module = name.removesuffix(".weight")
            if module == name or not re.fullmatch(modules, module):
                continue
            layer = re.sub(r"self_attn\.[qkv]_proj", "in_proj", module) if shared else module
            if layer not in downs:
                downs[layer] = exact(rng, (rank, *shape[1:]))
            up = exact(rng, (shape[0], rank, *(1 for _ in shape[2:])))
            found[network, module] = downs[layer], up
    return found


def kohya(
    lora: Lora,
    alpha: float | None = None,
    text: str = "lora_te",
    original_names: bool = False,
    model: str = "sd1",
) -> Arrays:
    """kohya-ss/sd-scripts."""
    found: Arrays = {}
    for (network, module), (down, up) in lora.items():
        if original_names and network == "unet":
            module = original_unet(f"{module}.weight", MODELS[model]).removesuffix(".weight")
        name = ("lora_unet_" if network == "unet" else f"{text}_") + module.replace(".", "_")
        found |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            found[f"{name}.alpha"] = np.array(alpha, np.float32)
    return found


def processors(lora: Lora) -> Arrays:
    """diffusers until 0.20."""
    found: Arrays = {}
    for (network, module), (down, up) in lora.items():
        path, _, leaf = module.removesuffix(".0").rpartition(".")
        leaf = leaf.removeprefix("to_").removesuffix("_proj")
        middle = ".processor" if network == "unet" else ""
        for part, matrix in (("down", down), ("up", up)):
            found[f"{network}.{path}{middle}.to_{leaf}_lora.{part}.weight"] = matrix
    return found


def diffusers(lora: Lora) -> Arrays:
    """What `train_text_to_image_lora.py` and `train_dreambooth_lora.py` saved."""
    found: Arrays = {}
    for (network, module), (down, up) in lora.items():
        middle = "lora" if network == "unet" else "lora_linear_layer"
        for part, matrix in (("down", down), ("up", up)):
            found[f"{network}.{module}.{middle}.{part}.weight"] = matrix
    return found


def peft(lora: Lora, prefix: str = "{network}.") -> Arrays:
    """PEFT, and what `save_lora_weights` of today's diffusers writes."""
    found: Arrays = {}
    for (network, module), (down, up) in lora.items():
        name = prefix.format(network=network) + module
        found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return found


def mindone_lora(lora: Lora, model: str = "sd1") -> Arrays:
    """MindONE's checkpoint; q, k and v of a text encoder must share their down matrix."""
    found: Arrays = {}
    block = "cond_stage_model.transformer.transformer_layer.resblocks"
    for (network, module), (down, up) in lora.items():
        if network == "unet":
            name = original_unet(f"{module}.weight", MODELS[model]).removesuffix(".weight")
            name = f"model.diffusion_model.{name}"
        else:
            layer, leaf = module.split(".")[3], module.rpartition(".")[2]
            if leaf in ("k_proj", "v_proj"):
                continue
            name = f"{block}.{layer}.attn.attn.out_proj"
            if leaf == "q_proj":
                name = f"{block}.{layer}.attn.attn.in_proj"
                sides = [lora[network, module.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                assert all(side[0] is down for side in sides)
                up = np.vstack([side[1] for side in sides])
        found |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return found | {"lora_rank": np.array(len(down), np.int64)}
