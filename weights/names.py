"""One tensor, three names: diffusers, the original Stable Diffusion files, and MindONE.

All functions are pure. The originals are those of CompVis and Stability AI; MindONE's are the
originals with MindSpore's layer names. Inside a transformer block all three agree.
Sources: diffusers' `convert_original_stable_diffusion_to_diffusers.py` and MindONE's
`tools/model_conversion`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

Piece = tuple[int, int]
"""(index, number): the part of a fused tensor along its first axis."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


@cache
def unet_modules(
    levels: int = 4,
    layers: int = 2,
    attends: tuple[bool, ...] = (True, True, True, False),
) -> dict[str, str]:
    """Module path in diffusers → in the original, without "model.diffusion_model.".

    For a transformer the path of the whole; what is inside has the same name in both. The
    defaults are those of every Stable Diffusion 1.x and 2.x.
    """
    found = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    for i in range(levels):
        for j in range(layers):
            block = (layers + 1) * i + j + 1
            resnets[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{block}.0"
            found[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{block}.1"
        for j in range(layers + 1):
            block = (layers + 1) * i + j
            resnets[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{block}.0"
            if attends[-1 - i]:
                found[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{block}.1"
        if i < levels - 1:
            down = (layers + 1) * (i + 1)
            found[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{down}.0.op"
            up = f"output_blocks.{(layers + 1) * i + layers}.{2 if attends[-1 - i] else 1}"
            found[f"up_blocks.{i}.upsamplers.0.conv"] = f"{up}.conv"
    for ours, theirs in resnets.items():
        found |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in _RESNET.items()}
    return found


@cache
def vae_modules(levels: int = 4, layers: int = 2) -> dict[str, str]:
    """Module path in diffusers → in the original, without "first_stage_model."."""
    found = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    resnets = {}
    for half in ("encoder", "decoder"):
        found |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        found[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        attention = f"{half}.mid_block.attentions.0"
        for ours, theirs in (
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
        ):
            found[f"{attention}.{ours}"] = f"{half}.mid.attn_1.{theirs}"
        for j in (0, 1):
            resnets[f"{half}.mid_block.resnets.{j}"] = f"{half}.mid.block_{j + 1}"
    for i in range(levels):
        for j in range(layers):
            resnets[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
        up = f"decoder.up.{levels - 1 - i}"
        for j in range(layers + 1):
            resnets[f"decoder.up_blocks.{i}.resnets.{j}"] = f"{up}.block.{j}"
        if i < levels - 1:
            found[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = (
                f"encoder.down.{i}.downsample.conv"
            )
            found[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"{up}.upsample.conv"
    inner = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
    inner["conv_shortcut"] = "nin_shortcut"
    for ours, theirs in resnets.items():
        found |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in inner.items()}
    return found


@cache
def inverse(modules: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """The table read from right to left."""
    return {theirs: ours for ours, theirs in modules}


def backwards(modules: Mapping[str, str]) -> dict[str, str]:
    """`unet_modules` or `vae_modules` from the original to diffusers."""
    return inverse(tuple(modules.items()))


def translate(name: str, modules: Mapping[str, str]) -> str | None:
    """A dotted name with its longest prefix in `modules` replaced; None if there is none."""
    prefix = name
    while prefix:
        if prefix in modules:
            return modules[prefix] + name[len(prefix) :]
        prefix = prefix.rpartition(".")[0]
    return None


# ---- diffusers and transformers, old and new

_OLD_VAE = re.compile(r"(mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.")
_NEW_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current_vae(name: str) -> str:
    """The name that diffusers gave to the autoencoder's attention before 0.18 → today's."""
    return _OLD_VAE.sub(lambda match: f"{match[1]}.{_NEW_VAE[match[2]]}.", name)


def current_text(name: str) -> str:
    """A text encoder's name with the prefix "text_model.", which some versions leave out."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


# ---- the text encoder in the original OpenCLIP form (SD 2.x) and in MindONE's

_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_CLIP_OTHER = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
FUSED = ("q_proj", "k_proj", "v_proj")
"""The order in which `in_proj` holds them, along its first axis."""


def from_openclip(name: str) -> list[tuple[str, Piece | None]]:
    """Names in transformers of an OpenCLIP tensor: three for a fused one, none if unknown."""
    if name in _CLIP_OTHER:
        return [(_CLIP_OTHER[name], None)]
    match = _RESBLOCK.fullmatch(name)
    if match is None:
        return []
    layer = f"text_model.encoder.layers.{match[1]}"
    if match[2] in ("attn.in_proj_weight", "attn.in_proj_bias"):
        leaf = match[2].rpartition("_")[2]
        return [(f"{layer}.self_attn.{part}.{leaf}", (i, 3)) for i, part in enumerate(FUSED)]
    inner, _, leaf = match[2].rpartition(".")
    if inner not in _CLIP_LAYER:
        return []
    return [(f"{layer}.{_CLIP_LAYER[inner]}.{leaf}", None)]


def to_openclip(name: str) -> str:
    """The OpenCLIP tensor that holds this one of transformers, whole or as a third."""
    for theirs, ours in _CLIP_OTHER.items():
        if name == ours:
            return theirs
    match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    assert match, name
    layer, inner, leaf = match.groups()
    if inner.removeprefix("self_attn.") in FUSED:
        return f"transformer.resblocks.{layer}.attn.in_proj_{leaf}"
    theirs = next(a for a, b in _CLIP_LAYER.items() if b == inner)
    return f"transformer.resblocks.{layer}.{theirs}.{leaf}"


# ---- MindONE: the original names with MindSpore's layers

_TEXT = "cond_stage_model.transformer."
_TO_MINDONE: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "model.diffusion_model.",
        (
            (r"(\.in_layers|\.out_layers)\.0\.weight$", r"\1_norm.gamma"),
            (r"(\.in_layers|\.out_layers)\.0\.bias$", r"\1_norm.beta"),
            (r"(\.in_layers\.2|\.out_layers\.3)\.(weight|bias)$", r"\1_conv.conv.\2"),
            (r"(\.in_layers|\.out_layers)\.[23]_conv", r"\1_conv"),
            (r"(\.skip_connection|\.op)\.(weight|bias)$", r"\1.conv.\2"),
            (r"(blocks\.\d+\.\d+\.conv)\.(weight|bias)$", r"\1.conv.\2"),
            (r"(input_blocks\.0\.0|\.out\.2)\.(weight|bias)$", r"\1.conv.\2"),
            (r"(\.norm\d?|\.out\.0)\.weight$", r"\1.gamma"),
            (r"(\.norm\d?|\.out\.0)\.bias$", r"\1.beta"),
        ),
    ),
    (
        "first_stage_model.",
        (
            (r"(\.norm\d?|\.norm_out)\.weight$", r"\1.gamma"),
            (r"(\.norm\d?|\.norm_out)\.bias$", r"\1.beta"),
        ),
    ),
    (
        _TEXT,
        (
            (r"token_embedding\.weight$", "embedding_table"),
            (r"transformer\.transformer\.resblocks", "transformer.transformer_layer.resblocks"),
            (r"attn\.in_proj_(weight|bias)$", r"attn.attn.in_proj.\1"),
            (r"attn\.out_proj\.", "attn.attn.out_proj."),
            (r"mlp\.(c_fc|c_proj)\.", r"\1."),
            (r"(ln_1|ln_2|ln_final)\.weight$", r"\1.gamma"),
            (r"(ln_1|ln_2|ln_final)\.bias$", r"\1.beta"),
        ),
    ),
)
_FROM_MINDONE: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "model.diffusion_model.",
        (
            (r"\.gamma$", ".weight"),
            (r"\.beta$", ".bias"),
            (r"(\.in_layers|\.out_layers)_norm\.", r"\1.0."),
            (r"\.in_layers_conv\.conv\.", ".in_layers.2."),
            (r"\.out_layers_conv\.conv\.", ".out_layers.3."),
            (r"\.conv\.(weight|bias)$", r".\1"),
        ),
    ),
    ("first_stage_model.", ((r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))),
    (
        _TEXT,
        (
            (r"embedding_table$", "token_embedding.weight"),
            (r"\.transformer_layer\.resblocks", ".transformer.resblocks"),
            (r"attn\.attn\.in_proj\.(weight|bias)$", r"attn.in_proj_\1"),
            (r"attn\.attn\.out_proj\.", "attn.out_proj."),
            (r"(resblocks\.\d+)\.(c_fc|c_proj)\.", r"\1.mlp.\2."),
            (r"\.gamma$", ".weight"),
            (r"\.beta$", ".bias"),
        ),
    ),
)


def to_mindone(name: str) -> str:
    """An original name, the text encoder's in OpenCLIP form under `cond_stage_model.transformer.`,
    → the one in MindONE's checkpoint."""
    return _substitute(name, _TO_MINDONE)


def from_mindone(name: str) -> str:
    """The inverse of `to_mindone`."""
    return _substitute(name, _FROM_MINDONE)


def _substitute(name: str, tables: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]) -> str:
    for prefix, rules in tables:
        if name.startswith(prefix):
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
    return name


# ---- kohya: dots become underscores

_WORDS = (
    *("down_blocks", "mid_block", "up_blocks", "attentions", "transformer_blocks", "resnets"),
    *("downsamplers", "upsamplers", "proj_in", "proj_out", "attn1", "attn2"),
    *("to_q", "to_k", "to_v", "to_out", "ff", "net", "proj"),
    *("conv_in", "conv_out", "conv_norm_out", "conv_shortcut", "conv1", "conv2", "conv"),
    *("time_emb_proj", "time_embedding", "linear_1", "linear_2"),
    *("text_model", "encoder", "layers", "self_attn", "mlp"),
    *("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    *("input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers"),
    *("emb_layers", "skip_connection", "op", "time_embed", "out"),
)
_WORD = re.compile("(" + "|".join(sorted(_WORDS, key=len, reverse=True)) + r"|\d+)(_|$)")


def with_dots(name: str) -> str | None:
    """`down_blocks_0_attentions_1_proj_in` → `down_blocks.0.attentions.1.proj_in`.

    None if a part is no word of the networks' vocabulary.
    """
    parts, position = [], 0
    while position < len(name):
        match = _WORD.match(name, position)
        if match is None:
            return None
        parts.append(match[1])
        position = match.end()
    return ".".join(parts)
