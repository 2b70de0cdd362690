"""The recipe for the example images, as far as it works without npm and a rasteriser."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from assets.recipe import images


def archive(path: Path, members: dict[str, object]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_an_icon_becomes_a_document_with_its_own_view_box(tmp_path: Path) -> None:
    icons = {
        "width": 32,
        "height": 32,
        "icons": {"dot": {"body": "<path/>"}, "bar": {"body": "<g/>", "width": 64, "left": 1}},
    }
    documents = images.svg_documents(archive(tmp_path / "a.tgz", {"icons.json": icons}))
    assert 'viewBox="0 0 32 32"><path/></svg>' in documents["dot"]
    assert 'viewBox="1 0 64 32"><g/></svg>' in documents["bar"]


def test_a_category_is_the_first_word_of_its_title(tmp_path: Path) -> None:
    metadata = {"categories": {"Food & Drink": ["pear"], "Objects": ["axe"]}}
    path = archive(tmp_path / "a.tgz", {"metadata.json": metadata})
    assert images.categories_of(path) == {"pear": "Food", "axe": "Objects"}


@pytest.mark.parametrize(
    "name", ["red-apple", "nine-oclock", "two-hearts", "open-book", "face-with-its-eyes-shut"]
)
def test_colours_details_and_plain_shapes_are_not_clear(name: str) -> None:
    assert not images.is_clear(name)


@pytest.mark.parametrize("name", ["tangerine", "blueberries", "t-rex", "smiling-face-with-tear"])
def test_things_are_clear(name: str) -> None:
    assert images.is_clear(name)


def test_the_split_depends_on_the_names_alone() -> None:
    category = {
        f"{title.lower()}-{number}": title for title in images.TRAIN_COUNTS for number in range(100)
    }
    train, validation = images.split(category)
    assert (len(train), len(validation)) == (200, 40)
    assert not set(train) & set(validation)
    assert images.split(dict(reversed(category.items()))) == (train, validation)


def test_a_changed_package_is_refused_in_one_sentence(tmp_path: Path) -> None:
    cache = tmp_path / ".packages"
    cache.mkdir()
    (cache / images.PACKAGES[0].file_name).write_bytes(b"something else")
    result = CliRunner().invoke(images.main, [str(tmp_path)])
    assert result.exit_code == 2
    assert images.PACKAGES[0].file_name in result.output
    assert images.PACKAGES[0].sha256 in result.output


def test_the_ink_set_does_not_touch_a_folder_of_something_else(tmp_path: Path) -> None:
    drawn, target = tmp_path / "ink", tmp_path / "set"
    drawn.mkdir()
    (drawn / "ant.png").write_bytes(b"a picture")
    images.write_ink_set(target, drawn, ["ant"])
    images.write_ink_set(target, drawn, ["ant"])
    assert (target / "ant.txt").read_text() == "ink emoji of ant\n"
    (target / "holiday.png").write_bytes(b"a photograph")
    with pytest.raises(images.RecipeError, match=r"holiday\.png"):
        images.write_ink_set(target, drawn, ["ant"])


def test_the_base_learns_colour_only_and_every_concept_of_the_ink_set(tmp_path: Path) -> None:
    images.write_base_set(tmp_path, ["pear", "ant", "bus"])
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [
        f"{style} emoji of {name}" for style in ("flat", "noto") for name in ("ant", "bus", "pear")
    ]
    assert rows[0]["file_name"] == "flat/ant.png"
