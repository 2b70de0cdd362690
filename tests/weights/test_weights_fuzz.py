"""Random and randomly damaged files: only WeightsError may come out, and little memory go in.

The examples are drawn anew from the same seed each time, so a failure comes again.
"""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.weights import made
from weights import lora_files
from weights.base import open_base
from weights.files import WeightsError, open_tensors

MOST = 24 << 20
"""Bytes that reading a file of at most 120 kB may take at any moment."""

fuzzed = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def every_tensor(path: Path) -> None:
    file = open_tensors(path)
    for name in file.entries:
        file.read(name)


def whole_base(path: Path) -> None:
    base = open_base(path)
    for network in base.networks:
        base.load(network)


def whole_lora(path: Path) -> None:
    found = lora_files.read(path, ignore_unknown=True)
    for modules in found.adapters.values():
        for adapter in modules.values():
            adapter.delta()


READERS: dict[str, Callable[[Path], None]] = {
    "tensors": every_tensor,
    "base": whole_base,
    "lora": whole_lora,
}


def survives(path: Path, content: bytes) -> None:
    """Read the bytes in every way; whatever but WeightsError comes out is the test's failure."""
    path.write_bytes(content)
    for read in READERS.values():
        tracemalloc.start()
        try:
            read(path)
        except WeightsError as error:
            assert len(str(error)) < 4100
            assert "\n" not in str(error)
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < MOST, f"{peak / 1e6:.0f} MB"


# ---- bytes


@cache
def whole(kind: str) -> bytes:
    """A valid file of each kind that is read."""
    lora = made.lora("emoji", made.ATTENTION, rank=1, shared=True)
    return {
        "original": lambda: made.safetensors_bytes(made.original("emoji"), dtype="F16"),
        "bfloat16": lambda: made.safetensors_bytes(made.original("emoji"), dtype="BF16"),
        "mindone": lambda: made.ckpt_bytes(made.mindone("emoji")),
        "kohya": lambda: made.safetensors_bytes(made.kohya(lora, 1.0), {"ss_v2": "False"}),
        "peft": lambda: made.safetensors_bytes(made.peft(lora)),
        "mindone lora": lambda: made.ckpt_bytes(made.mindone_lora(lora), after=made.APPENDED),
    }[kind]()


KINDS = ("original", "bfloat16", "mindone", "kohya", "peft", "mindone lora")
STARTS = (b"", b"\n", b"PK\x03\x04", b"\x80\x02", b"\x10\0\0\0\0\0\0\0{", b"\n\x20\n\x01a\x12")


@fuzzed
@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=300))
def test_random_bytes(start: bytes, rest: bytes, tmp_path: Path) -> None:
    survives(tmp_path / "a.ckpt", start + rest)


Change = tuple[str, int, bytes]
changes = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "cut", "remove", "number"]),
        st.integers(0, 1 << 30),
        st.binary(min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, what: list[Change]) -> bytes:
    """The bytes after each change; most of them hit the index, where it hurts."""
    data = bytearray(content)
    for kind, where, extra in what:
        if not data:
            break
        index = min(len(data), 20_000) if where % 4 else len(data)
        at = where // 4 % index
        if kind == "flip":
            data[at] ^= 1 << (extra[0] % 8)
        elif kind == "insert":
            data[at:at] = extra
        elif kind == "remove":
            del data[at : at + len(extra)]
        elif kind == "number":
            data[at : at + 1] = b"%d" % (extra[0] ** 3)
        else:
            del data[at:]
    return bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str, tmp_path: Path) -> None:
    @settings(fuzzed, max_examples=100)
    @given(what=changes)
    def run(what: list[Change]) -> None:
        survives(tmp_path / "a.weights", damaged(whole(kind), what))

    run()


# ---- files that are in order, with contents that are not


