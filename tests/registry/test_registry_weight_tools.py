"""inspect, export, merge, resize and extract, as commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from registry.api import Registry
from registry.cli import main
from tests.weights import made
from weights import lora, lora_files
from weights.base import open_base
from weights.files import load, metadata

Invoke = Callable[..., Result]
RANK = 2
MODULES = made.ATTENTION
STYLE = made.lora("sd1", MODULES, RANK, seed=1)
HERO = made.lora("sd1", MODULES, 3, seed=2)


@pytest.fixture
def invoke(folder: Path) -> Invoke:
    """Run a command on the registry of the test."""

    def run(*arguments: object, location: str | None = str(folder)) -> Result:
        environment = {"LORA_REGISTRY": location}
        return CliRunner(env=environment).invoke(main, [str(word) for word in arguments])

    return run


@pytest.fixture
def style(tmp_path: Path) -> Path:
    """A kohya LoRA with alpha = 1 and rank = 2."""
    header = {"ss_base_model_version": "sd_v1_v", "ss_new_sd_model_hash": "abc",
              "ss_sd_model_name": "my base", "modelspec.resolution": "768x768",
              "other": "x"}  # fmt: skip
    return made.write_safetensors(tmp_path / "style.safetensors", made.kohya(STYLE, 1.0), header)


@pytest.fixture
def hero(tmp_path: Path) -> Path:
    """A PEFT LoRA of rank 3, scale 1, for the same modules."""
    header = {"ss_new_sd_model_hash": "abc", "ss_sd_model_name": "another"}
    return made.write_safetensors(tmp_path / "hero.safetensors", made.peft(HERO), header)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return made.write_safetensors(
        tmp_path / "sd.safetensors", made.original("sd1"), {"modelspec.prediction_type": "v"}
    )


def fails(result: Result) -> str:
    """The one sentence of a failure."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("error: ")
    return sentence.removeprefix("error: ")


def succeeds(result: Result, out: Path) -> str:
    """What was said on stderr; stdout has the path alone."""
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    assert f"wrote {out}: " in result.stderr
    return result.stderr


def dense(found: made.Lora, scale: float) -> dict[str, np.ndarray]:
    return {
        f"{network}.{module}": scale * (up.reshape(len(up), -1) @ down.reshape(len(down), -1))
        for (network, module), (down, up) in found.items()
    }


def deltas(path: Path) -> dict[str, np.ndarray]:
    return {
        f"{network}.{module}": adapter.delta()
        for network, modules in lora_files.read(path).adapters.items()
        for module, adapter in modules.items()
    }


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    return found.keys() == wanted.keys() and all(
        np.allclose(found[name], wanted[name], rtol=0, atol=1e-5) for name in wanted
    )


# ---- inspect


