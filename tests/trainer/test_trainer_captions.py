"""Which images a folder has and what is said of them; the images themselves are not opened."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from trainer.captions import Listing, listed


def made(folder: Path, **files: str | bytes) -> Path:
    """A folder of files; `__` in a name stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def names(listing: Listing) -> dict[str, str]:
    return {path.name: caption for path, caption in listing.rows}


def only_problem(folder: Path) -> str:
    """The one problem of a folder, without the folder's path."""
    (problem,) = listed(folder).problems
    assert problem.startswith(str(folder))
    return problem.removeprefix(str(folder)).lstrip("/")


# ---- captions beside the images


def test_images_come_sorted_with_their_captions(tmp_path: Path) -> None:
    made(tmp_path, b__png="", b__txt="second\n", a__JPG="", a__txt=" first ")
    listing = listed(tmp_path)
    assert listing.rows == [(tmp_path / "a.JPG", "first"), (tmp_path / "b.png", "second")]
    assert (listing.problems, listing.notes, listing.refused) == ([], [], [])


def test_a_caption_is_one_line_without_a_byte_order_mark(tmp_path: Path) -> None:
    made(tmp_path, a__png="", a__txt=b"\xef\xbb\xbfa cat, \r\n\r\n  on a mat\n")
    assert names(listed(tmp_path)) == {"a.png": "a cat, on a mat"}


def test_every_fault_is_named_and_not_the_first(tmp_path: Path) -> None:
    made(tmp_path, a__png="", b__png="", b__txt=" \n", c__png="", c__txt="caf\xe9".encode("latin"))
    made(tmp_path, d__png="", d__jpg="", d__txt="two", e__png="", e__txt="good")
    (tmp_path / "f.png").mkdir()
    (tmp_path / "g.png").symlink_to(tmp_path / "nowhere")
    listing = listed(tmp_path)
    assert names(listing) == {"e.png": "good"}
    assert sorted(listing.problems) == [
        f"{tmp_path}/a.png: expected a caption in a.txt, found none; write one",
        f"{tmp_path}/b.png: expected a caption in b.txt, found an empty one; write one",
        f"{tmp_path}/c.png: expected a caption in c.txt, found byte 0xe9 at position 3, which is "
        "not UTF-8; save it as UTF-8",
        f"{tmp_path}/d.jpg: expected one image for the caption d.txt, found d.jpg, d.png; rename "
        "them",
        f"{tmp_path}/f.png: expected an image, found a folder; rename or remove it",
        f"{tmp_path}/g.png: expected an image, found a link to nothing; put the image there",
    ]
    assert [path.name for path in listing.refused] == ["a.png", "b.png", "c.png", "d.jpg", "d.png"]


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.png")).touch()
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    assert "expected a file name in UTF-8" in only_problem(tmp_path)


