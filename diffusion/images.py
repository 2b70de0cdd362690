"""Image files → arrays of pixels, and of what they count; needs no MindSpore."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # by content: what else Pillow knows is not tried
_MIDDLE = (0.5, 0.5)

# Pillow warns of large photographs, and raises for twice that size.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class DataError(ValueError):
    """Images or captions that cannot be used; the message is one sentence for each."""


def open_image(path: Path) -> Image.Image:
    """The whole picture, turned as its EXIF says: RGBA if anything may be transparent, else RGB.

    Raises DataError if the file does not decode or is animated.
    """
    try:
        with Image.open(path, formats=_FORMATS) as file:
            # An MPO is a photograph; what follows it is for other displays.
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)
            image = _eight_bits(ImageOps.exif_transpose(file))
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except Exception as error:  # decoders raise whatever the damage leads to
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "it is not PNG, JPEG, WebP or BMP"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise DataError(
            f"{path}: expected an image, found a file that does not decode ({reason}); replace or "
            "remove it"
        ) from error
    if frames > 1:
        raise DataError(
            f"{path}: expected one picture, found an animation of {frames}; save one of them in "
            "its place"
        )
    return image


def read_image(
    path: Path,
    shape: tuple[int, int],
    position: tuple[float, float] = _MIDDLE,
    flip: bool = False,
) -> np.ndarray:
    """One image as float32 (3, height, width) in [-1, 1], `shape` being (width, height) in pixels.

    It is scaled to cover the shape and cropped, transparency laid on white. `position` says where
    in what overhangs the crop lies, from 0 (left, top) to 1 (right, bottom); `flip` mirrors the
    crop. Raises DataError as `open_image` does.
    """
    image = _fitted(_on_white(open_image(path)), shape, position, flip)
    return np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1


def read_whole(path: Path) -> np.ndarray:
    """One image as it is: uint8 (height, width, 3), transparency laid on white. Raises DataError as
    `open_image` does."""
    return np.asarray(_on_white(open_image(path)))


def read_mask(
    path: Path,
    mask: Path | None,
    kind: Literal["alpha", "file"],
    shape: tuple[int, int],
    factor: int,
    position: tuple[float, float] = _MIDDLE,
    flip: bool = False,
) -> np.ndarray:
    """What each latent cell of an image counts: float32 (height / factor, width / factor), 0 to 1.

    alpha: the image's opacity; file: how white the file `mask` is, stretched to the image's size.
    The crop is that of `read_image`, then each cell is the mean of its factor × factor pixels.
    Ones if there is no transparency, or no file. Raises DataError as `open_image` does.
    """
    image = open_image(path)
    counts = Image.new("L", image.size, 255)
    if kind == "alpha" and image.mode == "RGBA":
        counts = image.getchannel("A")
    elif kind == "file" and mask is not None:
        white = _on_white(open_image(mask)).convert("L")
        counts = white.resize(image.size, Image.Resampling.LANCZOS)
    pixels = np.asarray(_fitted(counts, shape, position, flip), np.float32) / np.float32(255)
    width, height = (side // factor for side in shape)
    return pixels.reshape(height, factor, width, factor).mean((1, 3))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greyscale of 16 bits with 8, which Pillow's own conversion would clip at 255."""
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image, np.float64)
    grey = Image.fromarray((levels / 257).round().clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        opaque = levels != image.info["transparency"]
        grey.putalpha(Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)))
    return grey


def _on_white(image: Image.Image) -> Image.Image:
    """The picture as RGB, what is transparent laid on white."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _fitted(
    image: Image.Image, shape: tuple[int, int], position: tuple[float, float], flip: bool
) -> Image.Image:
    image = ImageOps.fit(image, shape, Image.Resampling.LANCZOS, centering=position)
    return ImageOps.mirror(image) if flip else image
