"""The names that LoRA files give to a module's matrices, in every dialect.

| dialect | example |
|---|---|
| kohya | `lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight` |
| kohya, original names | `lora_unet_input_blocks_1_1_proj_in.lora_down.weight` |
| diffusers, processors | `unet.….attn1.processor.to_q_lora.down.weight` |
| diffusers | `unet.….attn1.to_q.lora.down.weight`, `….q_proj.lora_linear_layer.down.weight` |
| PEFT | `unet.….attn1.to_q.lora_A.weight` |
| MindONE | `model.diffusion_model.input_blocks.1.1.….to_q.lora_down.weight` |

Sources: kohya-ss/sd-scripts `networks/lora.py`, diffusers `loaders/lora_conversion_utils.py` and
`utils/state_dict_utils.py`, MindONE `examples/stable_diffusion_v2`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from weights import names
from weights.names import Piece

KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}


@dataclass(frozen=True)
class Key:
    """What one key of a LoRA file means."""

    dialect: str
    network: str
    """"unet" or "text_encoder"."""
    module: str
    """Module path in diffusers or transformers."""
    part: str
    """"down", "up" or "alpha"."""
    piece: Piece | None = None
    """Of a fused module's up matrix, which part is this module's."""


def parse(key: str) -> list[Key]:
    """The modules that a key belongs to: three for a fused one, none if it is not understood."""
    for read in (_kohya, _mindone, _diffusers):
        if found := read(key):
            return found
    return []


_KOHYA = re.compile(r"lora_(unet|te1?)_(\w+)\.(?:lora_(down|up)\.weight|(alpha))")
_ORIGINAL = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "out.")


def _kohya(key: str) -> list[Key]:
    match = _KOHYA.fullmatch(key)
    if match is None:
        return []
    dotted = names.with_dots(match[2])
    network = "unet" if match[1] == "unet" else "text_encoder"
    dialect = "kohya"
    if dotted is not None and network == "unet" and dotted.startswith(_ORIGINAL):
        dotted = names.translate(dotted, names.backwards(names.unet_modules()))
        dialect = "kohya, original names"
    if dotted is None:
        return []
    if network == "text_encoder":
        dotted = names.current_text(dotted)
    return [Key(dialect, network, dotted, match[3] or match[4])]


_MINDONE = re.compile(
    r"((?:model\.diffusion_model|cond_stage_model)\..+)\.lora_(down|up|A|B)\.weight"
)
_PARTS = {"down": "down", "A": "down", "up": "up", "B": "up"}


def _mindone(key: str) -> list[Key]:
    match = _MINDONE.fullmatch(key)
    if match is None:
        return []
    original = names.from_mindone(f"{match[1]}.weight")
    part = _PARTS[match[2]]
    if original.startswith("model.diffusion_model."):
        inside = original.removeprefix("model.diffusion_model.")
        name = names.translate(inside, names.backwards(names.unet_modules()))
        if name is None:
            return []
        return [Key("MindONE", "unet", name.removesuffix(".weight"), part)]
    inside = re.sub(r"cond_stage_model\.(transformer|model)\.", "", original)
    return [
        Key("MindONE", "text_encoder", name.removesuffix(".weight"), part, piece)
        for name, piece in names.from_openclip(inside)
    ]


PEFT_PREFIX = "base_model.model."
"""What PEFT's own files begin every key with."""

_PROCESSOR = re.compile(r"(.+)\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight")
_TEXT_PROCESSOR = re.compile(r"(.+\.self_attn)\.to_(q|k|v|out)_lora\.(down|up)\.weight")
_DIFFUSERS = re.compile(r"(.+)\.(?:lora|lora_linear_layer)\.(down|up)\.weight")
_PEFT = re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.weight")
_ALPHA = re.compile(r"(.+)\.alpha")
_TEXT_PREFIXES = ("text_model.", "encoder.layers.", "embeddings.", "final_layer_norm.")
_UNET_PREFIXES = ("down_blocks.", "mid_block.", "up_blocks.", "conv_", "time_embedding.")


def _diffusers(key: str) -> list[Key]:
    network, path = _network(key.removeprefix(PEFT_PREFIX))
    if network is None:
        return []
    if match := _PROCESSOR.fullmatch(path):
        leaf = "to_out.0" if match[2] == "out" else f"to_{match[2]}"
        found = Key("diffusers, processors", network, f"{match[1]}.{leaf}", match[3])
    elif match := _TEXT_PROCESSOR.fullmatch(path):
        found = Key("diffusers, processors", network, f"{match[1]}.{match[2]}_proj", match[3])
    elif match := _DIFFUSERS.fullmatch(path):
        found = Key("diffusers", network, match[1], match[2])
    elif match := _PEFT.fullmatch(path):
        found = Key("PEFT", network, match[1], _PARTS[match[2]])
    elif match := _ALPHA.fullmatch(path):
        found = Key("diffusers", network, match[1], "alpha")
    else:
        return []
    return [found]


def _network(key: str) -> tuple[str | None, str]:
    """Which network a key belongs to, and the rest of it."""
    for network in ("unet", "text_encoder"):
        if key.startswith(f"{network}."):
            path = key.removeprefix(f"{network}.")
            return network, names.current_text(path) if network == "text_encoder" else path
    if key.startswith(_TEXT_PREFIXES):
        return "text_encoder", names.current_text(key)
    return ("unet", key) if key.startswith(_UNET_PREFIXES) else (None, key)


def kohya(network: str, module: str) -> str:
    """`unet`, `down_blocks.0.attn1.to_q` → `lora_unet_down_blocks_0_attn1_to_q`."""
    return f"{KOHYA_PREFIXES[network]}_{module.replace('.', '_')}"


FOREIGN = (
    (r"lora_te2_|text_encoder_2\.|.*(label_emb|add_embedding)", "for Stable Diffusion XL"),
    (r"lora_unet_(input|output|down|up|mid)\w+transformer_blocks_[1-9]", "for Stable Diffusion XL"),
    (r"(unet|model\.diffusion_model)\..*\.transformer_blocks\.[1-9]", "for Stable Diffusion XL"),
    (r"lora_te3_|text_encoder_3\.|lora_unet_joint_blocks", "for Stable Diffusion 3"),
    (r"lora_unet_(double|single)_blocks|.*single_transformer_blocks", "for Flux"),
    (r"transformer\.|lora_transformer_", "for a transformer model (Stable Diffusion 3, Flux)"),
    (r".*\.hada_w[12]", "a LoHa, not a LoRA"),
    (r".*\.lokr_w[12]", "a LoKr, not a LoRA"),
    (r".*\.(oft_blocks|oft_diag)", "an OFT, not a LoRA"),
    (r".*\.(dora_scale|lora_magnitude_vector)", "a DoRA, not a LoRA"),
    (r".*\.lora_mid\.", "a LoCon with CP decomposition, which is not supported"),
    (r".*\.(diff|diff_b)$", "of full weight differences, not a LoRA"),
)
"""Files that are known and not read: pattern of a key, what the file is."""

BASE_MODEL = re.compile(
    r"model\.diffusion_model\.(?!.*lora)|first_stage_model\.|cond_stage_model\.(?!.*lora)"
)
"""Keys of a base model."""
