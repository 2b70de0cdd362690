"""The feature networks beside PyTorch: EfficientNet-Lite0 with its real weights, Inception and CLIP
with made-up ones, and our reader of `torch.save` files beside `torch.load`.

PyTorch computes in double precision where that is affordable, so that a bound is what single
precision costs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion.models import compile_graphs, in_batches
from diffusion.randomness import generator
from sampler import clip, efficientnet, features, inception
from weights import checkpoint, torch_file

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1800)]


@pytest.fixture(autouse=True, scope="module")
def _graph_mode() -> None:
    compile_graphs()


def noise(name: str, *shape: int) -> np.ndarray:
    """Float32 in [-1, 1), the same at every call."""
    return generator(0, name).uniform(-1, 1, shape).astype(np.float32)


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    """Largest difference relative to the largest value."""
    assert ours.shape == theirs.shape
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"relative difference {difference:.2g}")
    assert difference <= tolerance


# ---- the reader


def same(ours: Mapping[str, np.ndarray], theirs: Mapping[str, Any]) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        array = tensor.detach()
        array = (array.float() if str(array.dtype) == "torch.bfloat16" else array).numpy()
        assert ours[name].dtype == array.dtype, name
        assert ours[name].shape == array.shape, name
        assert ours[name].tobytes() == array.tobytes(), name


def test_the_reader_equals_torch_load_on_the_weights_of_efficientnet() -> None:
    import torch

    path = efficientnet.weights_path()
    same(torch_file.load(path), torch.load(path, weights_only=True))


@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
def test_the_reader_equals_torch_load_on_every_kind_of_tensor(zipped: bool, tmp_path: Path) -> None:
    import torch

    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8, torch.int16)
    state = network.state_dict() | {
        "parameter": torch.nn.Parameter(whole.clone()),
        "transposed": whole.t(),
        "part": whole[1:, 2:4],
        "alike": whole,
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        **{str(dtype): whole.to(dtype) for dtype in (*dtypes, torch.int32, torch.int64)},
    }
    path = tmp_path / "state.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    same(torch_file.load(path), torch.load(path, weights_only=True))


# ---- EfficientNet-Lite0


def their_efficientnet(state: Mapping[str, Any], x: Any) -> tuple[Any, Any]:
    """EfficientNet-B0's table (arXiv 1905.11946), TensorFlow's padding, no squeeze, ReLU6."""
    import torch.nn.functional as F

    def unit(conv: str, norm: str, x: Any, stride: int = 1) -> Any:
        weight = state[f"{conv}.weight"]
        kernel = weight.shape[-1]
        lost = max(0, (-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1])
        before, after = lost // 2, lost - lost // 2
        groups = x.shape[1] // weight.shape[1]
        x = F.conv2d(F.pad(x, (before, after) * 2), weight, stride=stride, groups=groups)
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{norm}.{part}"] for part in parts), eps=1e-3)

    x = F.relu6(unit("_conv_stem", "_bn0", x, 2))
    halving = {1, 3, 5, 11}
    for i in range(16):
        y, name = x, f"_blocks.{i}"
        if i > 0:
            y = F.relu6(unit(f"{name}._expand_conv", f"{name}._bn0", y))
        y = F.relu6(unit(f"{name}._depthwise_conv", f"{name}._bn1", y, 2 if i in halving else 1))
        y = unit(f"{name}._project_conv", f"{name}._bn2", y)
        x = x + y if y.shape == x.shape else y
    pooled = F.relu6(unit("_conv_head", "_bn1", x)).mean((2, 3))
    return pooled, F.linear(pooled, state["_fc.weight"], state["_fc.bias"])


def efficientnet_state() -> dict[str, Any]:
    """The real weights in double precision."""
    import torch

    state = torch.load(efficientnet.weights_path(), weights_only=True)
    return {name: t.double() if t.is_floating_point() else t for name, t in state.items()}


def test_efficientnet() -> None:
    import torch

    network = efficientnet.network(efficientnet.weights_path())
    pixels = noise("efficientnet", 2, 3, efficientnet.SIZE, efficientnet.SIZE)
    ours = in_batches(network, pixels, 2)
    pooled, logits = their_efficientnet(efficientnet_state(), torch.tensor(pixels).double())
    close(ours, pooled.numpy(), 1e-5)
    close(efficientnet.logits(network, ours), logits.numpy(), 1e-5)


# ---- Inception


def their_inception(x: Any, unit: Callable[..., Any]) -> Any:
    """torchvision's `inception.py` with the changes of pytorch-fid's.

    `unit(name, x, width, kernel, stride, padding)` is a convolution, its BatchNorm and a ReLU.
    """
    import torch
    import torch.nn.functional as F

    def average(x: Any) -> Any:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def chain(block: str, x: Any, *steps: tuple[str, int, tuple[int, int]]) -> Any:
        for name, width, kernel in steps:
            padding = (kernel[0] // 2, kernel[1] // 2)
            x = unit(f"{block}.{name}", x, width, kernel, 1, padding)
        return x

    one, three, five, across, down = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)
    x = unit("Conv2d_1a_3x3", x, 32, three, 2, (0, 0))
    x = unit("Conv2d_2a_3x3", x, 32, three, 1, (0, 0))
    x = unit("Conv2d_2b_3x3", x, 64, three, 1, (1, 1))
    x = F.max_pool2d(x, 3, 2)
    x = unit("Conv2d_3b_1x1", x, 80, one, 1, (0, 0))
    x = unit("Conv2d_4a_3x3", x, 192, three, 1, (0, 0))
    x = F.max_pool2d(x, 3, 2)
    double = (("branch3x3dbl_1", 64, one), ("branch3x3dbl_2", 96, three))
    for letter, pooled in (("b", 32), ("c", 64), ("d", 64)):
        block = f"Mixed_5{letter}"
        branches = (
            chain(block, x, ("branch1x1", 64, one)),
            chain(block, x, ("branch5x5_1", 48, one), ("branch5x5_2", 64, five)),
            chain(block, x, *double, ("branch3x3dbl_3", 96, three)),
            chain(block, average(x), ("branch_pool", pooled, one)),
        )
        x = torch.cat(branches, 1)
    y = chain("Mixed_6a", x, *double)
    branches = (
        unit("Mixed_6a.branch3x3", x, 384, three, 2, (0, 0)),
        unit("Mixed_6a.branch3x3dbl_3", y, 96, three, 2, (0, 0)),
        F.max_pool2d(x, 3, 2),
    )
    x = torch.cat(branches, 1)
    for letter, c in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
        block = f"Mixed_6{letter}"
        seven = (("branch7x7_1", c, one), ("branch7x7_2", c, across), ("branch7x7_3", 192, down))
        double = (("branch7x7dbl_1", c, one), ("branch7x7dbl_2", c, down),
                  ("branch7x7dbl_3", c, across), ("branch7x7dbl_4", c, down),
                  ("branch7x7dbl_5", 192, across))  # fmt: skip
        branches = (
            chain(block, x, ("branch1x1", 192, one)),
            chain(block, x, *seven),
            chain(block, x, *double),
            chain(block, average(x), ("branch_pool", 192, one)),
        )
        x = torch.cat(branches, 1)
    seven = (("branch7x7x3_1", 192, one), ("branch7x7x3_2", 192, across),
             ("branch7x7x3_3", 192, down))  # fmt: skip
    y, z = chain("Mixed_7a", x, ("branch3x3_1", 192, one)), chain("Mixed_7a", x, *seven)
    branches = (
        unit("Mixed_7a.branch3x3_2", y, 320, three, 2, (0, 0)),
        unit("Mixed_7a.branch7x7x3_4", z, 192, three, 2, (0, 0)),
        F.max_pool2d(x, 3, 2),
    )
    x = torch.cat(branches, 1)
    for block in ("Mixed_7b", "Mixed_7c"):
        y = chain(block, x, ("branch3x3_1", 384, one))
        z = chain(block, x, ("branch3x3dbl_1", 448, one), ("branch3x3dbl_2", 384, three))
        pooled = average(x) if block == "Mixed_7b" else F.max_pool2d(x, 3, 1, padding=1)
        branches = (
            chain(block, x, ("branch1x1", 320, one)),
            chain(block, y, ("branch3x3_2a", 384, (1, 3))),
            chain(block, y, ("branch3x3_2b", 384, (3, 1))),
            chain(block, z, ("branch3x3dbl_3a", 384, (1, 3))),
            chain(block, z, ("branch3x3dbl_3b", 384, (3, 1))),
            chain(block, pooled, ("branch_pool", 192, one)),
        )
        x = torch.cat(branches, 1)
    return x.mean((2, 3))


BATCH_NORM = ("running_mean", "running_var", "weight", "bias")


@pytest.fixture(scope="module")
def inception_case() -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Made-up weights in pytorch-fid's names, two pictures, and their features."""
    import torch
    import torch.nn.functional as F

    state: dict[str, Any] = {}

    def unit(name: str, x: Any, width: int, kernel: Any, stride: int, padding: Any) -> Any:
        shape = (width, x.shape[1], *kernel)
        scale = np.sqrt(6 / np.prod(shape[1:]))  # so that the ReLUs keep the size
        state[f"{name}.conv.weight"] = torch.tensor(noise(name, *shape) * scale).float()
        made = {part: noise(f"{name}.{part}", width) for part in BATCH_NORM}
        made = {n: (1 if n in ("running_var", "weight") else 0) + 0.3 * v for n, v in made.items()}
        norm = {f"{name}.bn.{part}": torch.tensor(value).float() for part, value in made.items()}
        state.update(norm)
        x = F.conv2d(x, state[f"{name}.conv.weight"].double(), stride=stride, padding=padding)
        return F.relu(F.batch_norm(x, *(value.double() for value in norm.values()), eps=1e-3))

    pixels = noise("inception", 2, 3, inception.SIZE, inception.SIZE)
    theirs = their_inception(torch.tensor(pixels).double(), unit).numpy()
    state["fc.weight"], state["fc.bias"] = torch.zeros(1008, 2048), torch.zeros(1008)
    return state, pixels, theirs