def test_inspect_a_base(invoke: Invoke, base: Path) -> None:
    result = invoke("inspect", base, "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found["kind"] == "base model"
    assert found["form"] == "original Stable Diffusion file"
    assert found["model"] == "Stable Diffusion of another size"
    assert (found["prediction_type"], found["prediction_type_said_by"]) == (
        "v_prediction",
        "its ModelSpec",
    )
    assert found["dtypes"] == ["float32"]
    assert found["tensors"] == {"read": 1130, "missing": 0, "left_over": 0, "not_needed": 0}
    assert {name: network["tensors"] for name, network in found["networks"].items()} == {
        "unet": 686,
        "vae": 248,
        "text_encoder": 196,
    }
    parameters = {network: sum(array.size for array in arrays.values())
                  for network, arrays in made.weights("sd1").items()}  # fmt: skip
    assert {n: network["parameters"] for n, network in found["networks"].items()} == parameters


def test_inspect_tells_a_person(invoke: Invoke, base: Path, style: Path) -> None:
    lines = invoke("inspect", base).stdout.splitlines()
    assert lines[0] == "sd.safetensors: base model, original Stable Diffusion file"
    assert "1130 read, 0 missing, 0 left over" in "\n".join(lines)
    assert "v_prediction, by its ModelSpec" in "\n".join(lines)
    text = invoke("inspect", style).stdout
    assert text.startswith("style.safetensors: LoRA, kohya\n")
    assert "528 read, 0 missing, 0 left over" in text
    assert "ss_base_model_version  sd_v1_v" in text


def test_inspect_the_base_that_comes_along(invoke: Invoke, project_root: Path) -> None:
    found = json.loads(invoke("inspect", project_root / "assets" / "emoji-base", "--json").stdout)
    assert found["form"] == "diffusers folder"
    assert found["tensors"]["left_over"] == 0


def test_inspect_a_lora(invoke: Invoke, style: Path) -> None:
    found = json.loads(invoke("inspect", style, "--json").stdout)
    assert found["kind"] == "LoRA"
    assert found["form"] == "kohya"
    assert (found["ranks"], found["alphas"]) == ([RANK], [1.0])
    assert found["not_finite"] == 0
    assert found["tensors"] == {"read": 3 * len(STYLE), "missing": 0, "left_over": 0}
    assert found["networks"]["unet"]["modules"] == 128
    assert found["networks"]["text_encoder"]["modules"] == 48
    size = sum(down.size + up.size for (n, _), (down, up) in STYLE.items() if n == "unet")
    assert found["networks"]["unet"]["parameters"] == size
    assert found["metadata"]["ss_sd_model_name"] == "my base"


def test_inspect_shows_what_is_not_understood_and_what_is_no_number(
    invoke: Invoke, tmp_path: Path
) -> None:
    tensors = made.kohya(STYLE, 1.0) | {"wonder": np.ones(2, np.float32)}
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"
    tensors[name] = np.full_like(tensors[name], np.nan)
    path = made.write_safetensors(tmp_path / "a.safetensors", tensors)
    found = json.loads(invoke("inspect", path, "--json").stdout)
    assert found["left_over"] == ["wonder"]
    assert found["not_finite"] == tensors[name].size
    text = invoke("inspect", path).stdout
    assert "1 left over" in text
    assert "wonder" in text
    assert f"{tensors[name].size} values are NaN or infinite" in text


def test_inspect_a_version_of_the_registry(invoke: Invoke, loras: Registry, style: Path) -> None:
    loras.push("style", style)
    for reference in ("style", "style@1"):
        assert invoke("inspect", reference).stdout.startswith("style@1: LoRA, kohya\n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "expected a safetensors file or a MindSpore .ckpt, found neither"),
        (b"PK\x03\x04" + bytes(20), "this is a PyTorch pickle"),
        (made.safetensors_bytes({"a": np.ones(1)}), "expected a whole Stable Diffusion file"),
    ],
)
def test_inspect_what_is_neither(content: bytes, said: str, invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    sentence = fails(invoke("inspect", path))
    assert sentence.startswith(f"{path}: ")
    assert said in sentence


# ---- operands


def test_an_operand_that_is_not_there(invoke: Invoke, loras: Registry, style: Path) -> None:
    loras.push("style", style)
    assert "there is no file No.safetensors; check the path" in fails(
        invoke("inspect", "No.safetensors")
    )
    assert "style has no version 2" in fails(invoke("inspect", "style@2"))
    assert "hero" in fails(invoke("inspect", "hero"))
    assert "no registry is named" in fails(invoke("inspect", "style@1", location=None))
    assert "there is no file" in fails(invoke("inspect", 5000 * "A"))


def test_a_file_wins_over_a_name_of_the_registry(
    invoke: Invoke, loras: Registry, style: Path, hero: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loras.push("style", style)
    monkeypatch.chdir(style.parent)
    hero.rename("style")
    assert invoke("inspect", "style").stdout.startswith("style: LoRA, PEFT\n")


def test_a_version_whose_file_was_altered_is_not_used(
    invoke: Invoke, loras: Registry, style: Path, blob: Callable[[], Path],
    damage: Callable[[Path], None], tmp_path: Path,
) -> None:  # fmt: skip
    loras.push("style", style)
    damage(blob())
    fails(invoke("export", "style@1", "--format", "kohya", "--out", tmp_path / "a.safetensors"))
    assert not (tmp_path / "a.safetensors").exists()


# ---- export


@pytest.mark.parametrize(
    ("format", "name", "dialect"),
    [
        ("kohya", "out.safetensors", "kohya"),
        ("diffusers", "out.safetensors", "PEFT"),
        ("mindone", "out.ckpt", "MindONE"),
    ],
)
def test_export_a_lora(
    format: str, name: str, dialect: str, invoke: Invoke, loras: Registry, style: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    loras.push("style", style)
    out = tmp_path / "new" / name
    succeeds(invoke("export", "style@1", "--format", format, "--out", out), out)
    assert lora_files.read(out).dialect == dialect
    assert same(deltas(out), dense(STYLE, 1 / RANK))
    if format != "mindone":
        kept = metadata(out)
        assert kept["ss_sd_model_name"] == "my base"
        assert "other" not in kept


def test_export_gives_a_lora_without_a_header_one(invoke: Invoke, tmp_path: Path) -> None:
    path = made.write_safetensors(tmp_path / "bare.safetensors", made.peft(STYLE))
    out = tmp_path / "mine.safetensors"
    succeeds(invoke("export", path, "--format", "kohya", "--out", out), out)
    found = metadata(out)
    assert found["ss_base_model_version"] == "sd_v1"
    assert (found["ss_network_dim"], found["modelspec.title"]) == ("2", "mine")


@pytest.mark.parametrize(
    ("format", "name", "layout"),
    [
        ("diffusers", "out", "diffusers folder"),
        ("original", "out.safetensors", "original Stable Diffusion file"),
        ("mindone", "out.ckpt", "MindONE checkpoint"),
    ],
)
def test_export_a_base(
    format: str, name: str, layout: str, invoke: Invoke, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / name
    arguments = ("export", base, "--format", format, "--out", out, "--json")
    result = invoke(*arguments, "--dtype", "float16")
    assert json.loads(result.stdout) == {"path": str(out), "result": format}
    found = open_base(out)
    assert (found.layout, found.dtypes) == (layout, ("float16",))
    for network, arrays in made.weights("sd1").items():
        again = found.load(network)
        assert all(np.array_equal(again[name], array) for name, array in arrays.items())


def test_export_the_ema_copy(invoke: Invoke, tmp_path: Path) -> None:
    tensors = made.original("emoji")
    ema = {f"model_ema.{name[6:].replace('.', '')}": array + 1
           for name, array in tensors.items() if name.startswith("model.")}  # fmt: skip
    path = made.write_safetensors(tmp_path / "a.safetensors", tensors | ema)
    for option, added in (([], 0), (["--ema"], 1)):
        out = tmp_path / f"out-{added}"
        succeeds(invoke("export", path, "--format", "diffusers", "--out", out, *option), out)
        found = open_base(out).load("unet")
        assert all(np.array_equal(found[name], array + added)
                   for name, array in made.weights("emoji")["unet"].items())  # fmt: skip


def test_export_refuses_what_does_not_go_together(
    invoke: Invoke, base: Path, style: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"

    def refused(source: Path, format: str, out: Path = out, *more: str) -> str:
        return fails(invoke("export", source, "--format", format, "--out", out, *more))

    assert refused(style, "original").endswith(
        "style.safetensors is a LoRA, and there is no format 'original' for one; choose "
        "--format kohya or diffusers or mindone"
    )
    assert "choose --format diffusers or original or mindone" in refused(base, "kohya")
    assert "a name that ends in .ckpt for mindone" in refused(style, "mindone")
    assert "a name that ends in .ckpt for mindone" in refused(base, "mindone")
    assert "expected a folder for diffusers" in refused(base, "diffusers")
    assert "holds no EMA copy; leave --ema out" in refused(style, "kohya", out, "--ema")
    assert "there is no EMA copy" in refused(base, "original", out, "--ema")
    assert not out.exists()


@pytest.mark.parametrize("kind", ["lora", "base"])
def test_nan_and_unknown_keys_are_refused_unless_allowed(
    kind: str, invoke: Invoke, tmp_path: Path
) -> None:
    if kind == "lora":
        tensors = made.kohya(STYLE, 1.0) | {"wonder": np.ones(2, np.float32)}
        name, format = next(iter(tensors)), "kohya"
    else:
        tensors = dict(made.original("emoji"))
        name, format = "first_stage_model.quant_conv.bias", "original"
    path = tmp_path / "a.safetensors"
    tensors[name] = np.full_like(tensors[name], np.inf)
    made.write_safetensors(path, tensors)
    out = tmp_path / "out.safetensors"
    command = ("export", path, "--format", format, "--out", out)
    assert f"{name} has {tensors[name].size} of" in fails(invoke(*command))
    if kind == "lora":
        assert "--ignore-unknown" in fails(invoke(*command, "--allow-nan"))
    assert not out.exists()
    succeeds(invoke(*command, "--allow-nan", "--ignore-unknown"), out)


# ---- merge


def test_merge_two_loras_exactly(
    invoke: Invoke, loras: Registry, style: Path, hero: Path, tmp_path: Path
) -> None:
    loras.push("style", style)
    out = tmp_path / "both.safetensors"
    said = succeeds(invoke("merge", "style@1:0.75", f"{hero}:-0.5", "--out", out), out)
    assert "rank 5, exact" in said
    one, two = dense(STYLE, 0.75 / RANK), dense(HERO, -0.5)
    assert same(deltas(out), {name: one[name] + two[name] for name in one})
    header = metadata(out)
    assert header["ss_base_model_version"] == "sd_v1_v"
    assert header["modelspec.resolution"] == "768x768"
    assert header["modelspec.merged_from"] == "style@1:0.75, hero.safetensors:-0.5"
    assert header["ss_new_sd_model_hash"] == "abc"
    assert "ss_sd_model_name" not in header  # they do not agree


def test_merge_and_cut_to_a_rank(invoke: Invoke, style: Path, hero: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.safetensors"
    said = succeeds(invoke("merge", style, hero, "--rank", 2, "--out", out), out)
    one, two = dense(STYLE, 1 / RANK), dense(HERO, 1.0)
    wanted, kept, total = {}, 0.0, 0.0
    for name in one:
        u, s, vt = np.linalg.svd(one[name] + two[name], full_matrices=False)
        wanted[name] = (u[:, :2] * s[:2]) @ vt[:2]
        kept, total = kept + (s[:2] ** 2).sum(), total + (s**2).sum()
    assert f"rank 2, keeps {kept / total:.2%} of the sum's squared norm" in said
    assert lora.ranks(lora_files.read(out).adapters) == (2,)
    found = deltas(out)
    assert all(np.allclose(found[name], wanted[name], atol=1e-4) for name in wanted)


@pytest.mark.parametrize(("format", "name"), [(None, "out.safetensors"), ("diffusers", "out")])
def test_merge_into_a_base(
    format: str | None, name: str, invoke: Invoke, base: Path, style: Path, hero: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / name
    options = ["--format", format] if format else []
    command = ("merge", f"{style}:0.5", hero, "--base", base, "--out", out, *options)
    said = succeeds(invoke(*command), out)
    assert f"{format or 'original'}, {len(STYLE)} modules changed" in said
    one, two = dense(STYLE, 0.5 / RANK), dense(HERO, 1.0)
    again = open_base(out)
    assert again.prediction is not None
    assert again.prediction.type == "v_prediction"
    for network, arrays in made.weights("sd1").items():
        found = again.load(network)
        for key, array in arrays.items():
            module = f"{network}.{key.removesuffix('.weight')}"
            if module in one and key.endswith(".weight"):
                change = (one[module] + two[module]).reshape(array.shape)
                np.testing.assert_allclose(found[key], array + change, rtol=0, atol=1e-5)
            else:
                assert np.array_equal(found[key], array), key


def test_merge_refuses_loras_and_bases_that_do_not_fit(
    invoke: Invoke, style: Path, base: Path, tmp_path: Path
) -> None:
    other = made.write_safetensors(
        tmp_path / "other.safetensors", made.kohya(made.lora("sd2", MODULES))
    )
    out = tmp_path / "out.safetensors"
    assert "the LoRAs are for different models" in fails(
        invoke("merge", style, other, "--out", out)
    )
    sentence = fails(invoke("merge", other, "--base", base, "--out", out))
    assert sentence.startswith("other.safetensors: ")
    assert "use it with the base it was made for" in sentence
    assert "this is a base model, expected a LoRA" in fails(invoke("merge", base, "--out", out))
    assert "this is a LoRA file" in fails(invoke("merge", style, "--base", style, "--out", out))
    assert not out.exists()


@pytest.mark.parametrize("weight", ["much", "", "nan", "inf", "-inf"])
def test_a_weight_that_is_no_number(
    weight: str, invoke: Invoke, style: Path, tmp_path: Path
) -> None:
    sentence = fails(invoke("merge", f"{style}:{weight}", "--out", tmp_path / "a.safetensors"))
    assert f"found {weight!r} as the weight" in sentence


def test_a_file_name_may_hold_a_colon(invoke: Invoke, style: Path, tmp_path: Path) -> None:
    path = style.rename(tmp_path / "style:0.5")
    out = tmp_path / "out.safetensors"
    succeeds(invoke("merge", path, "--out", out), out)
    assert same(deltas(out), dense(STYLE, 1 / RANK))
    succeeds(invoke("merge", f"{path}:2", "--out", out, "--overwrite"), out)
    assert same(deltas(out), dense(STYLE, 2 / RANK))


def test_options_of_merge_that_exclude_each_other(
    invoke: Invoke, style: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    assert "--rank is for one LoRA" in fails(
        invoke("merge", style, "--base", base, "--rank", 2, "--out", out)
    )
    assert "--format is for --base" in fails(
        invoke("merge", style, "--format", "kohya", "--out", out)
    )
    assert "there is no format 'kohya' for a base model" in fails(
        invoke("merge", style, "--base", base, "--format", "kohya", "--out", out)
    )
    assert "--dtype" in fails(invoke("merge", style, "--out", out, "--dtype", "x"))
    assert "Missing argument" in fails(invoke("merge", "--out", out))


# ---- resize


def test_resize(invoke: Invoke, style: Path, tmp_path: Path) -> None:
    out = tmp_path / "narrow.safetensors"
    said = succeeds(invoke("resize", style, "--rank", 1, "--out", out), out)
    kept = total = 0.0
    found = deltas(out)
    for name, delta in dense(STYLE, 1 / RANK).items():
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        np.testing.assert_allclose(found[name], (u[:, :1] * s[:1]) @ vt[:1], atol=1e-4)
        kept, total = kept + s[0] ** 2, total + (s**2).sum()
    assert f"rank 2 → 1, keeps {kept / total:.2%} of its squared norm" in said
    header = metadata(out)
    assert (header["ss_network_dim"], header["modelspec.title"]) == ("1", "narrow")
    assert header["ss_sd_model_name"] == "my base"


def test_resize_to_a_larger_rank_changes_nothing(
    invoke: Invoke, style: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    said = succeeds(invoke("resize", style, "--rank", 64, "--out", out), out)
    assert "rank 2 → 2, keeps 100.00%" in said
    assert same(deltas(out), dense(STYLE, 1 / RANK))


@pytest.mark.parametrize("rank", ["0", "-1", "many"])
def test_a_rank_that_is_none(rank: str, invoke: Invoke, style: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    assert "--rank" in fails(invoke("resize", style, "--rank", rank, "--out", out))


# ---- extract


def tuned(found: made.Lora, scale: float) -> dict[str, made.Arrays]:
    """The model after fine-tuning did exactly what a LoRA does."""
    weights = {network: dict(arrays) for network, arrays in made.weights("sd1").items()}
    for key, change in dense(found, scale).items():
        network, _, module = key.partition(".")
        old = weights[network][f"{module}.weight"]
        weights[network][f"{module}.weight"] = old + change.reshape(old.shape)
    return weights


FEW = {key: value for key, value in STYLE.items()
       if key[1].startswith("mid_block") and key[1].endswith(("to_q", "to_v"))}  # fmt: skip


def test_extract_gives_back_the_lora(invoke: Invoke, base: Path, tmp_path: Path) -> None:
    other = made.write_folder(tmp_path / "tuned", tuned(FEW, 1.0))
    out = tmp_path / "out.safetensors"
    command = ("extract", "--base", base, "--tuned", other, "--rank", RANK, "--out", out)
    result = invoke(*command)
    said = succeeds(result, out)
    assert f"rank {RANK} on {len(FEW)} modules, keeps 100.00% of their change" in said
    assert "other weights" not in said
    assert same(deltas(out), dense(FEW, 1.0))
    header = metadata(out)
    assert (header["ss_base_model_version"], header["ss_network_dim"]) == ("sd_v1_v", "2")


def test_extract_tells_what_no_lora_holds(invoke: Invoke, base: Path, tmp_path: Path) -> None:
    weights = tuned(FEW, 1.0)
    name = "conv_in.bias"
    changed = weights["unet"][name] + np.float32(2)
    weights["unet"][name] = changed
    other = made.write_folder(tmp_path / "tuned", weights)
    out = tmp_path / "out.safetensors"
    result = invoke(
        "extract", "--base", base, "--tuned", other, "--rank", 1, "--out", out, "--json"
    )
    assert result.exit_code == 0
    (line,) = result.stdout.splitlines()
    said = json.loads(line)
    whole = sum(float((delta**2).sum()) for delta in dense(FEW, 1.0).values())
    kept = sum(float(np.linalg.norm(delta, 2) ** 2) for delta in dense(FEW, 1.0).values())
    elsewhere = 4.0 * changed.size
    assert f"keeps {kept / whole:.2%} of their change" in said["result"]
    share = elsewhere / (whole + elsewhere)
    assert f"{share:.2%} of all change lies in other weights" in said["result"]


def test_extract_can_leave_out_the_projections(invoke: Invoke, base: Path, tmp_path: Path) -> None:
    projection = made.lora("sd1", r"mid_block\.attentions\.0\.proj_in", RANK)
    other = made.write_folder(tmp_path / "tuned", tuned(FEW | projection, 1.0))
    for targets, modules in (("transformer", 5), ("attention", 4)):
        out = tmp_path / f"{targets}.safetensors"
        command = ("extract", "--base", base, "--tuned", other, "--rank", 2, "--out", out)
        succeeds(invoke(*command, "--targets", targets), out)
        assert lora_files.read(out).modules == modules


def test_extract_refuses_models_that_are_equal_or_of_other_shapes(
    invoke: Invoke, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    command = ("extract", "--base", base, "--rank", 2, "--out", out, "--tuned")
    assert "there is nothing to extract" in fails(invoke(*command, base))
    other = made.write_safetensors(tmp_path / "sd2.safetensors", made.original("sd2"))
    sentence = fails(invoke(*command, other))
    assert f"{other}: its unet is not that of {base}" in sentence
    assert "name the base that it was tuned from" in sentence
    assert not out.exists()


# ---- what is there stays there


@pytest.mark.parametrize("command", ["export", "merge", "merge into", "resize", "extract"])
def test_nothing_is_overwritten_unless_it_is_asked_for(
    command: str, invoke: Invoke, style: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    other = made.write_folder(tmp_path / "tuned", tuned(FEW, 1.0))
    words = {
        "export": ("export", style, "--format", "kohya"),
        "merge": ("merge", style),
        "merge into": ("merge", style, "--base", base),
        "resize": ("resize", style, "--rank", 1),
        "extract": ("extract", "--base", base, "--tuned", other, "--rank", 1),
    }[command]
    sentence = fails(invoke(*words, "--out", out))
    assert sentence == f"{out}: it exists; choose another --out or add --overwrite"
    assert out.read_text() == "mine"
    succeeds(invoke(*words, "--out", out, "--overwrite"), out)
    assert load(out)


@pytest.mark.parametrize("command", [("merge",), ("resize", "--rank", 1)])
def test_a_lora_is_written_in_the_dtype_that_is_asked_for(
    command: tuple, invoke: Invoke, style: Path, tmp_path: Path
) -> None:
    for options, dtype in ((["--dtype", "float16"], np.float16), ([], np.float32)):
        out = tmp_path / f"{dtype.__name__}.safetensors"
        succeeds(invoke(*command, style, "--out", out, *options), out)
        assert {array.dtype for array in load(out).values()} == {np.dtype(dtype)}


def test_a_place_where_no_file_can_be(invoke: Invoke, style: Path) -> None:
    out = style / "out.safetensors"
    assert "cannot be written" in fails(invoke("merge", style, "--out", out))
