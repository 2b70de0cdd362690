"""Bad input ends in one sentence: the file, what was expected, what was found, what to do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.weights import made
from weights import checkpoint, convert, files, lora_files
from weights.base import open_base
from weights.files import WeightsError, open_tensors
from weights.lora import fit

ROOT = Path(__file__).parents[2]
Read = Callable[[Path], object]
ONE = {"a": np.ones((2, 3), np.float32)}
ATTENTION = made.lora("sd1", made.ATTENTION)


def says(read: Callable[[], object], path: Path | str, *words: str) -> str:
    """The sentence of the error, which begins with the path and has all of these words."""
    with pytest.raises(WeightsError) as raised:
        read()
    sentence = str(raised.value)
    assert sentence.startswith(f"{path}: ")
    assert "\n" not in sentence
    assert "; " in sentence, "what to do is missing"
    for word in words:
        assert word in sentence
    return sentence


def everything(path: Path) -> object:
    return [open_tensors(path).read(name) for name in open_tensors(path).entries]


READERS: dict[str, Read] = {"tensors": everything, "base": open_base, "lora": lora_files.read}
reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


# ---- damaged files


@reader
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "folder"])
def test_a_path_where_nothing_is(read: Read, name: str, tmp_path: Path) -> None:
    says(lambda: read(tmp_path / name), tmp_path / name, "there is no such", "check the path")


@pytest.mark.parametrize("read", [everything, lora_files.read])
def test_a_folder_where_a_file_is_expected(read: Read, tmp_path: Path) -> None:
    says(lambda: read(tmp_path), tmp_path, "this is a folder, expected a weight file")


def test_a_folder_with_nothing_of_a_base(tmp_path: Path) -> None:
    says(
        lambda: open_base(tmp_path),
        tmp_path,
        "expected unet/diffusion_pytorch_model.safetensors, found no such file",
        "name a folder in the diffusers layout",
    )


def test_a_folder_with_a_file_in_it_is_told_to_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "v1-5.safetensors").write_bytes(b"")
    says(
        lambda: open_base(tmp_path), tmp_path, f"name the file itself: {tmp_path}/v1-5.safetensors"
    )


@reader
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_an_empty_file(read: Read, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    says(lambda: read(path), path, "expected", "found")


@reader
@pytest.mark.parametrize("keep", [0.2, 0.9])
def test_a_truncated_safetensors(read: Read, keep: float, tmp_path: Path) -> None:
    content = made.safetensors_bytes(made.original("emoji"))
    path = tmp_path / "a.safetensors"
    path.write_bytes(content[: int(keep * len(content))])
    says(
        lambda: read(path),
        path,
        "expected a complete safetensors file, found a damaged or truncated one",
        "copy or download it again",
    )


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(made.safetensors_bytes(ONE))
    opened = open_tensors(path)
    os.truncate(path, path.stat().st_size - 1)
    says(lambda: opened.read("a"), path, "has become shorter", "copy it again")


@reader
def test_a_truncated_ckpt(read: Read, tmp_path: Path) -> None:
    content = made.ckpt_bytes(made.mindone("emoji"))
    path = tmp_path / "a.ckpt"
    path.write_bytes(content[: int(0.7 * len(content))])
    says(lambda: read(path), path, "expected a complete MindSpore .ckpt", "truncated")


HEADERS = {
    "past the end": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 48]},
    "not as long as the shape": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 24]},
    "backwards": {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 0]},
    "a hole": {"dtype": "F32", "shape": [1, 3], "data_offsets": [12, 24]},
    "negative": {"dtype": "F32", "shape": [2, 3], "data_offsets": [-24, 0]},
    "a negative size": {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]},
    "a huge size": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 24]},
    "no dtype": {"shape": [2, 3], "data_offsets": [0, 24]},
    "an unknown dtype": {"dtype": "F31", "shape": [2, 3], "data_offsets": [0, 24]},
}


@pytest.mark.parametrize("lie", HEADERS)
def test_a_header_that_lies(lie: str, tmp_path: Path) -> None:
    text = json.dumps({"a": HEADERS[lie]}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    says(lambda: open_tensors(path), path, "expected a complete safetensors file")


@pytest.mark.parametrize("shape", [[1] * 40, [0, 2**62]], ids=["40 dimensions", "0 × 2⁶²"])
def test_a_shape_that_numpy_cannot_have(shape: list[int], tmp_path: Path) -> None:
    size = 4 * int(np.prod(shape, dtype=object))
    for path, content in (
        (tmp_path / "a.safetensors", None),
        (tmp_path / "a.ckpt", made.value("a", "Float32", tuple(shape), bytes(size))),
    ):
        if content is None:
            entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
            text = json.dumps({"a": entry}).encode()
            content = len(text).to_bytes(8, "little") + text + bytes(size)
        path.write_bytes(content)
        says(lambda path=path: everything(path), path, "expected", "found")


ZIP = b"PK\x03\x04\x00\x00\x08\x08\x00\x00archive/data.pkl" + bytes(100)
PROTOCOL_2 = b"\x80\x02}q\x00(X\x05\x00\x00\x00stateq\x01}q\x02" + bytes(100)


@reader
@pytest.mark.parametrize("name", ["sd-v1-4.ckpt", "sd-v1-4.bin", "a.safetensors", "a.pt"])
@pytest.mark.parametrize("content", [ZIP, PROTOCOL_2], ids=["zip", "protocol 2"])
def test_a_pickle_is_never_read_and_its_conversion_is_told(
    read: Read, name: str, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    says(
        lambda: read(path),
        path,
        "this is a PyTorch pickle, which can run any code",
        f"torch.load('{name}'",
        f"'{path.stem}.safetensors')",
    )


def test_a_folder_that_holds_pickles_alone(tmp_path: Path) -> None:
    for name in ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(ZIP)
        network = name.partition("/")[0]
        says(lambda n=network: open_base(tmp_path, [n]), tmp_path / name, "is a PyTorch pickle")


def test_something_else(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"<!DOCTYPE html><html>")
    says(lambda: open_tensors(path), path, "found neither (it begins with b'<!DOCTYP')")


@pytest.mark.parametrize("kind", ["F8_E4M3", "I8", "U8", "BOOL"])
def test_numbers_that_are_no_weights(kind: str, tmp_path: Path) -> None:
    """As a base, as a LoRA, and (but for those that numpy knows) as tensors."""
    dtype = {"F8_E4M3": "F8_E4M3", "I8": "int8", "U8": "uint8", "BOOL": "bool"}[kind]

    def write(tensors: made.Arrays, changed: str) -> Path:
        content = made.safetensors_bytes(
            {name: array if name != changed else array.astype(np.int8)
             for name, array in tensors.items()}
        )  # fmt: skip
        padded = json.dumps(kind).ljust(9).encode()
        head, body = content[8 : 8 + int.from_bytes(content[:8], "little")], content
        body = body[8 + len(head) :]
        head = head.replace(b'"I8"', padded)
        (tmp_path / "a.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + body)
        return tmp_path / "a.safetensors"

    remedy = "expected one of float16, bfloat16, float32, float64; convert the file to float16"
    name = "first_stage_model.encoder.conv_in.weight"
    path = write(made.original("emoji"), name)
    says(lambda: open_base(path), path, f"{name} is of dtype {dtype}", remedy)
    lora = made.kohya(ATTENTION)
    name = next(iter(lora))
    path = write(lora, name)
    says(lambda: lora_files.read(path), path, f"{name} is of dtype {dtype}", remedy)
    if kind == "F8_E4M3":
        says(lambda: open_tensors(path).read(name), path, f"{name} is of dtype {dtype}", remedy)


# ---- bases that are not whole, or another model's


def changed(model: str, name: str, array: np.ndarray | None) -> made.Arrays:
    """An original file's tensors with one replaced, or left out."""
    tensors = dict(made.original(model))
    del tensors[name]
    return tensors if array is None else {**tensors, name: array}