def mindone(name: str) -> str:
    """The ancestor's name, read off its `tools/eval/fid/inception_v3.py`."""
    module, _, part = name.rpartition(".")
    module, _, kind = module.rpartition(".")
    if kind == "bn":
        part = {
            "running_mean": "moving_mean",
            "running_var": "moving_variance",
            "weight": "gamma",
            "bias": "beta",
        }[part]
    block, _, branch = module.partition(".")
    if not branch:
        return f"{block.rpartition('_')[0]}.{kind}.{part}"
    table = {
        "branch1x1": "branch0",
        "branch_pool": "branch_pool.1",
        **{f"branch5x5_{i}": f"branch1.{i - 1}" for i in (1, 2)},
        **{f"branch7x7_{i}": f"branch1.{i - 1}" for i in (1, 2, 3)},
        **{f"branch7x7dbl_{i}": f"branch2.{i - 1}" for i in (1, 2, 3, 4, 5)},
        **{f"branch3x3dbl_{i}": f"branch2.{i - 1}" for i in (1, 2, 3)},
    }
    if block == "Mixed_6a":
        table = {"branch3x3": "branch0"}
        table |= {f"branch3x3dbl_{i}": f"branch1.{i - 1}" for i in (1, 2, 3)}
    elif block == "Mixed_7a":
        table = {f"branch3x3_{i}": f"branch0.{i - 1}" for i in (1, 2)}
        table |= {f"branch7x7x3_{i}": f"branch1.{i - 1}" for i in (1, 2, 3, 4)}
    elif block in ("Mixed_7b", "Mixed_7c"):
        table |= {"branch3x3_1": "branch1", "branch3x3_2a": "branch1_a"}
        table |= {"branch3x3_2b": "branch1_b", "branch3x3dbl_3a": "branch2_a"}
        table |= {"branch3x3dbl_3b": "branch2_b"}
    return f"{block}.{table[branch]}.{kind}.{part}"