WORDS = (
    *("model.diffusion_model", "first_stage_model", "cond_stage_model.model", "lora_unet", "unet"),
    *("cond_stage_model.transformer", "text_model.encoder.layers", "text_encoder", "lora_te"),
    *("input_blocks", "output_blocks", "middle_block", "down_blocks", "mid_block", "up_blocks"),
    *("transformer.resblocks", "transformer_layer.resblocks", "encoder.down", "block", "op"),
    *("attentions", "resnets", "transformer_blocks", "attn1", "to_q", "to_out", "in_proj"),
    *("attn.attn.in_proj", "self_attn.q_proj", "conv1", "conv2", "lora_down", "lora_up", "lora_A"),
    *("weight", "bias", "alpha", "gamma", "embedding_table", "model_ema", "position_ids", "é\n"),
    *("0", "1", "2", "3", "63", "64", "999", "1000000000", "٣", "9" * 4400, "", "\ud7ff"),
)
names = st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).flatmap(
    lambda words: st.sampled_from([".".join(words), "_".join(words)])
)
sizes = st.sampled_from([0, 1, 2, 3, 4, 6, 9, 1 << 31, 1 << 62])
shapes = st.lists(sizes, max_size=5) | st.just([1] * 33)
dtypes = st.sampled_from(["F16", "F32", "BF16", "F64", "I64", "BOOL", "F8_E5M2"])
entries = st.dictionaries(names, st.tuples(dtypes, shapes), min_size=1, max_size=12)
BITS = {"F16": 16, "F32": 32, "BF16": 16, "F64": 64, "I64": 64, "BOOL": 8, "F8_E5M2": 8}
headers = st.sampled_from(
    ["{}", "[", "[]", '{"unet.lora_alpha": 1e999}', '{"unet.alpha_pattern": [1]}', "[" * 5000]
)


def count(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


@fuzzed
@given(found=entries, header=headers)
def test_safetensors_of_strange_tensors(
    found: dict[str, tuple[str, list[int]]], header: str, tmp_path: Path
) -> None:
    head: dict[str, object] = {"__metadata__": {"lora_adapter_metadata": header}}
    position = 0
    for name, (dtype, shape) in found.items():
        size = count(shape) * BITS[dtype] // 8
        size = size if size < 10_000 else 0
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(head).encode()
    survives(tmp_path / "a", len(text).to_bytes(8, "little") + text + bytes(position))


@fuzzed
@given(found=entries)
def test_checkpoints_of_strange_tensors(
    found: dict[str, tuple[str, list[int]]], tmp_path: Path
) -> None:
    kinds = {"F16": "Float16", "F32": "Float32", "BF16": "BFloat16", "F64": "Float64",
             "I64": "Int64", "BOOL": "Bool", "F8_E5M2": "str"}  # fmt: skip
    content = b""
    for name, (dtype, shape) in found.items():
        size = count(shape) * BITS[dtype] // 8
        body = bytes(size if size < 10_000 else 3)
        content += made.value(name[:4000], kinds[dtype], tuple(shape), body)
    survives(tmp_path / "a", content)


NUMBERS = ("0", "1", "2", "7", "63", "64", "999", "1000000000", "9" * 4400, "٣")


@cache
def tensors_of(kind: str) -> made.Arrays:
    """What a valid file of each kind holds."""
    lora = made.lora("emoji", made.ATTENTION, rank=1, shared=True)
    return {
        "original": lambda: made.original("emoji"),
        "original, CLIP": lambda: made.original("sd1"),
        "mindone": lambda: made.mindone("emoji"),
        "kohya": lambda: made.kohya(lora, 1.0),
        "peft": lambda: made.peft(lora),
        "mindone lora": lambda: made.mindone_lora(lora),
    }[kind]()


@pytest.mark.parametrize(
    "kind", ["original", "original, CLIP", "mindone", "kohya", "peft", "mindone lora"]
)
def test_tensors_of_other_names_and_shapes(kind: str, tmp_path: Path) -> None:
    """Whole but for some tensors: what recognises a model gets to see them."""
    whole = tensors_of(kind)

    @settings(fuzzed, max_examples=15 if len(whole) > 400 else 60)
    @given(
        chosen=st.lists(st.sampled_from(sorted(whole)), min_size=1, max_size=4, unique=True),
        number=st.sampled_from(NUMBERS),
        reshape=st.sampled_from(["point", "none", "reversed", "wider", "as it was"]),
        keep=st.booleans(),
        other=names,
    )
    def run(chosen: list[str], number: str, reshape: str, keep: bool, other: str) -> None:
        tensors = dict(whole)
        for name in chosen:
            old = whole[name]
            shape = {"point": (), "none": (0, *old.shape[1:]), "reversed": old.shape[::-1],
                     "wider": (*old.shape, 1), "as it was": old.shape}[reshape]  # fmt: skip
            if not keep:
                del tensors[name]
            renamed = re.sub(r"\d+", number, name, count=1) if re.search(r"\d", name) else other
            tensors[renamed] = np.ones(shape, np.float32)
        survives(tmp_path / "a", made.safetensors_bytes(tensors, dtype="F16"))

    run()
