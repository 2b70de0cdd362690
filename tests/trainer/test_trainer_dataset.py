"""The scan of all images: what is refused and why, what is taken and how it is shown."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion.images import DataError, read_image, read_mask
from trainer.config import DataConfig
from trainer.dataset import Dataset, Example, dump_scan, load, read_scan, scan

SIDE = 64


def drawing(seed: object, size: tuple[int, int] = (80, 80)) -> Image.Image:
    """A picture of its own."""
    rng = np.random.default_rng(zlib.crc32(str(seed).encode()))
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ---- a folder of broken and odd files


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(drawing("turned", (90, 70)), "JPEG", exif=exif)


def damaged_chunk() -> bytes:
    whole = bytearray(encoded(drawing("damaged")))
    whole[len(whole) // 2] ^= 0xFF
    return bytes(whole)


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))


def sixteen_bits() -> bytes:
    levels = np.arange(80 * 80, dtype=np.uint16).reshape(80, 80) * 10
    return encoded(Image.fromarray(levels))


def jpeg(name: str) -> bytes:
    return encoded(drawing(name), "JPEG")


def mode(name: str, **options: Any) -> bytes:
    return encoded(drawing(name).convert(name), **options)


def animated(kind: str) -> bytes:
    frames = [drawing(f"{kind} {number}") for number in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def phone() -> bytes:
    return encoded(drawing("phone"), "MPO", save_all=True, append_images=[drawing("depth")])


def a_folder(path: Path) -> None:
    path.mkdir()


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere.png")


TAKEN, REFUSED, LEFT_OUT, NOT_SEEN = "taken", "refused", "left out", "not seen"
UNDECODABLE = "expected an image, found a file that does not decode"


@dataclass(frozen=True)
class File:
    """A file, what becomes of it, and the words of the problem or note that speaks of it."""

    name: str
    content: bytes | Callable[[Path], None]
    fate: str
    words: str | None = None
    caption: bytes | None = b"a thing"


FILES = [
    # Files that do not decode.
    File("truncated.jpg", jpeg("cut")[:-900], REFUSED, f"{UNDECODABLE} (image file is truncated"),
    File("cut.png", encoded(drawing("cut"))[:4000], REFUSED, UNDECODABLE),
    File("short.webp", encoded(drawing("w"), "WEBP")[:500], REFUSED, UNDECODABLE),
    File("empty.png", b"", REFUSED, f"{UNDECODABLE} (it is not PNG, JPEG, WebP or BMP)"),
    File("text.png", b"not a picture", REFUSED, "(it is not PNG, JPEG, WebP or BMP)"),
    File("named wrongly.png", animated("GIF"), REFUSED, "(it is not PNG, JPEG, WebP or BMP)"),
    File("damaged.png", damaged_chunk(), REFUSED, UNDECODABLE),
    File("bomb.png", bomb(), REFUSED, "could be decompression bomb DOS attack"),
    File("animated.png", animated("PNG"), REFUSED, "found an animation of 3; save one of them"),
    File("moving.webp", animated("WEBP"), REFUSED, "found an animation of 3; save one of them"),
    # Files that are none.
    File("folder.png", a_folder, REFUSED, "expected an image, found a folder", None),
    File("link.png", a_link_to_nothing, REFUSED, "expected an image, found a link to nothing"),
    # Captions.
    File("silent.png", mode("L"), REFUSED, "expected a caption in silent.txt, found none", None),
    File("blank.png", jpeg("blank"), REFUSED, "blank.txt, found an empty one; write one", b" \n"),
    File("latin.png", jpeg("latin"), REFUSED, "latin.txt, found byte 0xe9 at", b"caf\xe9"),
    File("utf16.png", jpeg("utf16"), REFUSED, "byte 0xff at position 0", "é".encode("utf-16")),
    File("pair.jpg", jpeg("pair"), REFUSED, "one image for the caption pair.txt, found pair.jpg, "),
    File("pair.png", jpeg("pair 2"), REFUSED),
    File("mark.png", jpeg("mark"), TAKEN, caption=b"\xef\xbb\xbfa thing\r\n"),
    File("novel.png", jpeg("novel"), TAKEN, caption=b"word " * 200),
    # Kinds of picture.
    File("cmyk.jpg", encoded(drawing("ink").convert("CMYK"), "JPEG"), TAKEN),
    File("sixteen.png", sixteen_bits(), TAKEN),
    File("one bit.png", mode("1"), TAKEN),
    File("grey alpha.png", mode("LA"), TAKEN),
    File("palette.png", mode("P", transparency=3), TAKEN),
    File("turned.jpg", turned(), TAKEN),
    File("phone.jpg", phone(), TAKEN),
    File("really a jpeg.png", jpeg("really"), TAKEN),
    # Sizes.
    File("pixel.png", encoded(drawing("pixel", (1, 1))), TAKEN, "pixel.png with 1 × 1 for 64 × 64"),
    File("strip.png", encoded(drawing("s", (2560, 64))), TAKEN, "is seen as 64 × 64, 98% of it"),
    # Names.
    File("SHOUTED.PNG", jpeg("shouted"), TAKEN),
    File("名前 with spaces é.jpeg", jpeg("name"), TAKEN),
    File("two\nlines.png", jpeg("lines"), TAKEN),
    # The same again.
    File("twin 1.png", jpeg("twin"), TAKEN, "twin 1.png, "),
    File("twin 2.png", jpeg("twin"), TAKEN),
    # Masks.
    File("masked.png", jpeg("masked"), TAKEN),
    File("masked.mask.png", encoded(drawing("m", (7, 9)).convert("L")), NOT_SEEN, None, None),
    File("badly masked.png", jpeg("badly"), REFUSED),
    File("badly masked.mask.png", b"\x89PNG", REFUSED, UNDECODABLE, None),
    File("lonely.mask.png", mode("L"), LEFT_OUT, "found none for lonely.mask.png", None),
    # What is no image.
    File("IMG_1.heic", b"", LEFT_OUT, ".heic files are left out (IMG_1.heic)", None),
    File("dance.gif", animated("GIF"), LEFT_OUT, ".gif files are left out (dance.gif)", None),
    File("scan.tiff", b"II*", LEFT_OUT, ".tiff files are left out", None),
    File("orphan.txt", b"alone", LEFT_OUT, "captions without an image are left out (orphan", None),
    File(".DS_Store", b"", NOT_SEEN, None, None),
    File("._masked.png", b"", NOT_SEEN, None, None),
]  # fmt: skip


def write_files(folder: Path) -> None:
    folder.mkdir()
    for file in FILES:
        path = folder / file.name
        if isinstance(file.content, bytes):
            path.write_bytes(file.content)
        else:
            file.content(path)
        if file.caption is not None and file.fate in (TAKEN, REFUSED):
            path.with_suffix(".txt").write_bytes(file.caption)


def test_a_folder_of_broken_and_odd_files(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write_files(folder)
    found = scan(DataConfig(train=str(folder), masks="file"), SIDE, 16, 4)
    taken = {Path(example.path).name for example in found.training.examples}
    assert taken == {file.name for file in FILES if file.fate == TAKEN}
    for sentences, fates in ((found.problems, (REFUSED,)), (found.notes, (TAKEN, LEFT_OUT))):
        left = list(sentences)
        for file in FILES:
            if file.words is not None and file.fate in fates:
                (sentence,) = [s for s in left if file.name in s and file.words in s]
                assert sentence.startswith((f"{folder}", "1 image is "))
                left.remove(sentence)
        assert left == []
        assert all(sentence.isprintable() for sentence in sentences)


def test_what_is_taken_can_be_read(tmp_path: Path) -> None:
    write_files(tmp_path / "images")
    found = scan(DataConfig(train=str(tmp_path / "images"), masks="file"), SIDE, 16, 4)
    examples = {Path(example.path).name: example for example in found.training.examples}
    for example in examples.values():
        pixels = read_image(Path(example.path), example.shape)
        assert pixels.shape == (3, SIDE, SIDE)
        assert -1 <= pixels.min() <= pixels.max() <= 1
        mask = Path(example.mask) if example.mask else None
        counts = read_mask(Path(example.path), mask, "file", example.shape, 4)
        assert (counts.min() == 1) == (example.mask is None)
    assert (examples["turned.jpg"].width, examples["turned.jpg"].height) == (70, 90)
    assert examples["mark.png"].caption == "a thing"
    assert examples["masked.png"].mask == f"{tmp_path}/images/masked.mask.png"
    assert [name for name, example in examples.items() if example.mask] == ["masked.png"]


# ---- sets, epochs, shapes


def write_set(folder: Path, *sizes: tuple[int, int]) -> str:
    """A folder of images 0.png, 1.png, … that no other folder has."""
    folder.mkdir()
    for number, size in enumerate(sizes):
        (folder / f"{number}.png").write_bytes(encoded(drawing(f"{folder.name} {number}", size)))
        (folder / f"{number}.txt").write_text(f"{folder.name} {number}")
    return str(folder)


def scanned(config: dict[str, Any], global_batch: int = 1) -> tuple[Dataset, Dataset]:
    found = load(DataConfig.model_validate(config), SIDE, 16, global_batch)
    return found.training, found.validation


def captions(dataset: Dataset) -> list[str]:
    return [example.caption for example in dataset.examples]


SQUARE = (64, 64)


def test_an_example_says_all_about_its_image(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "a", (80, 70))
    mask = encoded(Image.new("L", (4, 4)))
    (tmp_path / "a/0.mask.png").write_bytes(mask)
    sets = {"folder": folder, "loss_weight": 0.5}
    training, validation = scanned({"train": sets, "masks": "file", "prefix": "sks "})
    assert training.examples == (
        Example(
            path=f"{folder}/0.png",
            caption="sks a 0",
            prefix="sks ",
            sha256=sha256((tmp_path / "a/0.png").read_bytes()).hexdigest(),
            width=80,
            height=70,
            shape=(64, 64),
            mask=f"{folder}/0.mask.png",
            mask_sha256=sha256(mask).hexdigest(),
            loss_weight=0.5,
        ),
    )
    assert validation == Dataset((), ())


def test_masks_that_are_not_asked_for_are_not_looked_at(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "a", SQUARE)
    (tmp_path / "a/0.mask.png").write_bytes(b"")
    found = load(DataConfig(train=folder), SIDE, 16, 1)
    assert found.training.examples[0].mask is None
    assert found.notes == [f"{folder}: its masks are not looked at; data.masks: file does"]


def test_each_set_has_its_prefix_and_repeats(tmp_path: Path) -> None:
    config = {
        "train": [
            write_set(tmp_path / "a", SQUARE, SQUARE),
            {"folder": write_set(tmp_path / "b", SQUARE), "repeats": 3, "prefix": "B "},
            {"folder": write_set(tmp_path / "c", SQUARE), "prefix": ""},
        ],
        "prefix": "P ",
        "validation": write_set(tmp_path / "v", SQUARE, SQUARE),
    }
    training, validation = scanned(config)
    assert captions(training) == ["P a 0", "P a 1", "B b 0", "c 0"]
    assert [example.prefix for example in training.examples] == ["P ", "P ", "B ", ""]
    assert sorted(training.epoch) == [0, 1, 2, 2, 2, 3]
    assert captions(validation) == ["P v 0", "P v 1"]
    assert validation.epoch == (0, 1)


@pytest.mark.parametrize(
    ("repeats", "regular", "expected"),
    [
        (1, 2, [0, 1, 2, 3, 4, 5, 4, 5]),  # as many as the four others
        (1, 3, [0, 1, 2, 3, 4, 5, 6, 4]),
        (2, 3, [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 4, 5, 6, 4, 5]),
        (1, 6, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),  # more than needed: each once
    ],
)
def test_regularisation_images_are_as_many_as_the_others(
    tmp_path: Path, repeats: int, regular: int, expected: list[int]
) -> None:
    learnt = {"folder": write_set(tmp_path / "a", *[SQUARE] * 4), "repeats": repeats}
    kept = {"folder": write_set(tmp_path / "r", *[SQUARE] * regular), "regularisation": True}
    training, _ = scanned({"train": [learnt, kept], "prefix": "P "})
    assert sorted(training.epoch) == sorted(expected)
    assert captions(training)[3:5] == ["P a 3", "r 0"]


def test_a_regularisation_set_that_repeats_counts_more_than_another(tmp_path: Path) -> None:
    folders = [write_set(tmp_path / name, SQUARE) for name in "ars"]
    sets: list[dict[str, Any]] = [{"folder": folder, "regularisation": True} for folder in folders]
    sets[0] = {"folder": folders[0], "repeats": 6}
    sets[2]["repeats"] = 2
    training, _ = scanned({"train": sets})
    assert sorted(training.epoch) == [0] * 6 + [1] * 2 + [2] * 4


def test_images_are_sorted_into_shapes_and_validation_into_the_same(tmp_path: Path) -> None:
    upright, wide = (60, 100), (100, 60)
    config = {
        "train": write_set(tmp_path / "a", *[upright] * 4, wide, wide, SQUARE),
        "validation": write_set(tmp_path / "v", wide, (200, 60), SQUARE),
        "shapes": 3,
    }
    training, validation = scanned(config, global_batch=2)
    assert training.shapes() == [((48, 80), 5), ((80, 48), 2)]
    assert {example.shape for example in validation.examples} == {(48, 80), (80, 48)}
    assert validation.examples[1].shape == (80, 48)
    training, _ = scanned(config, global_batch=3)
    assert training.shapes() == [((48, 80), 7)]
    training, _ = scanned({**config, "shapes": 1})
    assert training.shapes() == [((64, 64), 7)]


def test_a_resolution_that_is_no_multiple_is_refused_before_anything_is_read(
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match=r"data\.resolution: expected a multiple of 16 pixels"):
        scan(DataConfig(train=str(tmp_path / "nowhere")), 60, 16, 1)


# ---- what is said of all together


def test_faults_of_all_sets_are_raised_together(tmp_path: Path) -> None:
    train, validation = write_set(tmp_path / "a", SQUARE, SQUARE), write_set(tmp_path / "v", SQUARE)
    (tmp_path / "a/0.png").write_bytes(b"")
    (tmp_path / "a/0.txt").unlink()  # two faults of one image
    (tmp_path / "v/0.png").write_bytes(b"")
    config = DataConfig(train=(train, f"{tmp_path}/nowhere"), validation=validation)
    with pytest.raises(DataError) as caught:
        load(config, SIDE, 16, 1)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        f"{train}/0.png",
        f"{train}/0.png",
        f"{tmp_path}/nowhere",
        f"{validation}/0.png",
    ]


def test_the_same_image_twice_is_noted_with_both_names(tmp_path: Path) -> None:
    train, validation = write_set(tmp_path / "a", SQUARE, SQUARE), write_set(tmp_path / "v", SQUARE)
    for copy in ("a/1.png", "v/0.png"):
        (tmp_path / copy).write_bytes((tmp_path / "a/0.png").read_bytes())
    assert load(DataConfig(train=train, validation=validation), SIDE, 16, 1).notes == [
        f"{train}/0.png, {train}/1.png: the same image 2 times; it counts as often",
        f"{validation}/0.png: held out, but trained on as {train}/0.png; the validation loss will "
        "look better than it is",
    ]


def test_small_images_are_noted_in_one_sentence(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "a", SQUARE, (63, 64), (20, 30), (40, 40))
    assert load(DataConfig(train=folder), SIDE, 16, 1).notes == [
        "3 images are smaller than what is trained on, and so enlarged and not sharp; the smallest "
        f"is {folder}/2.png with 20 × 30 for 64 × 64"
    ]


# ---- on disk, and as a digest


def test_a_scan_is_equal_after_a_round_trip(tmp_path: Path) -> None:
    write_files(tmp_path / "images")
    config = DataConfig(
        train=str(tmp_path / "images"),
        validation=write_set(tmp_path / "v", SQUARE),
        masks="file",
        shapes=3,
    )
    found = scan(config, SIDE, 16, 2)
    assert found.problems and found.notes and found.training.epoch
    read = read_scan(dump_scan(found))
    assert read == found
    assert read.training.digest() == found.training.digest()


def test_the_digest_is_of_all_that_is_seen_and_of_nothing_else(tmp_path: Path) -> None:
    training, _ = scanned({"train": write_set(tmp_path / "a", SQUARE, SQUARE)})
    os.rename(tmp_path / "a", tmp_path / "b")
    moved, _ = scanned({"train": str(tmp_path / "b")})
    assert moved.examples != training.examples
    assert moved.digest() == training.digest()
    first, second = training.examples
    changed = [
        replace(training, epoch=(0, 1, 1)),
        replace(training, examples=(second, first)),
        *(
            replace(training, examples=(replace(first, **change), second))
            for change in (
                {"sha256": "0"},
                {"mask_sha256": "0"},
                {"caption": "another"},
                {"loss_weight": 2.0},
                {"shape": (48, 80)},
            )
        ),
    ]
    digests = {dataset.digest() for dataset in (training, *changed)}
    assert len(digests) == 1 + len(changed)
