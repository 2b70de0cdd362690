"""Which model a base is: full-size files whose zeros take no room on the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from diffusion.config import ModelConfigError, load_model_config, recognise
from tests.weights import made
from weights import structure
from weights.base import open_base

Write = Callable[..., Path]


def full_size(model: str) -> dict[str, structure.Shapes]:
    config = load_model_config(model)
    return {
        "unet": structure.unet_shapes(config.unet),
        "vae": structure.vae_shapes(config.vae),
        "text_encoder": structure.text_encoder_shapes(config.text_encoder),
    }


def write_folder(path: Path, model: str) -> Path:
    for network, shapes in full_size(model).items():
        made.write_sparse(path / f"{made.WEIGHTS[network]}.safetensors", shapes)
    return path


def write_file(path: Path, model: str, **metadata: str) -> Path:
    """An original file, with HF's CLIP for 1.x and OpenCLIP's whole one for 2.x."""
    second = not model.startswith("sd15")
    widths = made.MODELS["sd2" if second else "sd1"]
    shapes = full_size(model)
    named = {f"model.diffusion_model.{made.original_unet(name, widths)}": shape
             for name, shape in shapes["unet"].items()}  # fmt: skip
    named |= {f"first_stage_model.{made.original_vae(name, widths)}": shape
              for name, shape in shapes["vae"].items()}  # fmt: skip
    text = shapes["text_encoder"]
    if not second:
        named |= {f"cond_stage_model.transformer.{name}": text[name] for name in text}
    else:
        layer = {"ln_1.weight": (1024,), "ln_1.bias": (1024,), "ln_2.weight": (1024,),
                 "ln_2.bias": (1024,), "attn.in_proj_weight": (3072, 1024),
                 "attn.in_proj_bias": (3072,), "attn.out_proj.weight": (1024, 1024),
                 "attn.out_proj.bias": (1024,), "mlp.c_fc.weight": (4096, 1024),
                 "mlp.c_fc.bias": (4096,), "mlp.c_proj.weight": (1024, 4096),
                 "mlp.c_proj.bias": (1024,)}  # fmt: skip
        prefix = "cond_stage_model.model."
        named |= {
            f"{prefix}transformer.resblocks.{i}.{name}": shape
            for i in range(24)
            for name, shape in layer.items()
        }
        named |= {f"{prefix}token_embedding.weight": (49408, 1024),
                  f"{prefix}positional_embedding": (77, 1024),
                  f"{prefix}ln_final.weight": (1024,), f"{prefix}ln_final.bias": (1024,),
                  f"{prefix}text_projection": (1024, 1024), f"{prefix}logit_scale": ()}  # fmt: skip
    return made.write_sparse(path, named, **metadata)


def test_stable_diffusion_1_is_taken_for_epsilon(tmp_path: Path) -> None:
    for path in (write_folder(tmp_path / "sd", "sd15"), write_file(tmp_path / "a.ckpt", "sd15")):
        base = open_base(path)
        assert base.family == "Stable Diffusion 1.x"
        assert recognise(base) == ("sd15", load_model_config("sd15"))


@pytest.mark.parametrize(
    ("metadata", "model"),
    [
        ({"modelspec.prediction_type": "v"}, "sd15-v"),
        ({"modelspec.prediction_type": "epsilon"}, "sd15"),
        ({"modelspec.architecture": "stable-diffusion-v1"}, "sd15"),
    ],
)
def test_the_header_of_a_file_says_what_stable_diffusion_1_predicts(
    metadata: dict[str, str], model: str, tmp_path: Path
) -> None:
    path = write_file(tmp_path / "a.safetensors", "sd15", **metadata)
    assert recognise(open_base(path))[0] == model


@pytest.mark.parametrize(
    ("metadata", "model"),
    [
        ({"modelspec.prediction_type": "v"}, "sd21-v"),
        ({"modelspec.prediction_type": "epsilon"}, "sd21"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "sd21-v"),
    ],
)
def test_the_header_of_a_file_says_what_stable_diffusion_2_predicts(
    metadata: dict[str, str], model: str, tmp_path: Path
) -> None:
    base = open_base(write_file(tmp_path / "a.safetensors", "sd21", **metadata))
    assert base.family == "Stable Diffusion 2.x"
    assert recognise(base)[0] == model


@pytest.mark.parametrize(("said", "model"), [("v_prediction", "sd21-v"), ("epsilon", "sd21")])
def test_the_scheduler_of_a_folder_says_what_stable_diffusion_2_predicts(
    said: str, model: str, tmp_path: Path
) -> None:
    path = write_folder(tmp_path / "sd", "sd21")
    made.say(path, said)
    base = open_base(path)
    assert base.prediction is not None
    assert base.prediction.source == "scheduler/scheduler_config.json"
    assert recognise(base)[0] == model


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("model: {params: {parameterization: v}}", "sd21-v"),
        ("model: {params: {parameterization: velocity}}", "sd21-v"),
        ("model: {params: {parameterization: eps}}", "sd21"),
        ("model: {params: {linear_start: 0.00085}}", "sd21"),
    ],
)
def test_a_yaml_beside_the_file_says_what_stable_diffusion_2_predicts(
    text: str, model: str, tmp_path: Path
) -> None:
    path = write_file(tmp_path / "v2.safetensors", "sd21")
    path.with_suffix(".yaml").write_text(text)
    base = open_base(path)
    assert base.prediction is not None
    assert base.prediction.source == "v2.yaml"
    assert recognise(base)[0] == model


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "model: 3",
        "model: {params: {parameterization: [v]}}",
        "model: [",
        "\0",
        "[" * 1500,
    ],
)
def test_a_yaml_that_does_not_say_it_is_as_if_it_were_not_there(text: str, tmp_path: Path) -> None:
    path = made.write_safetensors(tmp_path / "a.safetensors", made.original("sd2"))
    path.with_suffix(".yaml").write_text(text)
    assert open_base(path).prediction is None


@pytest.mark.parametrize("text", ["", "[]", '{"prediction_type": 3}', "{", "[" * 99999])
def test_a_scheduler_that_does_not_say_it_is_as_if_it_were_not_there(
    text: str, tmp_path: Path
) -> None:
    made.write_folder(tmp_path, made.weights("emoji"), prediction_type="epsilon")
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(text)
    assert open_base(tmp_path).prediction is None


def test_stable_diffusion_2_that_does_not_say_it_is_asked_for(tmp_path: Path) -> None:
    path = write_file(tmp_path / "v2.safetensors", "sd21")
    with pytest.raises(ModelConfigError) as raised:
        recognise(open_base(path))
    assert str(raised.value) == (
        f"{path}: this is Stable Diffusion 2.x, but nothing in it says whether it predicts "
        "epsilon or v; say it with base.model: sd20 (epsilon), sd21 (epsilon), "
        "sd21-v (v_prediction)"
    )
    assert recognise(open_base(path), "sd21-v")[0] == "sd21-v"


def test_the_config_wins_over_what_a_file_says(tmp_path: Path) -> None:
    metadata = {"modelspec.prediction_type": "v"}
    base = open_base(write_file(tmp_path / "a.safetensors", "sd21", **metadata))
    assert recognise(base, "sd20") == ("sd20", load_model_config("sd20"))


def test_the_small_model_that_comes_along_is_recognised(project_root: Path) -> None:
    assert recognise(open_base(project_root / "assets" / "emoji-base"))[0] == "emoji"


@pytest.mark.parametrize(
    ("weights", "model", "problem"),
    [
        ("sd15", "sd21", "its unet has cross_attention_dim 768, the model has 1024"),
        ("sd21", "sd15", "its unet has cross_attention_dim 1024, the model has 768"),
        ("sd15", "emoji", "its unet has block_out_channels (320, 640, 1280, 1280)"),
    ],
)
def test_a_wrong_model_is_refused(weights: str, model: str, problem: str, tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.safetensors", weights)
    with pytest.raises(ModelConfigError) as raised:
        recognise(open_base(path), model)
    said = str(raised.value)
    assert said.startswith(f"{path}: these are not the weights of base.model {model}: {problem}")
    assert said.endswith("; leave base.model out to have it recognised")


def test_a_model_of_unknown_size_is_told_how_to_be_described(tmp_path: Path) -> None:
    path = made.write_folder(tmp_path / "own", made.weights("sd1"))
    with pytest.raises(ModelConfigError) as raised:
        recognise(open_base(path))
    said = str(raised.value)
    assert said.startswith(f"{path}: its networks are of no model in configs/models")
    assert said.endswith("describe it in a YAML file like those and name that as base.model")