@pytest.mark.parametrize(
    ("name", "network", "count"),
    [
        ("model.diffusion_model.middle_block.1.norm.bias", "unet", 686),
        ("first_stage_model.post_quant_conv.weight", "vae", 248),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "text_encoder", 196),
    ],
)
def test_a_tensor_that_is_missing(name: str, network: str, count: int, tmp_path: Path) -> None:
    path = made.write_safetensors(tmp_path / "a.safetensors", changed("sd1", name, None))
    says(lambda: open_base(path), path, f"1 of the {count} tensors of the {network} are missing",
         "download it again")  # fmt: skip


@pytest.mark.parametrize(
    ("model", "name", "shape", "said"),
    [
        ("sd1", "first_stage_model.encoder.mid.attn_1.q.weight", (5, 4, 1, 1),
         "is 5 × 4 × 1 × 1, expected 5 × 5"),
        ("sd1", "model.diffusion_model.time_embed.2.weight", (16, 15),
         "is 16 × 15, expected 16 × 16"),
        ("sd1", "model.diffusion_model.out.0.bias", (), "is a single number, expected 4"),
        ("sd2", "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight", (31, 10),
         "is 31 × 10, expected 30 × 10"),
        ("sd2", "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight", (10, 10),
         "is 10 × 10, expected 30 × 10"),
        ("sd2", "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_bias", (29,),
         "is 29, expected 30"),
    ],
)  # fmt: skip
def test_a_tensor_of_another_shape(
    model: str, name: str, shape: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    tensors = changed(model, name, np.zeros(shape, np.float32))
    path = made.write_safetensors(tmp_path / "a.safetensors", tensors)
    says(lambda: open_base(path), path, f"{name} {said}", "damaged or of another model")


def test_a_tensor_that_fits_no_place(tmp_path: Path) -> None:
    name = "model.diffusion_model.middle_block.7.weight"
    path = made.write_safetensors(
        tmp_path / "a.safetensors", made.original("sd1") | {name: ONE["a"]}
    )
    says(lambda: open_base(path), path, "1 tensors fit no network", name)
    found = made.weights("emoji")
    text = {**found["text_encoder"], "text_model.wonder.weight": ONE["a"]}
    made.write_folder(tmp_path / "f", {**found, "text_encoder": text})
    says(
        lambda: open_base(tmp_path / "f"),
        tmp_path / "f/text_encoder/model.safetensors",
        "1 tensors fit no place in the text_encoder (first: text_model.wonder.weight)",
    )


def test_a_tensor_that_is_there_twice(tmp_path: Path) -> None:
    found = made.weights("emoji")
    name = "text_model.final_layer_norm.bias"
    text = {**found["text_encoder"], "final_layer_norm.bias": found["text_encoder"][name]}
    made.write_folder(tmp_path, {**found, "text_encoder": text})
    path = tmp_path / "text_encoder/model.safetensors"
    says(lambda: open_base(tmp_path), path, "is there twice", name)


@pytest.mark.parametrize(
    ("channels", "said"),
    [(9, "an inpainting model"), (8, "an editing or upscaling model"), (5, "a depth model")],
)
def test_a_unet_with_other_channels(channels: int, said: str, tmp_path: Path) -> None:
    name = "model.diffusion_model.input_blocks.0.0.weight"
    tensors = changed("sd1", name, np.zeros((4, channels, 3, 3), np.float32))
    path = made.write_safetensors(tmp_path / "a.safetensors", tensors)
    says(lambda: open_base(path), path, said, f"takes {channels} channels, expected 4")


FOREIGN_BASES = [
    ("Stable Diffusion XL", "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"),
    ("Stable Diffusion XL", "model.diffusion_model.label_emb.0.0.weight"),
    ("Stable Diffusion XL", "add_embedding.linear_1.weight"),
    ("Stable Diffusion 3", "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
    ("Flux", "double_blocks.0.img_attn.qkv.weight"),
    ("Flux", "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"),
    ("ControlNet", "control_model.input_hint_block.0.weight"),
    ("ControlNet", "controlnet_cond_embedding.conv_in.weight"),
]


@pytest.mark.parametrize(("model", "name"), FOREIGN_BASES)
def test_a_base_of_another_model(model: str, name: str, tmp_path: Path) -> None:
    tensors = {"model.diffusion_model.input_blocks.0.0.weight": ONE["a"], name: ONE["a"]}
    path = made.write_safetensors(tmp_path / "a.safetensors", tensors)
    says(lambda: open_base(path), path, f"this is a {model} file ({name})", "name another one")


@pytest.mark.parametrize(
    ("name", "model"), [("text_encoder_2", "Stable Diffusion XL"), ("transformer", "transformer")]
)
def test_a_folder_of_another_model(name: str, model: str, tmp_path: Path) -> None:
    made.write_folder(tmp_path, made.weights("emoji"))
    (tmp_path / name).mkdir()
    says(lambda: open_base(tmp_path), tmp_path, f"this is a {model}", f"{name}/ is there")


@pytest.mark.parametrize("network", ["unet", "vae", "text_encoder"])
def test_a_file_of_one_network(network: str, tmp_path: Path) -> None:
    path = made.write_safetensors(tmp_path / "a.safetensors", made.weights("sd1")[network])
    says(
        lambda: open_base(path),
        path,
        f"expected a whole Stable Diffusion file, found only a {network}",
    )


def test_a_folder_without_an_ema_copy(tmp_path: Path) -> None:
    made.write_folder(tmp_path, made.weights("emoji"))
    says(lambda: open_base(tmp_path, ema=True), tmp_path, "holds no EMA copy", "--ema")
    path = made.write_safetensors(tmp_path / "a.safetensors", made.original("emoji"))
    says(lambda: open_base(path, ema=True), path, "there is no EMA copy", "--ema")


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.999999999.0.op.weight",
        "model.diffusion_model.input_blocks.999.0.op.weight",
        "first_stage_model.encoder.down.999.block.999.conv1.weight",
        "first_stage_model.encoder.down.0.block.99999999.conv1.weight",
        f"cond_stage_model.model.transformer.resblocks.{'9' * 5000}.ln_1.weight",
        f"model.diffusion_model.input_blocks.{'9' * 5000}.0.op.weight",
        "model.diffusion_model.input_blocks.64.0.op.weight",
        "first_stage_model.encoder.down.63.block.63.conv1.weight",
    ],
    ids=lambda name: name[:60],
)
def test_a_made_up_number_costs_neither_time_nor_memory(name: str, tmp_path: Path) -> None:
    """A few bytes must not ask for billions of layers."""
    tensors = dict(made.original("emoji"))
    if ".op." in name:
        tensors = {key: array for key, array in tensors.items() if ".op." not in key}
    path = made.write_safetensors(tmp_path / "a.safetensors", tensors | {name: ONE["a"]})
    tracemalloc.start()
    try:
        says(lambda: open_base(path), path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20, f"{peak / 1e6:.0f} MB"


# ---- folders whose index lies


@pytest.mark.parametrize(
    "file",
    ["../../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", ".safetensors", 3],
)
def test_a_shard_outside_its_folder_is_not_opened(file: object, tmp_path: Path) -> None:
    made.write_safetensors(tmp_path / "outside.safetensors", made.weights("emoji")["unet"])
    folder = tmp_path / "base"
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.parent.mkdir(parents=True)
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": file}}))
    says(lambda: open_base(folder), index, "expected", "found", "download it again")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}',
                                  '{"weight_map": {"a": ["b"]}}', "\xff", "[" * 99999])  # fmt: skip
