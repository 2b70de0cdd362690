"""Names, written out by hand from the published files and counted."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from diffusion.config import load_model_config
from tests.weights import made
from weights import convert, dialects, files, lora, names, structure
from weights.base import open_base

# Of each kind of tensor one: diffusers, the original, MindONE.
UNET = [
    ("conv_in.weight", "input_blocks.0.0.weight", "input_blocks.0.0.conv.weight"),
    ("conv_in.bias", "input_blocks.0.0.bias", "input_blocks.0.0.conv.bias"),
    ("time_embedding.linear_1.weight", "time_embed.0.weight", "time_embed.0.weight"),
    ("time_embedding.linear_2.bias", "time_embed.2.bias", "time_embed.2.bias"),
    (
        "down_blocks.0.resnets.0.norm1.weight",
        "input_blocks.1.0.in_layers.0.weight",
        "input_blocks.1.0.in_layers_norm.gamma",
    ),
    (
        "down_blocks.0.resnets.1.conv1.bias",
        "input_blocks.2.0.in_layers.2.bias",
        "input_blocks.2.0.in_layers_conv.conv.bias",
    ),
    (
        "down_blocks.1.resnets.0.time_emb_proj.weight",
        "input_blocks.4.0.emb_layers.1.weight",
        "input_blocks.4.0.emb_layers.1.weight",
    ),
    (
        "down_blocks.1.resnets.0.conv_shortcut.weight",
        "input_blocks.4.0.skip_connection.weight",
        "input_blocks.4.0.skip_connection.conv.weight",
    ),
    (
        "down_blocks.3.resnets.1.norm2.bias",
        "input_blocks.11.0.out_layers.0.bias",
        "input_blocks.11.0.out_layers_norm.beta",
    ),
    (
        "down_blocks.2.resnets.1.conv2.weight",
        "input_blocks.8.0.out_layers.3.weight",
        "input_blocks.8.0.out_layers_conv.conv.weight",
    ),
    (
        "down_blocks.0.downsamplers.0.conv.weight",
        "input_blocks.3.0.op.weight",
        "input_blocks.3.0.op.conv.weight",
    ),
    (
        "down_blocks.2.downsamplers.0.conv.bias",
        "input_blocks.9.0.op.bias",
        "input_blocks.9.0.op.conv.bias",
    ),
    (
        "down_blocks.0.attentions.0.norm.weight",
        "input_blocks.1.1.norm.weight",
        "input_blocks.1.1.norm.gamma",
    ),
    (
        "down_blocks.2.attentions.1.proj_in.weight",
        "input_blocks.8.1.proj_in.weight",
        "input_blocks.8.1.proj_in.weight",
    ),
    (
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
    ),
    (
        "mid_block.attentions.0.transformer_blocks.0.norm3.bias",
        "middle_block.1.transformer_blocks.0.norm3.bias",
        "middle_block.1.transformer_blocks.0.norm3.beta",
    ),
    (
        "mid_block.resnets.0.conv1.weight",
        "middle_block.0.in_layers.2.weight",
        "middle_block.0.in_layers_conv.conv.weight",
    ),
    (
        "mid_block.resnets.1.norm1.weight",
        "middle_block.2.in_layers.0.weight",
        "middle_block.2.in_layers_norm.gamma",
    ),
    (
        "up_blocks.0.resnets.2.conv_shortcut.bias",
        "output_blocks.2.0.skip_connection.bias",
        "output_blocks.2.0.skip_connection.conv.bias",
    ),
    (
        "up_blocks.0.upsamplers.0.conv.weight",
        "output_blocks.2.1.conv.weight",
        "output_blocks.2.1.conv.conv.weight",
    ),
    (
        "up_blocks.1.upsamplers.0.conv.bias",
        "output_blocks.5.2.conv.bias",
        "output_blocks.5.2.conv.conv.bias",
    ),
    (
        "up_blocks.2.upsamplers.0.conv.weight",
        "output_blocks.8.2.conv.weight",
        "output_blocks.8.2.conv.conv.weight",
    ),
    (
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.bias",
        "output_blocks.3.1.transformer_blocks.0.attn1.to_out.0.bias",
        "output_blocks.3.1.transformer_blocks.0.attn1.to_out.0.bias",
    ),
    (
        "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj.weight",
        "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight",
        "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight",
    ),
    (
        "up_blocks.3.attentions.1.proj_out.bias",
        "output_blocks.10.1.proj_out.bias",
        "output_blocks.10.1.proj_out.bias",
    ),
    ("conv_norm_out.weight", "out.0.weight", "out.0.gamma"),
    ("conv_norm_out.bias", "out.0.bias", "out.0.beta"),
    ("conv_out.weight", "out.2.weight", "out.2.conv.weight"),
]
VAE = [
    ("quant_conv.weight", "quant_conv.weight", "quant_conv.weight"),
    ("post_quant_conv.bias", "post_quant_conv.bias", "post_quant_conv.bias"),
    ("encoder.conv_in.weight", "encoder.conv_in.weight", "encoder.conv_in.weight"),
    ("encoder.conv_norm_out.weight", "encoder.norm_out.weight", "encoder.norm_out.gamma"),
    ("decoder.conv_norm_out.bias", "decoder.norm_out.bias", "decoder.norm_out.beta"),
    ("decoder.conv_out.bias", "decoder.conv_out.bias", "decoder.conv_out.bias"),
    (
        "encoder.down_blocks.1.resnets.0.norm1.weight",
        "encoder.down.1.block.0.norm1.weight",
        "encoder.down.1.block.0.norm1.gamma",
    ),
    (
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.down.1.block.0.nin_shortcut.weight",
    ),
    (
        "encoder.down_blocks.2.downsamplers.0.conv.bias",
        "encoder.down.2.downsample.conv.bias",
        "encoder.down.2.downsample.conv.bias",
    ),
    (
        "encoder.mid_block.resnets.1.conv2.weight",
        "encoder.mid.block_2.conv2.weight",
        "encoder.mid.block_2.conv2.weight",
    ),
    (
        "decoder.mid_block.attentions.0.group_norm.bias",
        "decoder.mid.attn_1.norm.bias",
        "decoder.mid.attn_1.norm.beta",
    ),
    (
        "decoder.mid_block.attentions.0.to_k.weight",
        "decoder.mid.attn_1.k.weight",
        "decoder.mid.attn_1.k.weight",
    ),
    (
        "encoder.mid_block.attentions.0.to_out.0.bias",
        "encoder.mid.attn_1.proj_out.bias",
        "encoder.mid.attn_1.proj_out.bias",
    ),
    (
        "decoder.up_blocks.0.resnets.2.norm2.bias",
        "decoder.up.3.block.2.norm2.bias",
        "decoder.up.3.block.2.norm2.beta",
    ),
    (
        "decoder.up_blocks.2.upsamplers.0.conv.weight",
        "decoder.up.1.upsample.conv.weight",
        "decoder.up.1.upsample.conv.weight",
    ),
]
# Of these the original is OpenCLIP's.
LAYER, BLOCK = "text_model.encoder.layers.7.", "transformer.resblocks.7."
THEIR_BLOCK = "transformer_layer.resblocks.7."
TEXT = [
    (
        "text_model.embeddings.token_embedding.weight",
        "token_embedding.weight",
        "embedding_table",
    ),
    (
        "text_model.embeddings.position_embedding.weight",
        "positional_embedding",
        "positional_embedding",
    ),
    ("text_model.final_layer_norm.weight", "ln_final.weight", "ln_final.gamma"),
    ("text_model.final_layer_norm.bias", "ln_final.bias", "ln_final.beta"),
    (f"{LAYER}layer_norm1.weight", f"{BLOCK}ln_1.weight", f"{THEIR_BLOCK}ln_1.gamma"),
    (f"{LAYER}layer_norm2.bias", f"{BLOCK}ln_2.bias", f"{THEIR_BLOCK}ln_2.beta"),
    (f"{LAYER}mlp.fc1.weight", f"{BLOCK}mlp.c_fc.weight", f"{THEIR_BLOCK}c_fc.weight"),
    (f"{LAYER}mlp.fc2.bias", f"{BLOCK}mlp.c_proj.bias", f"{THEIR_BLOCK}c_proj.bias"),
    (
        f"{LAYER}self_attn.out_proj.weight",
        f"{BLOCK}attn.out_proj.weight",
        f"{THEIR_BLOCK}attn.attn.out_proj.weight",
    ),
    (
        f"{LAYER}self_attn.k_proj.weight",
        f"{BLOCK}attn.in_proj_weight",
        f"{THEIR_BLOCK}attn.attn.in_proj.weight",
    ),
    (
        f"{LAYER}self_attn.v_proj.bias",
        f"{BLOCK}attn.in_proj_bias",
        f"{THEIR_BLOCK}attn.attn.in_proj.bias",
    ),
]


@pytest.mark.parametrize(("ours", "theirs", "mindone"), UNET)
def test_names_of_the_unet(ours: str, theirs: str, mindone: str) -> None:
    prefix = "model.diffusion_model."
    assert ours in structure.unet_shapes(load_model_config("sd15").unet)
    table = names.unet_modules()
    assert names.translate(ours, table) == theirs
    assert names.translate(theirs, names.backwards(table)) == ours
    assert names.to_mindone(prefix + theirs) == prefix + mindone
    assert names.from_mindone(prefix + mindone) == prefix + theirs


@pytest.mark.parametrize(("ours", "theirs", "mindone"), VAE)
def test_names_of_the_autoencoder(ours: str, theirs: str, mindone: str) -> None:
    prefix = "first_stage_model."
    assert ours in structure.vae_shapes(load_model_config("sd15").vae)
    table = names.vae_modules()
    assert names.translate(ours, table) == theirs
    assert names.translate(theirs, names.backwards(table)) == ours
    assert names.to_mindone(prefix + theirs) == prefix + mindone
    assert names.from_mindone(prefix + mindone) == prefix + theirs


@pytest.mark.parametrize(("ours", "theirs", "mindone"), TEXT)
def test_names_of_the_text_encoder(ours: str, theirs: str, mindone: str) -> None:
    prefix = "cond_stage_model.transformer."
    assert ours in structure.text_encoder_shapes(load_model_config("sd15").text_encoder)
    assert names.to_openclip(ours) == theirs
    assert ours in [name for name, _ in names.from_openclip(theirs)]
    assert names.to_mindone(prefix + theirs) == prefix + mindone
    assert names.from_mindone(prefix + mindone) == prefix + theirs


def test_a_fused_projection_holds_q_k_and_v_in_this_order() -> None:
    attention = "text_model.encoder.layers.3.self_attn"
    assert names.from_openclip("transformer.resblocks.3.attn.in_proj_bias") == [
        (f"{attention}.q_proj.bias", (0, 3)),
        (f"{attention}.k_proj.bias", (1, 3)),
        (f"{attention}.v_proj.bias", (2, 3)),
    ]


def test_the_attention_sites_of_a_unet() -> None:
    sites = {
        **{f"down_blocks.{i}.attentions.{j}": f"input_blocks.{3 * i + j + 1}.1"
           for i in range(3) for j in range(2)},
        "mid_block.attentions.0": "middle_block.1",
        **{f"up_blocks.{i}.attentions.{j}": f"output_blocks.{3 * i + j}.1"
           for i in (1, 2, 3) for j in range(3)},
    }  # fmt: skip
    assert sorted(sites.values(), key=lambda site: (site[0] != "i", len(site), site)) == [
        *(f"input_blocks.{n}.1" for n in (1, 2, 4, 5, 7, 8)),
        "middle_block.1",
        *(f"output_blocks.{n}.1" for n in range(3, 12)),
    ]
    assert {ours: names.translate(ours, names.unet_modules()) for ours in sites} == sites


# ---- counted


COUNTS = {"sd1": (686, 248, 196), "sd2": (686, 248, 372)}
ORIGINAL = {"sd1": 1130, "sd2": 686 + 248 + 280 + 14}
MINDONE = {"sd1": 1082, "sd2": 1214}


@pytest.mark.parametrize("model", COUNTS)
def test_the_tensors_of_each_form_are_as_many_as_published(model: str, tmp_path: Path) -> None:
    base = open_base(made.write_folder(tmp_path / "base", made.weights(model)))
    assert tuple(len(network.shapes) for network in base.networks.values()) == COUNTS[model]
    convert.write_base(tmp_path / "out.safetensors", base, "original", {})
    assert len(files.open_tensors(tmp_path / "out.safetensors").entries) == ORIGINAL[model]
    convert.write_base(tmp_path / "out.ckpt", base, "mindone", {})
    assert len(files.open_tensors(tmp_path / "out.ckpt").entries) == MINDONE[model]


@pytest.mark.parametrize(
    ("model", "unet", "text_encoder"),
    [("sd15", 859_520_964, 123_060_480), ("sd20", 865_910_724, 340_387_840)],
)
def test_the_parameters_are_as_many_as_published(model: str, unet: int, text_encoder: int) -> None:
    config = load_model_config(model)

    def total(shapes: structure.Shapes) -> int:
        return sum(map(math.prod, shapes.values()))

    assert total(structure.unet_shapes(config.unet)) == unet
    assert total(structure.vae_shapes(config.vae)) == 83_653_863
    assert total(structure.text_encoder_shapes(config.text_encoder)) == text_encoder


# ---- kohya


KOHYA = [
    (
        "unet",
        "down_blocks.0.attentions.0.proj_in",
        "lora_unet_down_blocks_0_attentions_0_proj_in",
    ),
    (
        "unet",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    ),
    (
        "unet",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0",
    ),
    (
        "unet",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
    ),
    (
        "unet",
        "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2",
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_2",
    ),
    ("unet", "down_blocks.1.downsamplers.0.conv", "lora_unet_down_blocks_1_downsamplers_0_conv"),
    (
        "unet",
        "up_blocks.0.resnets.1.conv_shortcut",
        "lora_unet_up_blocks_0_resnets_1_conv_shortcut",
    ),
    (
        "unet",
        "mid_block.resnets.0.time_emb_proj",
        "lora_unet_mid_block_resnets_0_time_emb_proj",
    ),
    (
        "text_encoder",
        "text_model.encoder.layers.0.self_attn.q_proj",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    ),
    (
        "text_encoder",
        "text_model.encoder.layers.11.mlp.fc1",
        "lora_te_text_model_encoder_layers_11_mlp_fc1",
    ),
]


@pytest.mark.parametrize(("network", "module", "name"), KOHYA)
def test_kohya_names(network: str, module: str, name: str) -> None:
    assert dialects.kohya(network, module) == name
    (found,) = dialects.parse(f"{name}.lora_up.weight")
    assert (found.network, found.module, found.part) == (network, module, "up")


@pytest.mark.parametrize("model", ["sd15", "sd20"])
def test_every_module_comes_back_from_its_kohya_name(model: str) -> None:
    config = load_model_config(model)
    shapes = {
        "unet": structure.unet_shapes(config.unet),
        "text_encoder": structure.text_encoder_shapes(config.text_encoder),
    }
    for network, wanted in shapes.items():
        for name in wanted:
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and "norm" not in module and "embeddings" not in module:
                (found,) = dialects.parse(f"{dialects.kohya(network, module)}.alpha")
                assert (found.network, found.module) == (network, module)


@pytest.mark.parametrize(("model", "text_modules"), [("sd15", 72), ("sd20", 138)])
def test_a_whole_kohya_lora_has_as_many_tensors_as_published(model: str, text_modules: int) -> None:
    config = load_model_config(model)
    unet = lora.target_modules(structure.unet_shapes(config.unet), "transformer")
    text = lora.target_modules(structure.text_encoder_shapes(config.text_encoder), "text_encoder")
    assert (len(unet), len(text)) == (192, text_modules)
    keys = [dialects.kohya("unet", module) for module in unet]
    keys += [dialects.kohya("text_encoder", module) for module in text]
    assert 3 * len(set(keys)) == {"sd15": 792, "sd20": 990}[model]
    attention = lora.target_modules(structure.unet_shapes(config.unet), "attention")
    assert len(attention) == 128


@pytest.mark.parametrize(
    ("model", "rank", "parameters"),
    [("sd15", 4, 797_184), ("sd15", 128, 25_509_888), ("sd20", 4, 829_952)],
)
def test_an_attention_lora_is_as_large_as_published(model: str, rank: int, parameters: int) -> None:
    shapes = structure.unet_shapes(load_model_config(model).unet)
    modules = lora.target_modules(shapes, "attention")
    sizes = (lora.adapter_size(shapes[f"{module}.weight"], rank) for module in modules)
    assert sum(sizes) == parameters


def test_a_word_that_the_networks_do_not_have_is_not_guessed_at() -> None:
    assert names.with_dots("down_blocks_0_attentions_1_proj_in") == (
        "down_blocks.0.attentions.1.proj_in"
    )
    assert names.with_dots("down_blocks_0_wonders_1") is None
    assert np.array_equal(dialects.parse("lora_unet_wonder.alpha"), [])
