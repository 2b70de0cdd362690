"""Base models: every form that is in the wild is read to the same arrays, and written back."""

from __future__ import annotations

import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from tests.weights import made
from weights import convert, files
from weights.base import Base, combined_digest, open_base

Write = Callable[[Path, str], Path]

OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
POSITION_IDS = {"text_model.embeddings.position_ids": np.arange(9)[None]}


# ---- the forms


def old_vae_names(name: str) -> str:
    """The attention of the autoencoder before diffusers 0.18."""
    return re.sub(
        r"(mid_block\.attentions\.0\.)(to_[qkv]|to_out\.0)\.",
        lambda match: f"{match[1]}{OLD_ATTENTION[match[2]]}.",
        name,
    )


def folder(**options: object) -> Write:
    return lambda path, model: made.write_folder(path, made.weights(model), **options)  # type: ignore[arg-type]


def folder_with_position_ids(path: Path, model: str) -> Path:
    found = made.weights(model)
    text = {**found["text_encoder"], **POSITION_IDS}
    return made.write_folder(path, {**found, "text_encoder": text})


def folder_with_both(path: Path, model: str) -> Path:
    """Full precision beside a half-precision copy of another training: the first is meant."""
    made.write_folder(path, made.weights(model, seed=1), "F16", suffix=".fp16.safetensors")
    return made.write_folder(path, made.weights(model))


def original(**options: object) -> Write:
    def write(path: Path, model: str) -> Path:
        tensors = made.original(model)
        path = path.with_suffix(".safetensors")
        return made.write_safetensors(path, tensors, **options)  # type: ignore[arg-type]

    return write


def original_short(path: Path, model: str) -> Path:
    """As some programs write it: CLIP without "text_model.", OpenCLIP without its extras."""
    tensors = {
        name.replace("transformer.text_model.", "transformer."): array
        for name, array in made.original(model).items()
        if not name.endswith(("logit_scale", "text_projection"))
    }
    layers = made.MODELS[model].text_encoder.num_hidden_layers
    tensors = {n: a for n, a in tensors.items() if f".resblocks.{layers}." not in n}
    return made.write_safetensors(path.with_suffix(".safetensors"), tensors)


def original_whole(path: Path, model: str) -> Path:
    """As the training left it: EMA copies, schedule, position ids, counters."""
    tensors = made.original(model)
    ema = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": array + 1
        for name, array in tensors.items()
        if name.startswith("model.diffusion_model.")
    }
    schedule = ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
                "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
                "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
                "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
                "logvar")  # fmt: skip
    more = {name: np.ones(5, np.float32) for name in schedule}
    more |= {"model_ema.decay": np.array(0.9999, np.float32), "global_step": np.array(840000)}
    more |= {"model_ema.num_updates": np.array(840000)}
    if not made.MODELS[model].openclip:
        ids = POSITION_IDS["text_model.embeddings.position_ids"]
        more["cond_stage_model.transformer.text_model.embeddings.position_ids"] = ids
    return made.write_safetensors(path.with_suffix(".safetensors"), {**tensors, **ema, **more})


def mindone(**options: object) -> Write:
    def write(path: Path, model: str) -> Path:
        path = path.with_suffix(".ckpt")
        path.write_bytes(made.ckpt_bytes(made.mindone(model), **options))  # type: ignore[arg-type]
        return path

    return write


FORMS: dict[str, Write] = {
    "diffusers folder": folder(),
    "diffusers folder, float16": folder(dtype="F16"),
    "diffusers folder, bfloat16": folder(dtype="BF16"),
    "diffusers folder, float64": folder(dtype="F64"),
    "diffusers folder, .fp16.safetensors": folder(dtype="F16", suffix=".fp16.safetensors"),
    "diffusers folder, both variants": folder_with_both,
    "diffusers folder, shards": lambda path, model: made.write_shards(path, made.weights(model)),
    "diffusers folder, old names": folder(rename=old_vae_names),
    "diffusers folder, text encoder without prefix": folder(
        rename=lambda name: name.removeprefix("text_model.")
    ),
    "diffusers folder, position ids": folder_with_position_ids,
    "original file": original(),
    "original file, float16": original(dtype="F16"),
    "original file, bfloat16": original(dtype="BF16"),
    "original file, short": original_short,
    "original file, as trained": original_whole,
    "MindONE": mindone(),
    "MindONE, crc": mindone(crc=True),
    "MindONE, split tensors": mindone(parts=3),
    "MindONE, appended values": mindone(after=made.APPENDED),
}
LAYOUTS = {
    "diffusers folder": "diffusers folder",
    "original file": "original Stable Diffusion file",
    "MindONE": "MindONE checkpoint",
}


