"""Images and captions on disk: what is read, and how what cannot be used is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.images import DataError, find_examples, read_image, read_images


def save(path: Path, image: Image.Image, caption: str | None = "a thing", **options) -> Path:
    image.save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption + "\n")
    return path


def red(mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, "red").convert(mode)


def test_examples_come_sorted_with_their_captions(tmp_path: Path) -> None:
    save(tmp_path / "b.png", red(), "second")
    save(tmp_path / "a.jpg", red(), " first ")
    assert [(e.path.name, e.caption) for e in find_examples(tmp_path)] == [
        ("a.jpg", "first"),
        ("b.png", "second"),
    ]


def test_a_table_names_images_in_other_folders(tmp_path: Path) -> None:
    save(tmp_path / "x.png", red(), None)
    (tmp_path / "set").mkdir()
    row = {"file_name": "../x.png", "text": "a cross", "category": "kept aside"}
    (tmp_path / "set" / "metadata.jsonl").write_text(json.dumps(row) + "\n\n")
    (example,) = find_examples(tmp_path / "set")
    assert example.caption == "a cross"
    assert example.path.samefile(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "line 1: expected"),
        ('{"file_name": "a.png"}', "line 1: expected"),
        ('{"file_name": "no.png", "text": "x"}', "line 1: image 'no.png' is missing"),
        ('{"file_name": "a.png", "text": " "}', "line 1: the caption of 'a.png' is empty"),
    ],
)
def test_a_bad_line_of_a_table_is_named(tmp_path: Path, line: str, said: str) -> None:
    save(tmp_path / "a.png", red())
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match="metadata") as caught:
        find_examples(tmp_path)
    assert said in str(caught.value)


def test_missing_folder_empty_folder_and_missing_caption(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data folder"):
        find_examples(tmp_path / "nowhere")
    with pytest.raises(DataError, match="found none"):
        find_examples(tmp_path)
    save(tmp_path / "a.png", red(), None)
    with pytest.raises(DataError, match=r"a\.png: expected a caption in a\.txt, found none"):
        find_examples(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match="found an empty one"):
        find_examples(tmp_path)


def test_every_file_that_does_not_decode_is_named_at_once(tmp_path: Path) -> None:
    save(tmp_path / "good.png", red())
    for name in ("bad.png", "worse.png"):
        (tmp_path / name).write_bytes(b"\x89PNG but no more")
        (tmp_path / name).with_suffix(".txt").write_text("x")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        read_images(find_examples(tmp_path), 16)
    message = str(caught.value)
    assert all(name in message for name in ("bad.png", "worse.png", "short.png"))
    assert "good.png" not in message


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "P", "RGBA"])
def test_every_colour_mode_gives_the_same_red(tmp_path: Path, mode: str) -> None:
    suffix = ".tif" if mode == "CMYK" else ".png"
    image = read_image(save(tmp_path / f"a{suffix}", red(mode)), 8)
    assert image.shape == (3, 8, 8)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[:, 4, 4], [1, -1, -1], atol=0.02)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", clear), 8), 1)


def test_greyscale_of_sixteen_bits_keeps_its_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    image = read_image(save(tmp_path / "a.png", Image.fromarray(ramp)), 8)
    np.testing.assert_allclose(image[0].ravel(), np.linspace(-1, 1, 64), atol=0.01)


def test_the_camera_s_rotation_is_applied(tmp_path: Path) -> None:
    left_red = Image.new("RGB", (16, 16), "blue")
    left_red.paste("red", (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90° clockwise: the left becomes the top
    image = read_image(save(tmp_path / "a.png", left_red, exif=exif), 16)
    assert image[0, 2, 8] > 0.9
    assert image[0, 13, 8] < -0.9


def test_the_middle_of_a_wide_image_is_kept(tmp_path: Path) -> None:
    wide = Image.new("RGB", (48, 16), "blue")
    wide.paste("red", (16, 0, 32, 16))
    image = read_image(save(tmp_path / "a.png", wide), 16)
    assert image[0, :, 4:12].min() > 0.9


@pytest.mark.parametrize("column", ["file_name", "dir"])
def test_a_csv_names_images_and_captions(column: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    save(tmp_path / "images" / "b.png", red(), None)
    save(tmp_path / "a.png", red(), None)
    sheet = f'{column},text\nimages/b.png,"one, two"\na.png, three \n'
    (tmp_path / "captions.csv").write_bytes(b"\xef\xbb\xbf" + sheet.encode())
    assert [(e.path.name, e.caption) for e in find_examples(tmp_path)] == [
        ("a.png", "three"),
        ("b.png", "one, two"),
    ]


@pytest.mark.parametrize(
    ("sheet", "said"),
    [
        ("image,text\na.png,x\n", "expected the columns file_name (or dir) and text"),
        ("", "found nothing"),
        ("file_name,text\na.png\n", "line 2: the caption of 'a.png' is empty"),
        ("file_name,text\nno.png,x\n", "line 2: image 'no.png' is missing"),
        ("file_name,text\n\xff,x\n", "expected UTF-8 CSV"),
    ],
)
def test_a_bad_csv_is_named(sheet: str, said: str, tmp_path: Path) -> None:
    save(tmp_path / "a.png", red(), None)
    (tmp_path / "captions.csv").write_bytes(sheet.encode("latin-1"))
    with pytest.raises(DataError, match=r"captions\.csv") as caught:
        find_examples(tmp_path)
    assert said in str(caught.value)


def test_two_csv_files_are_one_too_many(tmp_path: Path) -> None:
    save(tmp_path / "a.png", red())
    for name in ("one.csv", "two.csv"):
        (tmp_path / name).write_text("file_name,text\na.png,x\n")
    with pytest.raises(DataError, match=r"found one\.csv, two\.csv; keep one"):
        find_examples(tmp_path)


def test_a_prefix_goes_before_every_caption(tmp_path: Path) -> None:
    save(tmp_path / "a.png", red(), "a cross")
    assert find_examples(tmp_path, "in sks style, ")[0].caption == "in sks style, a cross"