def test_inception(inception_case: Any, tmp_path: Path) -> None:
    import torch

    state, pixels, theirs = inception_case
    torch.save(state, tmp_path / "inception.pth", _use_new_zipfile_serialization=False)
    network = inception.network(tmp_path / "inception.pth")
    close(in_batches(network, pixels, 2), theirs, 1e-5)

    arrays = {mindone(n): t.numpy() for n, t in state.items() if not n.startswith("fc.")}
    checkpoint.write(tmp_path / "inception.ckpt", arrays)
    other = inception.network(tmp_path / "inception.ckpt")
    for ours, again in zip(network.get_parameters(), other.get_parameters(), strict=True):
        assert ours.name == again.name
        assert np.array_equal(ours.asnumpy(), again.asnumpy()), ours.name


# ---- CLIP

SMALL = {"patch": 14, "size": 70, "width": 128, "layers": 3, "text_width": 64, "text_layers": 2}


def their_clip(structure: clip.Structure) -> Any:
    import torch
    from transformers import CLIPConfig, CLIPModel

    vision, text = (
        {"hidden_size": w, "intermediate_size": 4 * w, "num_hidden_layers": n}
        | {"num_attention_heads": w // 64, "hidden_act": "quick_gelu"}
        for w, n in (
            (structure.width, structure.layers),
            (structure.text_width, structure.text_layers),
        )
    )
    vision |= {"image_size": structure.size, "patch_size": structure.patch}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(vision_config=vision, text_config=text, projection_dim=structure.dimensions)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # they are ones and zeros
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def as_openai(state: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' names as OpenAI's, read off `clip/model.py`."""
    import torch

    found = {"logit_scale": state["logit_scale"]}
    for tower, prefix in (("vision_model", "visual."), ("text_model", "")):
        embeddings, layers = f"{tower}.embeddings", f"{tower}.encoder.layers"
        table = {"position_embedding.weight": f"{prefix}positional_embedding"}
        if tower == "vision_model":
            table |= {
                "class_embedding": "visual.class_embedding",
                "patch_embedding.weight": "visual.conv1.weight",
            }
        else:
            table["token_embedding.weight"] = "token_embedding.weight"
        found |= {theirs: state[f"{embeddings}.{ours}"] for ours, theirs in table.items()}
        count = len([name for name in state if name.startswith(layers) and "norm1.bias" in name])
        for i in range(count):
            block, layer = f"{prefix}transformer.resblocks.{i}", f"{layers}.{i}"
            for end in ("weight", "bias"):
                thirds = [state[f"{layer}.self_attn.{p}_proj.{end}"] for p in "qkv"]
                found[f"{block}.attn.in_proj_{end}"] = torch.cat(thirds)
                for theirs, ours in (
                    ("attn.out_proj", "self_attn.out_proj"),
                    ("ln_1", "layer_norm1"),
                    ("ln_2", "layer_norm2"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                ):
                    found[f"{block}.{theirs}.{end}"] = state[f"{layer}.{ours}.{end}"]
    for end in ("weight", "bias"):
        found[f"visual.ln_pre.{end}"] = state[f"vision_model.pre_layrnorm.{end}"]
        found[f"visual.ln_post.{end}"] = state[f"vision_model.post_layernorm.{end}"]
        found[f"ln_final.{end}"] = state[f"text_model.final_layer_norm.{end}"]
    found["visual.proj"] = state["visual_projection.weight"].T
    found["text_projection"] = state["text_projection.weight"].T
    return found


CAPTIONS = ("a photo of a cat", "", "an owl, at night, " * 40)


@pytest.mark.parametrize("which", ["small", "ViT-B/32"])
def test_clip(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import save_file

    small = clip.Structure(**SMALL, dimensions=96)
    monkeypatch.setitem(clip.MODELS, small, "small")
    structure = next(known for known, name in clip.MODELS.items() if name == which)
    model = their_clip(structure)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    ours = clip.load_clip(tmp_path / "model.safetensors")
    assert (ours.name, ours.structure) == (which, structure)

    pixels = noise("clip", 2, 3, structure.size, structure.size)
    ids = torch.tensor(ours.tokenizer(CAPTIONS)).long()
    with torch.no_grad():
        model.double()
        pictures = model.get_image_features(pixel_values=torch.tensor(pixels).double())
        captions = model.get_text_features(input_ids=ids)
    pictures, captions = (
        torch.nn.functional.normalize(getattr(found, "pooler_output", found)).numpy()
        for found in (pictures, captions)
    )
    close(clip.image_embeddings(ours, pixels), pictures, 1e-5)
    close(clip.text_embeddings(ours, CAPTIONS), captions, 1e-5)

    torch.save(as_openai(model.float().state_dict()), tmp_path / "openai.pth")
    other = clip.load_clip(tmp_path / "openai.pth")
    for mine, again in ((ours.vision, other.vision), (ours.text, other.text)):
        for one, two in zip(mine.get_parameters(), again.get_parameters(), strict=True):
            assert np.array_equal(one.asnumpy(), two.asnumpy()), one.name
    assert np.array_equal(ours.text_projection, other.text_projection)


# ---- preprocessing


def test_preprocessing_for_the_clip_score_is_that_of_transformers() -> None:
    """In its slow form, which resizes with PIL as OpenAI does."""
    from transformers import CLIPImageProcessorPil

    picture = np.asarray(Image.effect_noise((90, 61), 80).convert("RGB"))
    theirs = CLIPImageProcessorPil()(picture, return_tensors="np")["pixel_values"][0]
    ours = features._for_clip(features.resize_then_crop, 224, picture)
    close(ours, theirs, 1e-6)


def test_the_pinned_features_are_what_pytorch_says() -> None:
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "sampler"))
    import test_sampler_features as pinned

    inputs = [
        features._clean(picture, efficientnet.SIZE, efficientnet.MEAN, efficientnet.DEVIATION)
        for picture in pinned.PINNED_PICTURES
    ]
    pooled, _ = their_efficientnet(efficientnet_state(), torch.tensor(np.stack(inputs)).double())
    found = pooled[:, list(pinned.PINNED_PLACES)].numpy()
    assert np.abs(found - pinned.PINNED).max() < 1e-6
    assert np.abs(pooled.norm(dim=1).numpy() - pinned.PINNED_NORMS).max() < 1e-5