@pytest.mark.parametrize("kind", ["nowhere", "a file", "empty"])
def test_a_folder_that_is_none_or_empty_is_a_problem(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "images"
    if kind == "a file":
        folder.touch()
    if kind == "empty":
        made(folder, readme__md="")
    assert {
        "nowhere": ": there is no such data folder; check the path in the config",
        "a file": ": expected a folder of images, found Not a directory; check the path",
        "empty": ": expected images (.png, .jpg, .jpeg, .webp, .bmp), found none; put images with "
        "captions there",
    }[kind] == only_problem(folder)


def test_what_is_left_out_is_noted_by_kind_and_hidden_files_are_not(tmp_path: Path) -> None:
    made(tmp_path, a__png="", a__txt="x", b__txt="lonely", __DS_Store="")
    for name in (".hidden.png", "._a.png", "Thumbs.db", "x.HEIC", "y.heic", "z.gif", "LICENSE"):
        (tmp_path / name).touch()
    (tmp_path / "10_more").mkdir()
    (tmp_path / "other.mask.png").touch()
    listing = listed(tmp_path)
    assert names(listing) == {"a.png": "x"}
    assert listing.problems == []
    kinds = ".png, .jpg, .jpeg, .webp, .bmp"
    assert sorted(note.removeprefix(f"{tmp_path}: ") for note in listing.notes) == [
        f".gif files are left out (z.gif); convert what is to be seen to one of {kinds}",
        f".heic files are left out (x.HEIC, y.heic); convert what is to be seen to one of {kinds}",
        "captions without an image are left out (b.txt); name them like their images",
        "expected the image of each mask, found none for other.mask.png; a mask is named like its "
        "image, NAME.mask.png",
        f"files without an extension are left out (LICENSE); convert what is to be seen to one of "
        f"{kinds}",
        "folders in a folder are not looked into (10_more); name them in data.train",
    ]


def test_masks_are_no_images(tmp_path: Path) -> None:
    made(tmp_path, a__png="", a__txt="x", a__mask__png="")
    listing = listed(tmp_path)
    assert names(listing) == {"a.png": "x"}
    assert listing.notes == []


# ---- tables


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv", "other.csv"])
def test_a_table_lists_images_in_folders_too(tmp_path: Path, table: str) -> None:
    made(tmp_path, a__png="", unlisted__png="")
    made(tmp_path / "more", b__png="")
    rows = [("more/b.png", 'two, "quoted"\nlines'), ("./a.png", " one ")]
    if table == "metadata.jsonl":
        lines = [json.dumps({"file_name": name, "text": text, "x": 1}) for name, text in rows]
        text = "\n\n".join(lines)
    else:
        place = "dir" if table == "other.csv" else "file_name"
        lines = ['{},"{}"'.format(name, text.replace('"', '""')) for name, text in rows]
        text = "\r\n".join([f"{place},text", *lines])
    (tmp_path / table).write_bytes(b"\xef\xbb\xbf" + text.encode())
    listing = listed(tmp_path)
    assert listing.problems == []
    assert listing.rows == [
        (tmp_path / "a.png", "one"),
        (tmp_path / "more/b.png", 'two, "quoted" lines'),
    ]
    (note,) = listing.notes
    assert "images that the table does not list are left out (unlisted.png)" in note


GOOD = '{"file_name": "a.png", "text": "x"}'
EXPECTED = 'expected {"file_name": "…", "text": "…"}, found'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", f"{EXPECTED} 'not json'; correct the line"),
        ("[1]", f"{EXPECTED} '[1]'; correct the line"),
        ('{"file_name": "b.png"}', EXPECTED),
        ('{"file_name": 3, "text": "x"}', EXPECTED),
        ('{"file_name": "b.png", "text": null}', EXPECTED),
        ("[" * 100_000, EXPECTED),
        (
            '{"file_name": "b.png", "text": " "}',
            "'b.png': expected a caption, found an empty one; write one",
        ),
        ('{"file_name": "b.png", "text": "\\ud800"}', "found half a character"),
        ('{"file_name": "no.png", "text": "x"}', "'no.png': expected an image, found no such file"),
        ('{"file_name": "a\\u0000.png", "text": "x"}', "expected an image, found no such file"),
        ('{"file_name": "' + "x" * 300 + '.png", "text": "x"}', "found no such file"),
        ('{"file_name": "", "text": "x"}', "expected an image, found a folder"),
        ('{"file_name": "c.gif", "text": "x"}', "found a .gif file; convert it or take it out"),
        ('{"file_name": "a.mask.png", "text": "x"}', "found a mask; convert it or take it out"),
        (
            '{"file_name": "./a.png", "text": "y"}',
            "'./a.png' is listed before, in line 1; take one of the lines out",
        ),
        (
            '{"file_name": "../b.png", "text": "x"}',
            "expected an image in the table's folder, found '../b.png'; move it there",
        ),
        ('{"file_name": "/b.png", "text": "x"}', "found '/b.png'; move it there"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: str, said: str) -> None:
    made(tmp_path, a__png="", b__png="", c__gif="", a__mask__png="")
    (tmp_path / "metadata.jsonl").write_text(f"{GOOD}\n{line}\n")
    assert only_problem(tmp_path).startswith("metadata.jsonl, line 2: ")
    assert said in only_problem(tmp_path)
    assert names(listed(tmp_path)) == {"a.png": "x"}


def test_a_table_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    made(tmp_path, a__png="", metadata__jsonl=b"\xff" + GOOD.encode())
    assert only_problem(tmp_path) == (
        "metadata.jsonl: expected UTF-8, found byte 0xff at position 0; save it as UTF-8"
    )


@pytest.mark.parametrize(
    ("sheet", "said"),
    [
        ("image,text\na.png,x\n", "expected the columns file_name (or dir) and text in its first"),
        ("", "found nothing; correct the line"),
        ("file_name,text\na.png\n", "line 2: 'a.png': expected a caption, found an empty one"),
        ("file_name,text\nno.png,x\n", "line 2: 'no.png': expected an image, found no such file"),
        ("file_name,text\na.png,x\na.png,y\n", "line 3: 'a.png' is listed before, in line 2"),
        ("file_name,text\n\xff,x\n", "expected UTF-8, found byte 0xff at position 15"),
    ],
)
def test_a_bad_csv_is_named(tmp_path: Path, sheet: str, said: str) -> None:
    made(tmp_path, a__png="", captions__csv=sheet.encode("latin-1"))
    assert only_problem(tmp_path).startswith("captions.csv")
    assert said in only_problem(tmp_path)


def test_a_csv_with_a_field_without_end_is_named(tmp_path: Path) -> None:
    made(tmp_path, a__png="", captions__csv=f'file_name,text\na.png,"{"x" * 2000}\n')
    before = csv.field_size_limit(1000)
    try:
        assert only_problem(tmp_path).startswith("captions.csv, line 2: expected CSV, found a line")
    finally:
        csv.field_size_limit(before)


def test_two_csv_files_are_one_too_many(tmp_path: Path) -> None:
    made(tmp_path, a__png="", one__csv="", two__csv="")
    assert only_problem(tmp_path) == (
        ": expected one .csv with captions, found one.csv, two.csv; keep one"
    )


def test_paths_are_those_of_the_folder_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path / "set", a__png="", metadata__jsonl=GOOD)
    (tmp_path / "link").symlink_to("set")
    monkeypatch.chdir(tmp_path)
    for folder in ("set", "link", "./link/../set", "link/."):
        assert listed(Path(folder)).rows == [(Path(folder) / "a.png", "x")]
