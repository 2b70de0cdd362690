"""Image files → pixels and masks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.images import DataError, open_image, read_image, read_mask


def saved(folder: Path, image: Image.Image, name: str = "a.png", **options: object) -> Path:
    image.save(folder / name, **options)
    return folder / name


def red(mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, "red").convert(mode)


def halves(first: str, second: str, size: tuple[int, int]) -> Image.Image:
    """Two colours, one left of the other."""
    image = Image.new("RGB", size, second)
    image.paste(first, (0, 0, size[0] // 2, size[1]))
    return image


def ramp(width: int, height: int) -> Image.Image:
    """Brighter to the right and to the bottom."""
    x, y = np.meshgrid(np.linspace(0, 155, width), np.linspace(0, 100, height))
    return Image.fromarray((x + y).astype(np.uint8))


# ---- what is opened


@pytest.mark.parametrize(
    ("mode", "name"),
    [("RGB", "a.png"), ("RGB", "a.webp"), ("RGB", "a.bmp"), ("CMYK", "a.jpg"), ("P", "a.png"),
     ("RGBA", "a.png"), ("RGBA", "a.webp")],
)  # fmt: skip
def test_every_colour_mode_gives_the_same_red(tmp_path: Path, mode: str, name: str) -> None:
    image = read_image(saved(tmp_path, red(mode), name), (8, 8))
    assert image.shape == (3, 8, 8)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[:, 4, 4], [1, -1, -1], atol=0.02)


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_every_greyscale_gives_the_same_white(tmp_path: Path, mode: str) -> None:
    white = Image.new("RGB", (8, 8), "white").convert(mode)
    np.testing.assert_array_equal(read_image(saved(tmp_path, white), (8, 8)), 1)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    np.testing.assert_array_equal(read_image(saved(tmp_path, clear), (8, 8)), 1)


@pytest.mark.parametrize("mode", ["P", "L"])
def test_a_colour_that_stands_for_transparency_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (8, 8), 0)
    image.paste(1, (0, 0, 4, 8))
    if mode == "P":
        image.putpalette([255, 0, 0, 0, 0, 0])
    path = saved(tmp_path, image, transparency=1)
    assert open_image(path).mode == "RGBA"
    pixels = read_image(path, (8, 8))
    np.testing.assert_array_equal(pixels[:, :, :4], 1)
    assert pixels[2, 0, 7] == -1


def test_greyscale_of_sixteen_bits_keeps_its_range(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    image = read_image(saved(tmp_path, Image.fromarray(levels)), (8, 8))
    np.testing.assert_allclose(image[0].ravel(), np.linspace(-1, 1, 64), atol=0.01)


def test_greyscale_of_sixteen_bits_may_have_a_transparent_level(tmp_path: Path) -> None:
    levels = np.full((8, 8), 30000, np.uint16)
    levels[:, :4] = 5
    image = read_image(saved(tmp_path, Image.fromarray(levels), transparency=5), (8, 8))
    np.testing.assert_array_equal(image[:, :, :4], 1)
    np.testing.assert_allclose(image[:, :, 4:], 30000 / 32767.5 - 1, atol=0.01)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_s_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_image(saved(tmp_path, ramp(24, 16), exif=exif))
    assert image.size == ((16, 24) if orientation > 4 else (24, 16))
    # Where the brightest corner, at the bottom right of what is stored, comes to lie.
    right, bottom = {1: (1, 1), 2: (0, 1), 3: (0, 0), 4: (1, 0),
                     5: (1, 1), 6: (0, 1), 7: (0, 0), 8: (1, 0)}[orientation]  # fmt: skip
    corner = image.getpixel((right * (image.width - 1), bottom * (image.height - 1)))
    assert corner == (255, 255, 255)


def test_a_photograph_with_a_second_picture_for_other_displays_is_one_image(
    tmp_path: Path,
) -> None:
    path = saved(tmp_path, red(), "a.jpg", format="MPO", save_all=True, append_images=[red("L")])
    assert Image.open(path).n_frames == 2
    assert read_image(path, (8, 8))[0].min() > 0.95


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_an_animation_is_refused(tmp_path: Path, name: str) -> None:
    other = [Image.new("RGB", (16, 16), "blue"), Image.new("RGB", (16, 16), "green")]
    path = saved(tmp_path, red(), name, save_all=True, append_images=other)
    with pytest.raises(DataError, match=r"expected one picture, found an animation of 3; save"):
        open_image(path)


def test_only_the_formats_that_are_named_are_tried(tmp_path: Path) -> None:
    path = saved(tmp_path, red(), "a.png", format="EPS")
    with pytest.raises(DataError, match="it is not PNG, JPEG, WebP or BMP"):
        open_image(path)


def test_damage_of_any_kind_is_a_data_error_of_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    path, refused = tmp_path / "a.png", 0
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        whole = io.BytesIO()
        noise.save(whole, kind)
        for _ in range(100):
            damaged = bytearray(whole.getvalue())
            for place in rng.integers(0, min(len(damaged), 120), 3):
                damaged[place] = rng.integers(0, 256)
            path.write_bytes(damaged[: rng.integers(1, len(damaged) + 1)])
            try:
                open_image(path)
            except DataError as error:
                refused += 1
                assert str(error).startswith(f"{path}: expected ")
                assert "\n" not in str(error)
    assert refused > 300


# ---- which part of it is seen


@pytest.mark.parametrize(("position", "left"), [(0.0, 0), (0.5, 8), (1.0, 16)])
def test_the_position_says_where_the_crop_lies(tmp_path: Path, position: float, left: int) -> None:
    path = saved(tmp_path, ramp(24, 8))
    whole = read_image(path, (24, 8))
    seen = read_image(path, (8, 8), (position, 0.3))
    np.testing.assert_array_equal(seen, whole[:, :, left : left + 8])
    upright = saved(tmp_path, ramp(24, 8).transpose(Image.Transpose.TRANSPOSE), "b.png")
    np.testing.assert_array_equal(
        read_image(upright, (8, 8), (0.3, position)), seen.transpose(0, 2, 1)
    )


def test_flip_mirrors_what_is_seen(tmp_path: Path) -> None:
    path = saved(tmp_path, ramp(24, 8))
    seen = read_image(path, (8, 8), (0.25, 0.5))
    np.testing.assert_array_equal(read_image(path, (8, 8), (0.25, 0.5), True), seen[:, :, ::-1])


@pytest.mark.parametrize("shape", [(32, 8), (8, 32), (16, 16)])
def test_an_image_covers_its_shape(tmp_path: Path, shape: tuple[int, int]) -> None:
    pixels = read_image(saved(tmp_path, red(size=(3, 5))), shape)
    assert pixels.shape == (3, shape[1], shape[0])
    assert pixels[0].min() == 1


# ---- masks


def test_without_transparency_or_file_everything_counts(tmp_path: Path) -> None:
    path = saved(tmp_path, red())
    for kind in ("alpha", "file"):
        mask = read_mask(path, None, kind, (16, 8), 4)
        assert mask.dtype == np.float32
        np.testing.assert_array_equal(mask, np.ones((2, 4)))


def test_alpha_counts_where_the_image_is_opaque(tmp_path: Path) -> None:
    image = red("RGBA")
    image.putalpha(halves("white", "black", (16, 16)).convert("L"))
    mask = read_mask(saved(tmp_path, image), None, "alpha", (16, 16), 4)
    np.testing.assert_array_equal(mask, [[1, 1, 0, 0]] * 4)


def test_a_cell_is_the_mean_of_its_pixels(tmp_path: Path) -> None:
    image = red("RGBA", (8, 4))
    image.putalpha(Image.fromarray(np.array([[255, 255, 255, 0, 0, 0, 0, 51]] * 4, np.uint8)))
    mask = read_mask(saved(tmp_path, image), None, "alpha", (8, 4), 4)
    np.testing.assert_allclose(mask, [[0.75, 0.05]])


@pytest.mark.parametrize("size", [(64, 16), (32, 8), (48, 48)])
def test_a_mask_of_any_size_is_cropped_as_its_image(tmp_path: Path, size: tuple[int, int]) -> None:
    path = saved(tmp_path, halves("white", "black", (64, 16)))
    mask = saved(tmp_path, halves("white", "black", size), "a.mask.png")
    for position in ((0.0, 0.5), (0.3, 0.5), (1.0, 0.5)):
        for flip in (False, True):
            image = read_image(path, (16, 16), position, flip)[0].reshape(4, 4, 4, 4)
            counts = read_mask(path, mask, "file", (16, 16), 4, position, flip)
            np.testing.assert_allclose(counts, image.mean((1, 3)) / 2 + 0.5, atol=0.1)
