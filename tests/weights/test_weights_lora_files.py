"""LoRA files: the same LoRA in every dialect is read alike, and written so that it is again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.weights import made
from weights import files, lora_files
from weights.lora import Adapter, Adapters, fit

RANK = 2
SHARED = made.lora("sd1", made.ATTENTION, RANK, shared=True)
"""The attention of UNet and text encoder: what every dialect can say."""
WHOLE = made.lora("sd1", made.ALL, RANK)

Write = Callable[[Path], Path]


def safetensors(tensors: made.Arrays, dtype: str | None = None, **metadata: str) -> Write:
    return lambda path: made.write_safetensors(
        path.with_suffix(".safetensors"), tensors, metadata, dtype
    )


def ckpt(tensors: made.Arrays, after: bytes = b"") -> Write:
    def write(path: Path) -> Path:
        path = path.with_suffix(".ckpt")
        path.write_bytes(made.ckpt_bytes(tensors, after=after))
        return path

    return write


def adapter_metadata(rank: int, alpha: float, pattern: Mapping[str, float] = {}) -> str:
    """As diffusers writes it with `unet_lora_adapter_metadata=…`."""
    config: dict[str, object] = {}
    for network in ("unet", "text_encoder"):
        config[f"{network}.r"] = rank
        config[f"{network}.lora_alpha"] = alpha
        config[f"{network}.target_modules"] = ["to_q"]
        config[f"{network}.alpha_pattern"] = dict(pattern)
    return json.dumps(config)


def deltas(adapters: Adapters) -> made.Arrays:
    return {
        f"{network}.{module}": adapter.delta()
        for network, modules in adapters.items()
        for module, adapter in modules.items()
    }


def expected_delta(matrices: made.Matrices, scale: float) -> np.ndarray:
    down, up = matrices
    return scale * (up.reshape(len(up), -1) @ down.reshape(len(down), -1))


def wrong(adapters: Adapters, lora: made.Lora, scale: float = 1.0) -> list[str]:
    """Modules whose down, up or scale is not, bit for bit, that of the LoRA."""
    found = {(network, module) for network, modules in adapters.items() for module in modules}
    problems = [".".join(module) for module in found ^ lora.keys()]
    for network, module in found & lora.keys():
        adapter, (down, up) = adapters[network][module], lora[network, module]
        same = (
            adapter.scale == scale
            and np.array_equal(adapter.down.reshape(len(down), -1), down.reshape(len(down), -1))
            and np.array_equal(adapter.up.reshape(len(up), -1), up.reshape(len(up), -1))
        )
        problems += [] if same else [f"{network}.{module}"]
    return problems


# ---- in


DIALECTS: dict[str, tuple[str, Write]] = {
    "kohya": ("kohya", safetensors(made.kohya(SHARED, RANK))),
    "kohya, lora_te1": ("kohya", safetensors(made.kohya(SHARED, RANK, text="lora_te1"))),
    "kohya, no alpha": ("kohya", safetensors(made.kohya(SHARED))),
    "kohya, alpha 0": ("kohya", safetensors(made.kohya(SHARED, 0.0))),
    "kohya, float16": ("kohya", safetensors(made.kohya(SHARED, RANK), "F16")),
    "kohya, bfloat16": ("kohya", safetensors(made.kohya(SHARED, RANK), "BF16")),
    "kohya, original names": (
        "kohya, original names",
        safetensors(made.kohya(SHARED, RANK, original_names=True)),
    ),
    "diffusers, processors": ("diffusers, processors", safetensors(made.processors(SHARED))),
    "diffusers": ("diffusers", safetensors(made.diffusers(SHARED))),
    "PEFT": ("PEFT", safetensors(made.peft(SHARED))),
    "PEFT, bfloat16": ("PEFT", safetensors(made.peft(SHARED), "BF16")),
    "PEFT, metadata": (
        "PEFT",
        safetensors(
            made.peft(SHARED), lora_adapter_metadata=adapter_metadata(RANK, RANK), format="pt"
        ),
    ),
    "MindONE": ("MindONE", ckpt(made.mindone_lora(SHARED))),
    "MindONE, appended values": ("MindONE", ckpt(made.mindone_lora(SHARED),
                                 made.value("epoch_num", "Int64", (), bytes(8)))),
    "MindONE, safetensors": ("MindONE", safetensors(made.mindone_lora(SHARED))),
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read_to_the_same_adapters(dialect: str, tmp_path: Path) -> None:
    spoken, write = DIALECTS[dialect]
    found = lora_files.read(write(tmp_path / "a"))
    assert wrong(found.adapters, SHARED) == []
    assert found.modules == 128 + 12 * 4
    assert found.unknown == ()
    text_of_kohya = dialect == "kohya, original names" and found.dialect == "kohya"
    assert found.dialect == spoken or text_of_kohya


@pytest.mark.parametrize("model", ["sd1", "sd2"])
def test_a_whole_kohya_lora_is_read_and_fits_its_base(model: str, tmp_path: Path) -> None:
    """kohya writes the projections as 1×1 convolutions, also where the model has linear layers."""
    lora = made.lora(model, made.ALL, RANK)

    def other_form(module: str, matrix: np.ndarray) -> np.ndarray:
        if not module.endswith(("proj_in", "proj_out")):
            return matrix
        return matrix[..., None, None] if matrix.ndim == 2 else matrix[..., 0, 0]

    turned = {
        (network, module): tuple(other_form(module, matrix) for matrix in matrices)
        for (network, module), matrices in lora.items()
    }
    path = tmp_path / "a.safetensors"
    for form in (lora, turned):
        made.write_safetensors(path, made.kohya(form, alpha=1.0))  # type: ignore[arg-type]
        found = lora_files.read(path)
        assert found.tensors == (792 if model == "sd1" else 990)
        fitted = fit(found.adapters, made.shapes(model), "a.safetensors")
        assert wrong(fitted, lora, scale=1 / RANK) == []
        for network, modules in fitted.items():
            for module, adapter in modules.items():
                shape = made.shapes(model)[network][f"{module}.weight"]
                assert adapter.down.shape == (RANK, *shape[1:])
                assert adapter.up.shape == (shape[0], RANK, *(1 for _ in shape[2:]))


def test_convolutions_of_three_by_three_are_read(tmp_path: Path) -> None:
    lora = made.lora("sd1", made.CONVOLUTIONS, RANK)
    assert any(down.shape[2:] == (3, 3) for down, _ in lora.values())
    for tensors in (
        made.kohya(lora, 1.0),
        made.kohya(lora, 1.0, original_names=True),
    ):
        found = lora_files.read(made.write_safetensors(tmp_path / "a.safetensors", tensors))
        assert wrong(found.adapters, lora, 1 / RANK) == []
        fit(found.adapters, made.shapes("sd1"), "a.safetensors")
    found = lora_files.read(made.write_safetensors(tmp_path / "a.safetensors", made.peft(lora)))
    assert wrong(found.adapters, lora) == []


def test_alpha_over_rank_is_the_scale(tmp_path: Path) -> None:
    path = made.write_safetensors(tmp_path / "a.safetensors", made.kohya(SHARED, alpha=1.0))
    assert wrong(lora_files.read(path).adapters, SHARED, scale=0.5) == []


def test_the_header_of_peft_says_alpha(tmp_path: Path) -> None:
    special = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    text = "text_model.encoder.layers.3.self_attn.q_proj"
    header = adapter_metadata(RANK, 8, {special: 1, text: 3})
    path = safetensors(made.peft(SHARED), lora_adapter_metadata=header)(tmp_path / "a")
    found = lora_files.read(path).adapters
    scales = {
        (network, module): adapter.scale
        for network, modules in found.items()
        for module, adapter in modules.items()
    }
    assert scales.pop(("unet", special)) == 1 / RANK
    assert scales.pop(("text_encoder", text)) == 3 / RANK
    assert set(scales.values()) == {8 / RANK}


def test_peft_keeps_its_configuration_beside_the_file(tmp_path: Path) -> None:
    path = safetensors(made.peft(SHARED, "base_model.model."))(tmp_path / "adapter_model")
    config = {"lora_alpha": 8, "alpha_pattern": {"attn2.to_k": 1}, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    scales = {
        module: adapter.scale
        for modules in lora_files.read(path).adapters.values()
        for module, adapter in modules.items()
    }
    assert {s for m, s in scales.items() if m.endswith("attn2.to_k")} == {1 / RANK}
    assert {s for m, s in scales.items() if not m.endswith("attn2.to_k")} == {8 / RANK}

    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8, "use_rslora": true}')
    for modules in lora_files.read(path).adapters.values():
        for adapter in modules.values():
            assert adapter.scale == pytest.approx(8 / math.sqrt(RANK))


@pytest.mark.parametrize("format", lora_files.FORMATS)
def test_a_value_too_large_for_float16_is_not_made_infinite(format: str, tmp_path: Path) -> None:
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    large = Adapter(np.full((1, 4), 1e5, np.float32), np.ones((4, 1), np.float32), 1.0)
    path = tmp_path / ("a.ckpt" if format == "mindone" else "a.safetensors")
    with pytest.raises(files.WeightsError, match="values that float16 cannot hold"):
        lora_files.write(path, {"unet": {module: large}}, {}, format, np.float16)
    assert not list(tmp_path.iterdir())


def test_an_alpha_tensor_is_more_than_the_header(tmp_path: Path) -> None:
    module = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    tensors = made.peft({module: SHARED[module]}) | {
        f"unet.{module[1]}.alpha": np.array(1.0, np.float32)
    }
    header = adapter_metadata(RANK, 8)
    path = safetensors(tensors, lora_adapter_metadata=header)(tmp_path / "a")
    assert lora_files.read(path).adapters["unet"][module[1]].scale == 1 / RANK


@pytest.mark.parametrize(
    "header",
    ["{", "[]", "[" * 99999, '{"unet.lora_alpha": NaN}', '{"unet.lora_alpha": "much"}',
     '{"unet.lora_alpha": 1' + 400 * "0" + "}", '{"unet.alpha_pattern": 3}'],
    ids=["cut", "list", "deep", "NaN", "text", "huge", "pattern"],
)  # fmt: skip
def test_a_header_of_peft_that_is_not_one_is_refused(header: str, tmp_path: Path) -> None:
    path = safetensors(made.peft(SHARED), lora_adapter_metadata=header)(tmp_path / "a")
    with pytest.raises(files.WeightsError, match="configuration in its header is not what PEFT"):
        lora_files.read(path)


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_a_file_of_one_network_needs_no_prefix(prefix: str, tmp_path: Path) -> None:
    for network in ("unet", "text_encoder"):
        lora = {key: value for key, value in SHARED.items() if key[0] == network}
        path = safetensors(made.peft(lora, prefix))(tmp_path / "a")
        assert wrong(lora_files.read(path).adapters, lora) == []


def test_each_module_may_have_its_own_rank(tmp_path: Path) -> None:
    modules = list(SHARED)[:4]
    lora = {module: made.lora("sd1", made.ATTENTION, i + 1)[module]
            for i, module in enumerate(modules)}  # fmt: skip
    path = safetensors(made.kohya(lora))(tmp_path / "a")
    found = lora_files.read(path).adapters
    assert wrong(found, lora) == []
    assert [found["unet"][module].rank for _, module in modules] == [1, 2, 3, 4]


# ---- out


def adapters_of(lora: made.Lora, alpha: float) -> dict[str, dict[str, Adapter]]:
    found: dict[str, dict[str, Adapter]] = {}
    for (network, module), (down, up) in lora.items():
        found.setdefault(network, {})[module] = Adapter(down, up, alpha)
    return found


SUFFIX = {"kohya": ".safetensors", "diffusers": ".safetensors", "mindone": ".ckpt"}


@pytest.mark.parametrize("alpha", [2.0, 1.0, 3.0])
@pytest.mark.parametrize("format", lora_files.FORMATS)
def test_what_is_written_does_the_same(format: str, alpha: float, tmp_path: Path) -> None:
    path = tmp_path / f"a{SUFFIX[format]}"
    lora_files.write(path, adapters_of(SHARED, alpha), {}, format)
    found = deltas(lora_files.read(path).adapters)
    assert found.keys() == {f"{network}.{module}" for network, module in SHARED}
    for (network, module), matrices in SHARED.items():
        wanted = expected_delta(matrices, alpha / RANK)
        np.testing.assert_allclose(found[f"{network}.{module}"], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_matrices_and_alpha_come_back_as_they_were(format: str, tmp_path: Path) -> None:
    """Also where the modules have several ranks and alphas."""
    written = adapters_of(WHOLE, 3.0)
    module = "mid_block.attentions.0.proj_in"
    down, up = made.lora("sd1", made.ALL, rank=3, seed=1)["unet", module]
    written["unet"][module] = Adapter(down, up, 0.5)
    path = tmp_path / "a.safetensors"
    lora_files.write(path, written, {}, format)
    found = lora_files.read(path).adapters
    for network, modules in written.items():
        assert found[network].keys() == modules.keys()
        for name, adapter in modules.items():
            again = found[network][name]
            assert again.alpha == adapter.alpha
            assert np.array_equal(again.down, adapter.down)
            assert np.array_equal(again.up, adapter.up)


def test_mindone_is_exact_where_the_downs_are_shared(tmp_path: Path) -> None:
    lora_files.write(tmp_path / "a.ckpt", adapters_of(SHARED, RANK), {}, "mindone")
    found = files.load(tmp_path / "a.ckpt")
    wanted = made.mindone_lora(SHARED)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], array) for name, array in wanted.items())
    assert found["lora_rank"] == RANK
    # 128 of the UNet, two of each layer of the text encoder; down and up; and the rank.
    assert len(found) == 2 * (128 + 2 * 12) + 1


def test_mindone_takes_three_ranks_where_the_downs_differ(tmp_path: Path) -> None:
    lora = made.lora("sd1", made.ATTENTION, RANK)
    lora_files.write(tmp_path / "a.ckpt", adapters_of(lora, 1.0), {}, "mindone")
    found = lora_files.read(tmp_path / "a.ckpt")
    attention = "text_model.encoder.layers.0.self_attn.{}_proj"
    assert {a.rank for m in found.adapters.values() for a in m.values()} == {3 * RANK}
    for part in ("q", "k", "v", "out"):
        name = attention.format(part)
        np.testing.assert_array_equal(
            found.adapters["text_encoder"][name].delta(),
            expected_delta(lora["text_encoder", name], 0.5),
        )
    for (network, module), matrices in lora.items():
        np.testing.assert_array_equal(
            found.adapters[network][module].delta(), expected_delta(matrices, 0.5)
        )


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (r"mid_block\.attentions\.0\.proj_in", "MindONE adapts the attention only"),
        (r".*layers\.0\.mlp\.fc1", "MindONE adapts the attention only"),
        (r".*layers\.0\.self_attn\.[qv]_proj", "has no k_proj, and MindONE keeps q, k and v"),
    ],
)
def test_what_mindone_cannot_hold_is_refused(modules: str, said: str, tmp_path: Path) -> None:
    adapters = adapters_of(made.lora("sd1", modules), 1.0)
    with pytest.raises(files.WeightsError, match=said):
        lora_files.write(tmp_path / "a.ckpt", adapters, {}, "mindone")
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_mindone_does_not_have_is_refused(tmp_path: Path) -> None:
    matrix = np.ones((1, 1), np.float32)
    module = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    adapters = {"unet": {module: Adapter(matrix, matrix, 1.0)}}
    with pytest.raises(files.WeightsError, match=r"MindONE's UNet has no up_blocks\.0") as raised:
        lora_files.write(tmp_path / "a.ckpt", adapters, {}, "mindone")
    assert str(tmp_path / "a.ckpt") in str(raised.value)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_dtype_is_the_one_that_is_asked_for(format: str, dtype: type, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora_files.write(path, adapters_of(SHARED, 1.0), {}, format, dtype)
    assert {array.dtype for array in files.load(path).values()} == {np.dtype(dtype)}


def test_a_kohya_file_holds_three_tensors_a_module_and_nothing_else(tmp_path: Path) -> None:
    """diffusers refuses a file with any other key."""
    path = tmp_path / "a.safetensors"
    lora_files.write(path, adapters_of(WHOLE, 1.0), {})
    found, wanted = files.load(path), made.kohya(WHOLE, 1.0)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    assert all(found[name].shape == wanted[name].shape for name in wanted)


def test_a_diffusers_file_carries_the_configuration_of_peft(tmp_path: Path) -> None:
    """Modules without "text_model.", which PEFT finds with it and, in newer encoders, without."""
    modules = {key: value for key, value in SHARED.items() if "layers.0" in key[1]}
    adapters = adapters_of(modules, 3.0)
    down, up = made.lora("sd1", made.ATTENTION, rank=1)[next(iter(modules))]
    first = next(iter(modules))[1]
    adapters["text_encoder"][first] = Adapter(down, up, 5.0)
    path, short = tmp_path / "a.safetensors", first.removeprefix("text_model.")
    lora_files.write(path, adapters, {"ss_v2": "False"}, "diffusers")
    header = files.metadata(path)
    assert header["format"] == "pt"
    assert header["ss_v2"] == "False"
    assert json.loads(header["lora_adapter_metadata"]) == {
        "text_encoder.r": RANK,
        "text_encoder.lora_alpha": 3.0,
        "text_encoder.target_modules": sorted(
            module.removeprefix("text_model.") for _, module in modules
        ),
        "text_encoder.rank_pattern": {short: 1},
        "text_encoder.alpha_pattern": {short: 5.0},
    }
    assert files.load(path).keys() == made.peft(modules).keys()


# ---- the header


@pytest.mark.parametrize(
    ("version", "second", "architecture", "predicts"),
    [
        ("sd_v1", "False", "stable-diffusion-v1/lora", "epsilon"),
        ("sd_v1_v", "False", "stable-diffusion-v1/lora", "v"),
        ("sd_v2", "True", "stable-diffusion-v2-512/lora", "epsilon"),
        ("sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "v"),
    ],
)
def test_the_header_has_the_minimum_that_other_tools_read(
    version: str, second: str, architecture: str, predicts: str, tmp_path: Path
) -> None:
    adapters = adapters_of(SHARED, 1.0)
    header = lora_files.header(adapters, "ink", version, 768, {"ss_seed": "7"})
    path = tmp_path / "a.safetensors"
    lora_files.write(path, adapters, header)
    found = files.metadata(path)
    assert (
        found.items()
        >= {
            "ss_v2": second,
            "ss_base_model_version": version,
            "ss_network_module": "networks.lora",
            "ss_network_dim": "2",
            "ss_network_alpha": "1.0",
            "ss_network_args": "{}",
            "ss_seed": "7",
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": architecture,
            "modelspec.implementation": "diffusers",
            "modelspec.title": "ink",
            "modelspec.resolution": "768x768",
            "modelspec.prediction_type": predicts,
        }.items()
    )


def test_several_ranks_are_called_dynamic() -> None:
    adapters = adapters_of(SHARED, 1.0)
    module = next(iter(adapters["unet"]))
    down, up = made.lora("sd1", made.ATTENTION, rank=1)["unet", module]
    adapters["unet"][module] = Adapter(down, up, 2.0)
    header = lora_files.header(adapters, "ink", "sd_v1", 512)
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("Dynamic", "Dynamic")


def test_the_model_hash_is_that_of_the_tensors_alone(tmp_path: Path) -> None:
    adapters = adapters_of(SHARED, 1.0)
    digests = set()
    for title in ("one", "another title"):
        path = tmp_path / "a.safetensors"
        lora_files.write(path, adapters, lora_files.header(adapters, title, "sd_v1", 512))
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        digest = hashlib.sha256(content[start:]).hexdigest()
        assert files.metadata(path)["sshs_model_hash"] == digest
        digests.add(digest)
    assert len(digests) == 1
    lora_files.write(path, adapters_of(SHARED, 2.0), {})
    assert files.metadata(path)["sshs_model_hash"] not in digests


def test_one_content_is_one_file(tmp_path: Path) -> None:
    """The library that writes safetensors would put the metadata in another order each time."""
    tensors = {f"weight {n}": np.full((2, n + 1), n, np.float32) for n in range(5)}
    metadata = {f"key {n} ü": json.dumps({"a": n, "b/": '"'}) for n in range(20)}
    paths = [tmp_path / f"{n}.safetensors" for n in range(5)]
    for path in paths:
        files.dump(path, tensors, metadata)
    assert len({path.read_bytes() for path in paths}) == 1
    opened = files.open_tensors(paths[0])
    assert opened.metadata == metadata
    for name, tensor in files.load(paths[0]).items():
        np.testing.assert_array_equal(tensor, tensors[name])