# ---- read


def differing(base: Base, model: str, seed: int = 0) -> list[str]:
    """Tensors of the base that are not, bit for bit, those of the model."""
    wanted = made.weights(model, seed)
    wrong = [f"{network} is another" for network in wanted.keys() ^ base.networks.keys()]
    for network, arrays in wanted.items():
        found = base.load(network)
        wrong += sorted(arrays.keys() ^ found.keys())
        wrong += [
            name
            for name, array in arrays.items()
            if name in found
            and not (found[name].dtype == np.float32 and np.array_equal(found[name], array))
        ]
    return wrong


@pytest.mark.parametrize("model", made.MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_to_the_same_arrays(form: str, model: str, tmp_path: Path) -> None:
    base = open_base(FORMS[form](tmp_path / "base", model))
    assert differing(base, model) == []
    assert base.layout == LAYOUTS[form.partition(",")[0]]
    expected = made.MODELS[model]
    assert base.networks["unet"].structure == expected.unet
    assert base.networks["vae"].structure == expected.vae
    assert base.networks["text_encoder"].structure == expected.text_encoder


@pytest.mark.parametrize("model", made.MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_missing_or_left_over(form: str, model: str, tmp_path: Path) -> None:
    base = open_base(FORMS[form](tmp_path / "base", model))
    assert base.tensors == sum(map(len, made.weights(model).values()))
    appended = ("lora_rank", "epoch_num", "learning_rate", "note")
    assert base.left_over == (appended if form == "MindONE, appended values" else ())


@pytest.mark.parametrize(
    ("form", "dtypes"),
    [
        ("diffusers folder, float16", ("float16",)),
        ("diffusers folder, bfloat16", ("bfloat16",)),
        ("original file", ("float32",)),
        ("MindONE", ("float32", "float16")),
    ],
)
def test_the_dtypes_are_told_the_most_frequent_first(
    form: str, dtypes: tuple[str, ...], tmp_path: Path
) -> None:
    assert open_base(FORMS[form](tmp_path / "base", "sd1")).dtypes == dtypes


def test_one_network_is_opened_without_the_others(tmp_path: Path) -> None:
    path = made.write_folder(tmp_path, {"vae": made.weights("sd1")["vae"]})
    base = open_base(path, ["vae"])
    assert list(base.networks) == ["vae"]
    assert base.tensors == 248


@pytest.mark.parametrize("model", ["sd1", "sd2"])
def test_the_ema_copy_is_read_if_it_is_asked_for(model: str, tmp_path: Path) -> None:
    path = original_whole(tmp_path / "base", model)
    live, ema = open_base(path), open_base(path, ema=True)
    for name, array in live.networks["unet"].tensors():
        source = ema.networks["unet"].sources[name]
        assert np.array_equal(source.read().reshape(array.shape), array + 1), name
    for network in ("vae", "text_encoder"):
        assert all(
            np.array_equal(ours, theirs)
            for (_, ours), (_, theirs) in zip(
                live.networks[network].tensors(), ema.networks[network].tensors(), strict=True
            )
        )


@pytest.mark.parametrize("model", made.MODELS)
def test_what_no_network_needs_is_told_apart_from_what_is_not_known(
    model: str, tmp_path: Path
) -> None:
    tensors = {**made.original(model), "some.thing": np.ones(3, np.float32)}
    base = open_base(made.write_safetensors(tmp_path / "a.safetensors", tensors))
    assert base.left_over == ("some.thing",)
    # A layer of OpenCLIP has twelve tensors.
    assert len(base.not_needed) == (12 + 2 if made.MODELS[model].openclip else 0)


# ---- written


THREE = ("diffusers folder", "original file, short", "MindONE")
OUT = {"diffusers": "out", "original": "out.safetensors", "mindone": "out.ckpt"}


@pytest.mark.parametrize("model", made.MODELS)
@pytest.mark.parametrize("form", THREE)
@pytest.mark.parametrize("layout", OUT)
def test_every_form_becomes_every_other(form: str, layout: str, model: str, tmp_path: Path) -> None:
    base = open_base(FORMS[form](tmp_path / "base", model))
    out = tmp_path / OUT[layout]
    convert.write_base(out, base, layout, {})
    again = open_base(out)
    assert differing(again, model) == []
    assert again.left_over == ()
    assert convert.default_layout(again) == layout


def bits(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.name, array.shape, array.tobytes()


@pytest.mark.parametrize("model", made.MODELS)
def test_an_original_file_is_what_other_programs_write(model: str, tmp_path: Path) -> None:
    base = open_base(folder()(tmp_path / "base", model))
    convert.write_base(tmp_path / "out.safetensors", base, "original", {})
    found, wanted = files.load(tmp_path / "out.safetensors"), made.original(model)
    assert found.keys() == wanted.keys()
    last = f".resblocks.{made.MODELS[model].text_encoder.num_hidden_layers}."
    placeholder = (last, "text_projection", "logit_scale")
    for name, array in wanted.items():
        if any(part in name for part in placeholder):
            assert found[name].shape == array.shape, name
        else:
            assert bits(found[name]) == bits(array), name


@pytest.mark.parametrize("model", made.MODELS)
def test_a_mindone_checkpoint_is_what_mindone_writes(model: str, tmp_path: Path) -> None:
    base = open_base(folder()(tmp_path / "base", model))
    convert.write_base(tmp_path / "out.ckpt", base, "mindone", {})
    found, wanted = files.load(tmp_path / "out.ckpt"), made.mindone(model)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert bits(found[name]) == bits(array), name


def test_a_folder_keeps_its_other_files_and_loses_its_old_weights(tmp_path: Path) -> None:
    path = made.write_folder(
        tmp_path / "base", made.weights("emoji"), "F16", prediction_type="sample"
    )
    made.write_folder(path, made.weights("emoji"), "F16", suffix=".fp16.safetensors")
    kept = ("model_index.json", "tokenizer/vocab.json", "unet/config.json")
    lost = ("SHA256SUMS", "unet/diffusion_pytorch_model.bin", "v1.safetensors", "v1.ckpt")
    for name in (*kept, *lost):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(name)
    sums = path / "SHA256SUMS"
    sums.write_text("")
    convert.write_base(tmp_path / "out", open_base(path), "diffusers", {})
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    networks = {f"{stem}.safetensors" for stem in made.WEIGHTS.values()}
    assert found == {*kept, *networks, "scheduler/scheduler_config.json"}
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out"}


def test_a_written_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    base = open_base(folder()(tmp_path / "base", "emoji"))
    out = tmp_path / "out"
    made.write_folder(out, made.weights("emoji", seed=1))
    (out / "old.json").write_text("{}")
    convert.write_base(out, base, "diffusers", {})
    assert differing(open_base(out), "emoji") == []
    assert not (out / "old.json").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out"}


@pytest.mark.parametrize("layout", OUT)
def test_what_the_model_predicts_is_passed_on(layout: str, tmp_path: Path) -> None:
    path = made.write_folder(
        tmp_path / "base", made.weights("emoji"), prediction_type="v_prediction"
    )
    convert.write_base(tmp_path / OUT[layout], open_base(path), layout, {})
    again = open_base(tmp_path / OUT[layout]).prediction
    if layout == "mindone":
        assert again is None  # a .ckpt has no header
    else:
        assert again is not None
        assert again.type == "v_prediction"


@pytest.mark.parametrize(
    ("dtype", "expected"), [(None, {"float16"}), (np.float32, {"float32"})], ids=["kept", "given"]
)
def test_the_dtype_is_kept_or_the_one_that_is_asked_for(
    dtype: type | None, expected: set[str], tmp_path: Path
) -> None:
    base = open_base(folder(dtype="F16")(tmp_path / "base", "emoji"))
    convert.write_base(tmp_path / "out", base, "diffusers", {}, dtype)
    assert set(open_base(tmp_path / "out").dtypes) == expected


# ---- digests


def test_a_base_is_known_by_the_digest_of_its_bytes(tmp_path: Path) -> None:
    path = original()(tmp_path / "base", "emoji")
    found = open_base(path).digests()
    digest = sha256(path.read_bytes()).hexdigest()
    assert found == {"base.safetensors": digest}
    assert combined_digest(found) == digest

    path = folder()(tmp_path / "folder", "emoji")
    found = open_base(path).digests()
    names = [f"{stem}.safetensors" for stem in made.WEIGHTS.values()]
    assert found == {name: sha256((path / name).read_bytes()).hexdigest() for name in names}
    lines = "".join(f"{found[name]}  {name}\n" for name in sorted(found))
    assert combined_digest(found) == sha256(lines.encode()).hexdigest()