def test_an_index_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    index = tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.parent.mkdir(parents=True)
    index.write_text(text, encoding="latin-1")
    says(lambda: open_base(tmp_path), index, "expected", "download it again")


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    made.write_shards(tmp_path, made.weights("emoji"))
    shard = tmp_path / "vae/diffusion_pytorch_model-00002-of-00003.safetensors"
    shard.unlink()
    says(lambda: open_base(tmp_path), shard, "there is no such weight file")


def test_a_file_that_was_altered(tmp_path: Path) -> None:
    made.write_folder(tmp_path, made.weights("emoji"))
    base = open_base(tmp_path)
    lines = "".join(f"{digest}  {name}\n" for name, digest in base.digests().items())
    (tmp_path / "SHA256SUMS").write_text(lines)
    base.digests()
    path = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    says(open_base(tmp_path).digests, path, "as in SHA256SUMS", "the file was altered")


# ---- NaN


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_values_that_are_no_numbers_are_counted(dtype: str, tmp_path: Path) -> None:
    name = "first_stage_model.decoder.conv_out.weight"
    array = np.zeros((3, 2, 3, 3), np.float32)
    array[0, 0, 0] = np.nan, np.inf, -np.inf
    path = made.write_safetensors(
        tmp_path / "a.safetensors", changed("emoji", name, array), dtype=dtype
    )
    base = open_base(path)
    says(lambda: base.load("vae"), path, f"{name} has 3 of 54 values that are NaN or infinite",
         "base.allow_nan", "--allow-nan")  # fmt: skip
    found = dict(base.networks["vae"].tensors(allow_nan=True))["decoder.conv_out.weight"]
    assert np.array_equal(found, array, equal_nan=True)


