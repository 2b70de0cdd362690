"""Pictures in, feature vectors out: what KID, FID, CMMD and the CLIP score compare.

An `Extractor` is a network together with the way a picture gets into it. Two sets of features can
be compared if their extractors' `identity` is the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion.models import in_batches
from sampler import clip as clip_towers
from sampler import efficientnet as lite0
from sampler import inception as fid_inception
from weights.files import WeightsError, sha256

BICUBIC = Image.Resampling.BICUBIC
BATCH = 8
"""Pictures that the convolutional networks see at once; they are compiled for this number."""

# ---- from a picture to a network's input


def resize_clean(picture: np.ndarray, size: int) -> np.ndarray:
    """uint8 (height, width, 3) → float32 (size, size, 3) in 0..255, stretched to a square.

    As clean-fid (arXiv 2104.11222) does it: each channel by itself in float32, bicubic with
    antialiasing, not rounded, clipped to 0..255.
    """
    channels = [
        np.asarray(Image.fromarray(channel).resize((size, size), BICUBIC))
        for channel in picture.astype(np.float32).transpose(2, 0, 1)
    ]
    return np.stack(channels, axis=2).clip(0, 255)


def crop_then_resize(picture: np.ndarray, size: int) -> np.ndarray:
    """uint8 (height, width, 3) → uint8 (size, size, 3): the central square, resized.

    As CMMD's reference code (arXiv 2401.09603) does it: bicubic with antialiasing.
    """
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(picture[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), BICUBIC))


def resize_then_crop(picture: np.ndarray, size: int) -> np.ndarray:
    """uint8 (height, width, 3) → uint8 (size, size, 3): shorter side to `size`, then the centre.

    As OpenAI's CLIP does it: bicubic with antialiasing.
    """
    height, width = picture.shape[:2]
    shorter = min(height, width)
    wide, high = size * width // shorter, size * height // shorter
    image = np.asarray(Image.fromarray(picture).resize((wide, high), BICUBIC))
    top, left = round((high - size) / 2), round((wide - size) / 2)
    return image[top : top + size, left : left + size]


def to_input(pixels: np.ndarray, mean: Any, deviation: Any) -> np.ndarray:
    """(height, width, 3) → float32 (3, height, width), (x − mean) / deviation for each channel."""
    mean, deviation = np.asarray(mean, np.float32), np.asarray(deviation, np.float32)
    return ((pixels.astype(np.float32) - mean) / deviation).transpose(2, 0, 1)


def _clean(picture: np.ndarray, size: int, mean: float, deviation: float) -> np.ndarray:
    return to_input(resize_clean(picture, size), mean, deviation)


def _for_clip(
    square: Callable[[np.ndarray, int], np.ndarray], size: int, picture: np.ndarray
) -> np.ndarray:
    pixels = square(picture, size).astype(np.float32) / np.float32(255)
    return to_input(pixels, clip_towers.MEAN, clip_towers.DEVIATION)


# ---- the extractors


@dataclass(frozen=True)
class Extractor:
    """A network with its weights and its preprocessing.

    Called with pictures, uint8 (height, width, 3) of any size, it returns float32 features (number
    of pictures, dimensions). `progress` is told how many more pictures are done. The network is
    compiled at the first call, for `batch` pictures at a time. Raises WeightsError if a feature
    is not finite, ValueError if a picture is not such an array.
    """

    key: str
    """In records: efficientnet_lite0, inception_v3_fid, clip_vit_l_14_336, …"""
    name: str
    """For people: EfficientNet-Lite0, …"""
    digest: str
    """SHA-256 of the weight file."""
    preprocessing: str
    size: int
    """Pixels along a side of what the network sees."""
    dimensions: int
    path: Path = field(compare=False)
    batch: int = field(compare=False, repr=False)
    prepare: Callable[[np.ndarray], np.ndarray] = field(compare=False, repr=False)
    """One picture → one input, float32 (3, height, width)."""
    compute: Callable[[np.ndarray], np.ndarray] = field(compare=False, repr=False)
    """`batch` inputs or fewer → their features."""
    captions: Callable[[Sequence[str]], np.ndarray] | None = field(
        default=None, compare=False, repr=False
    )
    """Of CLIP: texts → their embeddings, (number of texts, dimensions)."""

    def identity(self) -> dict[str, Any]:
        """What features depend on, as plain values for a record."""
        return {
            "key": self.key,
            "weights_sha256": self.digest,
            "preprocessing": self.preprocessing,
            "dimensions": self.dimensions,
        }

    def __call__(
        self, pictures: Sequence[np.ndarray], progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        for number, picture in enumerate(pictures):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise ValueError(
                    f"picture {number}: expected uint8 (height, width, 3), found {picture.dtype} "
                    f"{picture.shape}"
                )
        features = np.zeros((len(pictures), self.dimensions), np.float32)
        for start in range(0, len(pictures), self.batch):
            part = pictures[start : start + self.batch]
            found = self.compute(np.stack([self.prepare(picture) for picture in part]))
            wrong = ~np.isfinite(found).all(axis=1)
            if wrong.any():
                raise WeightsError(
                    f"{self.path}: expected features, found NaN or infinity for picture "
                    f"{start + int(wrong.argmax())}; check the weights (sha256 {self.digest})"
                )
            features[start : start + len(part)] = found
            if progress is not None:
                progress(len(part))
        return features


def efficientnet() -> Extractor:
    """EfficientNet-Lite0, the extractor that needs no download: for KID.

    The whole picture is seen at the size of the network's training; ImageNet's central crop would
    leave the border unjudged. Raises WeightsError if the weights are not installed or not those.
    """
    path = lite0.weights_path()
    digest = sha256(path)
    if digest != lite0.SHA256:
        raise _mismatch(path, lite0.SHA256, digest, f"install {lite0.PACKAGE} 0.1.0 again")
    size, mean, deviation = lite0.SIZE, lite0.MEAN, lite0.DEVIATION
    return Extractor(
        key="efficientnet_lite0",
        name="EfficientNet-Lite0",
        digest=digest,
        preprocessing=f"clean-fid resize to {size}, (x-{mean:g})/{deviation:g}",
        size=size,
        dimensions=lite0.FEATURES,
        path=path,
        batch=BATCH,
        prepare=partial(_clean, size=size, mean=mean, deviation=deviation),
        compute=partial(in_batches, lite0.network(path), size=BATCH),
    )


def check_inception(path: Path) -> str:
    """The digest of the Inception of FID. Raises WeightsError if it is missing, or not what its
    name says."""
    published = [
        f"{name} (sha256 begins {prefix}; {where})"
        for name, (prefix, where) in fid_inception.PUBLISHED.items()
    ]
    digest = _digest(path, "the Inception of FID", " or ".join(published))
    expected, where = fid_inception.PUBLISHED.get(path.name, ("", ""))
    if not digest.startswith(expected):
        raise _mismatch(path, expected, digest, f"get it again from {where}")
    return digest


def check_clip(path: Path) -> str:
    """The digest of a CLIP. Raises WeightsError if it is missing."""
    published = "model.safetensors of https://huggingface.co/openai/clip-vit-large-patch14-336"
    return _digest(path, "CLIP", f"{published} (CMMD), clip-vit-large-patch14 or -base-patch16")


def inception(path: str | os.PathLike[str]) -> Extractor:
    """The Inception of FID, preprocessed as clean-fid does.

    `path` is pytorch-fid's file, the same as safetensors, or MindONE's checkpoint. Raises
    WeightsError if it is missing, not what its name says, damaged, or another network.
    """
    path = Path(path)
    digest = check_inception(path)
    size, mean, deviation = fid_inception.SIZE, fid_inception.MEAN, fid_inception.DEVIATION
    return Extractor(
        key="inception_v3_fid",
        name="Inception-v3 (FID)",
        digest=digest,
        preprocessing=f"clean-fid resize to {size}, (x-{mean:g})/{deviation:g}",
        size=size,
        dimensions=fid_inception.FEATURES,
        path=path,
        batch=BATCH,
        prepare=partial(_clean, size=size, mean=mean, deviation=deviation),
        compute=partial(in_batches, fid_inception.network(path), size=BATCH),
    )


def clip(path: str | os.PathLike[str]) -> Extractor:
    """CLIP's image embeddings of length 1, preprocessed as for CMMD.

    `path` is a safetensors file or a state dict in OpenAI's or transformers' names. Raises
    WeightsError if it is missing, damaged, or not one of OpenAI's vision transformers.
    """
    path = Path(path)
    digest = check_clip(path)
    model = clip_towers.load_clip(path)
    size = model.structure.size
    return Extractor(
        key=f"clip_{model.name.lower().replace('-', '_').replace('/', '_')}",
        name=f"CLIP {model.name}",
        digest=digest,
        preprocessing=f"central square, PIL bicubic to {size}, CLIP mean and deviation",
        size=size,
        dimensions=model.structure.dimensions,
        path=path,
        batch=clip_towers.BATCH,
        prepare=partial(_for_clip, crop_then_resize, size),
        compute=partial(clip_towers.image_embeddings, model),
        captions=partial(clip_towers.text_embeddings, model),
    )


def for_clip_score(extractor: Extractor) -> Extractor:
    """The same CLIP, preprocessed as for the CLIP score; it is not loaded or compiled again."""
    size = extractor.size
    return replace(
        extractor,
        preprocessing=f"PIL bicubic, shorter side to {size}, centre, CLIP mean and deviation",
        prepare=partial(_for_clip, resize_then_crop, size),
    )


def _digest(path: Path, what: str, published: str) -> str:
    if not path.is_file():
        raise WeightsError(
            f"{path}: there is no such file, expected the weights of {what}: {published}; check "
            "the path, or get the file and name it"
        )
    return sha256(path)


def _mismatch(path: Path, expected: str, found: str, remedy: str) -> WeightsError:
    return WeightsError(
        f"{path}: expected a file whose sha256 begins with {expected}, found {found}; {remedy}"
    )