def test_large_numbers_are_numbers() -> None:
    for dtype in (np.float16, np.float32, np.float64):
        assert files.count_not_finite(np.full(100, np.finfo(dtype).max, dtype)) == 0
        assert files.count_not_finite(np.array([1, np.nan, np.inf], dtype)) == 2


def test_a_lora_with_nan_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    tensors = made.kohya(ATTENTION)
    name = next(name for name in tensors if "lora_up" in name)
    tensors[name] = tensors[name] * np.float32(np.nan)
    path = made.write_safetensors(tmp_path / "a.safetensors", tensors)
    size = tensors[name].size
    says(lambda: lora_files.read(path), path, f"{name} has {size} of {size} values", "--allow-nan")
    assert lora_files.read(path, allow_nan=True).modules == len(ATTENTION)


# ---- LoRAs


def write_lora(path: Path, tensors: made.Arrays) -> Path:
    return made.write_safetensors(path / "lora.safetensors", tensors)


KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
FOREIGN_LORAS = [
    ("for Stable Diffusion XL", "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"),
    ("for Stable Diffusion XL", "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.alpha"),
    ("for Stable Diffusion XL",
     "unet.mid_block.attentions.0.transformer_blocks.3.attn1.to_q.lora_A.weight"),
    ("for Stable Diffusion XL", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"),
    ("for Stable Diffusion 3", "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"),
    ("for Stable Diffusion 3", "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight"),
    ("for Flux", "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"),
    ("for Flux", "lora_unet_single_blocks_0_linear1.lora_down.weight"),
    ("a transformer model", "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"),
    ("a LoHa, not a LoRA", f"{KEY}.hada_w1_a"),
    ("a LoKr, not a LoRA", f"{KEY}.lokr_w1"),
    ("a DoRA, not a LoRA", f"{KEY}.dora_scale"),
    ("a DoRA, not a LoRA", "unet.mid_block.attentions.0.proj_in.lora_magnitude_vector"),
    ("an OFT, not a LoRA", f"{KEY}.oft_blocks"),
    ("LoCon with CP decomposition", f"{KEY}.lora_mid.weight"),
    ("full weight differences", f"{KEY}.diff"),
]  # fmt: skip


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among others"])
@pytest.mark.parametrize(("kind", "key"), FOREIGN_LORAS)
def test_a_lora_of_another_kind(kind: str, key: str, alone: bool, tmp_path: Path) -> None:
    rest = {} if alone else made.kohya(ATTENTION, 1.0)
    path = write_lora(tmp_path, rest | {key: np.ones((1, 1), np.float32)})
    for ignore_unknown in (False, True):
        says(lambda i=ignore_unknown: lora_files.read(path, i), path, kind, "use another one")


def test_a_lora_that_reads_the_text_of_stable_diffusion_xl(tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    down, up = np.ones((1, 2048), np.float32), np.ones((1280, 1), np.float32)
    path = write_lora(tmp_path, {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})
    says(
        lambda: lora_files.read(path),
        path,
        "this LoRA is for Stable Diffusion XL, expected one for",
    )


def test_a_lora_for_stable_diffusion_2_on_a_base_of_1(tmp_path: Path) -> None:
    from diffusion.config import load_model_config
    from weights.structure import unet_shapes

    module = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    down, up = np.ones((4, 1024), np.float32), np.ones((1280, 4), np.float32)
    path = write_lora(tmp_path, made.peft({("unet", module): (down, up)}))
    shapes = {"unet": unet_shapes(load_model_config("sd15").unet)}
    adapters = lora_files.read(path).adapters
    sentence = says(lambda: fit(adapters, shapes, str(path), "sd15.safetensors"), path)
    assert sentence == (
        f"{path}: this LoRA is for Stable Diffusion 2.x, its {module} is 1280 × 1024, "
        "sd15.safetensors has 1280 × 768; use it with the base it was made for"
    )


def test_modules_that_the_base_does_not_have_are_listed(tmp_path: Path) -> None:
    lora = made.lora("sd1", r"down_blocks\.0\.attentions\.0\..*to_q|mid_block.*attn1\.to_q")
    adapters = lora_files.read(write_lora(tmp_path, made.kohya(lora))).adapters
    shapes = made.shapes("sd1")["unet"]
    half = {"unet": {name: shape for name, shape in shapes.items() if name.startswith("down")}}
    with pytest.raises(WeightsError, match=r"1 modules are not in the base: unet\.mid_block"):
        fit(adapters, half, "a", "the base")
    fitted = fit(adapters, half, "a", "the base", ignore_unknown=True)
    assert all(module.startswith("down_blocks.0") for module in fitted["unet"])
    with pytest.raises(WeightsError, match="none of its modules is in the base; use another"):
        fit(adapters, {"vae": made.shapes("sd1")["vae"]}, "a", "the base", ignore_unknown=True)


@pytest.mark.parametrize("form", ["original", "mindone"])
def test_a_base_that_is_given_as_a_lora(form: str, tmp_path: Path) -> None:
    if form == "original":
        path = made.write_safetensors(tmp_path / "a.safetensors", made.original("sd1"))
    else:
        path = tmp_path / "a.ckpt"
        path.write_bytes(made.ckpt_bytes(made.mindone("sd1")))
    says(lambda: lora_files.read(path), path, "this is a base model, expected a LoRA", "swap")


@pytest.mark.parametrize(
    "tensors",
    [made.kohya(ATTENTION), made.peft(ATTENTION), made.diffusers(ATTENTION),
     made.processors(ATTENTION), made.mindone_lora(made.lora("sd1", made.ATTENTION, shared=True))],
    ids=["kohya", "PEFT", "diffusers", "processors", "MindONE"],
)  # fmt: skip
def test_a_lora_that_is_given_as_a_base(tensors: made.Arrays, tmp_path: Path) -> None:
    path = write_lora(tmp_path, tensors)
    says(lambda: open_base(path), path, "this is a LoRA file", "expected the base model of Stable")


def test_a_file_with_nothing_of_a_lora(tmp_path: Path) -> None:
    path = write_lora(tmp_path, ONE)
    says(lambda: lora_files.read(path), path, "found no LoRA in this file (its keys: a)")
    path = write_lora(tmp_path, {})
    says(lambda: lora_files.read(path), path, "found no LoRA in this file, it is empty")


def test_keys_that_fit_nothing_are_listed_and_may_be_left_out(tmp_path: Path) -> None:
    strange = {f"lora_unet_wonder_{i}.lora_down.weight": ONE["a"] for i in range(10)}
    path = write_lora(tmp_path, made.kohya(ATTENTION) | strange)
    says(lambda: lora_files.read(path), path, "10 keys fit no module of Stable Diffusion: "
         "lora_unet_wonder_0.lora_down.weight", "and 2 more", "--ignore-unknown")  # fmt: skip
    found = lora_files.read(path, ignore_unknown=True)
    assert found.modules == len(ATTENTION)
    assert found.unknown == tuple(strange)
    assert found.tensors == 2 * len(ATTENTION)


@pytest.mark.parametrize("lacking", ["down", "up"])
def test_a_matrix_that_is_missing(lacking: str, tmp_path: Path) -> None:
    tensors = made.kohya(ATTENTION, 1.0)
    del tensors[f"{KEY}.lora_{lacking}.weight"]
    path = write_lora(tmp_path, tensors)
    says(lambda: lora_files.read(path), path, f"attn1.to_q has no {lacking} matrix", f"{KEY}.alpha")


def test_a_module_that_is_there_twice(tmp_path: Path) -> None:
    for other in (made.peft(ATTENTION), made.kohya(ATTENTION, original_names=True)):
        path = write_lora(tmp_path, made.kohya(ATTENTION) | other)
        says(lambda path=path: lora_files.read(path), path, "has its down twice", "; keep one")


@pytest.mark.parametrize(
    ("down", "up"),
    [((2, 4), (4, 3)), ((2,), (4, 2)), ((2, 4), (4, 2, 3, 3)), ((0, 4), (4, 0)), ((2, 0), (4, 2)),
     ((2, 4), (0, 2)), ((2, 4, 1), (4, 2)), ((), ()), ((2, 4), (8,))],
)  # fmt: skip
def test_matrices_that_do_not_fit_each_other(
    down: tuple[int, ...], up: tuple[int, ...], tmp_path: Path
) -> None:
    path = write_lora(tmp_path, {f"{KEY}.lora_down.weight": np.zeros(down, np.float32),
                                 f"{KEY}.lora_up.weight": np.zeros(up, np.float32)})  # fmt: skip
    says(
        lambda: lora_files.read(path),
        path,
        f"{down} and {up}",
        "expected (rank, in) and (out, rank)",
    )


def test_an_alpha_of_several_values(tmp_path: Path) -> None:
    tensors = made.kohya(ATTENTION) | {f"{KEY}.alpha": np.ones(3, np.float32)}
    path = write_lora(tmp_path, tensors)
    says(lambda: lora_files.read(path), path, f"{KEY}.alpha has 3 values, expected a single number")


def test_a_fused_projection_that_is_not_three(tmp_path: Path) -> None:
    name = "cond_stage_model.transformer.transformer_layer.resblocks.0.attn.attn.in_proj"
    path = tmp_path / "a.ckpt"
    down, up = np.ones((2, 6), np.float32), np.ones((17, 2), np.float32)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    path.write_bytes(made.ckpt_bytes(tensors))
    says(lambda: lora_files.read(path), path, "expected q, k and v one below another")


# ---- whole or not at all


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from weights import checkpoint, convert, files, lora_files
from weights.base import open_base
from weights.lora import Adapter

kind, out, base = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
big = {"unet": {"mid_block.attentions.0.proj_in": Adapter(
    np.ones((64, 4096), np.float32), np.ones((64, 64), np.float32), 1.0)}}
base = open_base(base)
limit = 200_000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    if kind == "lora":
        lora_files.write(out, big, {})
    elif kind == "ckpt":
        checkpoint.write(out, {"a": np.ones(limit, np.float32)})
    else:
        convert.write_base(out, base, kind, {}, np.float64)
except files.WeightsError as error:
    print(error)
"""


@pytest.mark.parametrize("old", [True, False], ids=["old file", "no file"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("lora", "a.safetensors"), ("ckpt", "a.ckpt"), ("original", "a.safetensors"),
     ("mindone", "a.ckpt"), ("diffusers", "a"), ("other files", "a")],
)  # fmt: skip
def test_a_full_disk_leaves_what_was_there(kind: str, name: str, old: bool, tmp_path: Path) -> None:
    out = tmp_path / "out" / name
    base = made.write_folder(tmp_path / "base", made.weights("emoji"))
    if kind == "other files":
        kind = "diffusers"
        (base / "model_index.json").write_text("{}" * 200_000)
    elif kind == "diffusers":
        made.write_folder(base, made.weights("sd2"))
    if old and kind == "diffusers":
        made.write_folder(out, made.weights("sd1"))
    elif old:
        out.parent.mkdir()
        out.write_bytes(b"old")
    before = {path: path.is_file() and path.read_bytes() for path in (tmp_path / "out").rglob("*")}
    model = "sd2" if kind in ("original", "mindone") else None
    if model:
        made.write_folder(base, made.weights(model))
    done = subprocess.run(
        [sys.executable, "-c", FULL, kind, str(out), str(base)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: the disk is full (or a quota is), nothing was written;")
    after = {path: path.is_file() and path.read_bytes() for path in (tmp_path / "out").rglob("*")}
    assert after == before


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), files.atomic_path(path) as part:
        part.write_bytes(b"new")
        raise KeyError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with open(path, "rb") as held:  # who reads it goes on with the old bytes
        with files.atomic_path(path) as part:
            part.write_bytes(b"new")
            assert path.read_bytes() == b"old"
        assert held.read() == b"old"
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_place_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "file" / "a.safetensors"
    says(lambda: files.dump(path, ONE), path, "cannot be written", "choose another place")
    says(
        lambda: checkpoint.write(tmp_path, ONE), tmp_path, "this is a folder, expected the name of"
    )
    long = tmp_path / (300 * "a")
    says(lambda: checkpoint.write(long, ONE), long, "cannot be written")
    base = open_base(made.write_folder(tmp_path / "base", made.weights("emoji")))
    path = tmp_path / "file" / "out"
    says(lambda: convert.write_base(path, base, "diffusers", {}), path, "cannot be written")


def test_more_than_the_disk_has_free_is_refused_before_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "not yet" / "a.safetensors"
    says(lambda: files.check_space(path, 1 << 60), path, "1152921504.6 GB are needed", "are free")
    assert not path.parent.exists()


@pytest.mark.parametrize(
    ("name", "layout", "said"),
    [
        ("a.ckpt", "original", "expected a name that ends in .safetensors for original"),
        ("a.safetensors", "mindone", "expected a name that ends in .ckpt for mindone"),
        ("a.safetensors", "diffusers", "expected a folder for diffusers, found a file name"),
    ],
)
def test_a_name_that_does_not_go_with_the_layout(name: str, layout: str, said: str) -> None:
    says(lambda: convert.check_out(name, layout), name, re.sub(r"\s+", " ", said))
