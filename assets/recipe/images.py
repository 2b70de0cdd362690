"""Draws the example images: one set of concepts in three styles, from three npm packages.

    python -m assets.recipe.images OUT_DIR

Every concept (an emoji such as "red apple") exists in each style under the same name, so two
styles differ in how a thing is drawn and not in what is drawn. `OUT_DIR` receives

    flat/, noto/, ink/   one PNG per concept and a metadata.jsonl, the layout of an image folder
                         of the Hugging Face `datasets` library
    metadata.jsonl       what the small base learns from: concepts in flat and noto
    concepts.json        all concept names, the split for fine-tuning on ink, the category of each

With the same packages and the same rasteriser the output is the same, byte for byte.
"""

import hashlib
import io
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from PIL import Image


@dataclass(frozen=True)
class Package:
    """One style of drawing and the npm package it comes from."""

    style: str
    name: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        """The name `npm pack` gives to the archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = (
    Package(  # MIT, Microsoft Corporation
        "flat",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    Package(  # Apache-2.0, Google Inc
        "noto",
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    Package(  # MIT, Microsoft Corporation
        "ink",
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
)

# Concepts per category in the two parts of the ink set. The categories left out (people,
# symbols, flags) have few drawings that can be told apart at 64 pixels.
VALIDATION_COUNTS = {
    "Animals": 12, "Food": 10, "Smileys": 8, "Travel": 4, "Objects": 3, "Activities": 3,
}  # fmt: skip
TRAIN_COUNTS = {
    "Animals": 60, "Food": 50, "Smileys": 40, "Travel": 18, "Objects": 20, "Activities": 12,
}  # fmt: skip

# A concept with one of these words in its name is not in the ink set.
COLOUR_WORDS = "black blue brown green grey orange pink purple rainbow red white yellow"
UNCLEAR_WORDS = (
    # clock faces, phases of the moon, weather that differs by a detail, flags, plain shapes
    "oclock thirty moon globe cloud sun flag suit heart hearts speaker "
    # pages, screens and signs, which are all a rectangle
    "book chart page envelope mailbox tray index folder banknote disk map medal bubble stop "
    # marks beside a face rather than a thing
    "anger balloon collision dashing dizzy droplets hole hundred letter mark zzz kiss head"
)
LEFT_OUT = frozenset(f"{COLOUR_WORDS} {UNCLEAR_WORDS}".split())
MAX_WORDS = 4  # a longer name describes a detail that 64 pixels do not show


class RecipeError(click.ClickException):
    """An input that is not what the recipe expects; told in one sentence."""

    exit_code = 2


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to `path` so that the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def fetch(package: Package, cache: Path) -> Path:
    """Returns the package's archive in `cache`, after `npm pack` where it is not there yet.

    Raises `RecipeError` if npm fails or the archive is not the one this recipe was written for.
    """
    archive = cache / package.file_name
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            spec = f"{package.name}@{package.version}"
            command = ["npm", "pack", "--silent", "--pack-destination", folder, spec]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except FileNotFoundError:
                raise RecipeError("npm was not found; install Node.js, which brings it.") from None
            except subprocess.CalledProcessError as error:
                raise RecipeError(f"{' '.join(command)} failed: {error.stderr.strip()}") from None
            os.replace(Path(folder, package.file_name), archive)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        raise RecipeError(
            f"{archive}: expected sha256 {package.sha256}, found {found}; "
            "delete the file and run again."
        )
    return archive


def read_json(archive: Path, member: str) -> Any:
    """Returns the JSON document `member` of an npm archive."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"package/{member}")
        assert file is not None, member
        return json.load(file)


def svg_documents(archive: Path) -> dict[str, str]:
    """Returns icon name -> SVG document, for every icon of an Iconify package."""
    icons = read_json(archive, "icons.json")
    documents = {}
    for name, icon in icons["icons"].items():
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        documents[name] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )
    return documents


def categories_of(archive: Path) -> dict[str, str]:
    """Returns icon name -> the first word of its category ("Food" for "Food & Drink")."""
    categories = read_json(archive, "metadata.json")["categories"]
    return {name: title.split()[0] for title, names in categories.items() for name in names}


def png(svg: str, size: int, mode: str) -> bytes:
    """Rasterises an SVG document on white to a square PNG of `size` pixels, in a Pillow mode."""
    try:
        import resvg_py  # needed for drawing only, so it is no dependency of the project
    except ImportError:
        raise RecipeError("resvg-py is not there; run `pip install resvg-py==0.5.0`.") from None
    drawn = resvg_py.svg_to_bytes(
        svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    buffer = io.BytesIO()
    Image.open(io.BytesIO(bytes(drawn))).convert(mode).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def caption(style: str, name: str) -> str:
    """Returns the caption of a concept: "ink emoji of red apple" for ("ink", "red-apple")."""
    return f"{style} emoji of {name.replace('-', ' ')}"


def is_clear(name: str) -> bool:
    """Tells whether a concept can be recognised from a small drawing without colour."""
    words = name.split("-")
    return len(words) <= MAX_WORDS and LEFT_OUT.isdisjoint(words)


def split(category: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Returns the (training, validation) concepts of the ink set, each sorted by name.

    Within a category the concepts are ordered by the SHA-256 of their name; the first ones are
    for validation and the next ones for training. No seed, and no dependence on a library.
    """
    train: list[str] = []
    validation: list[str] = []
    for title, held_out in VALIDATION_COUNTS.items():
        names = [name for name in category if category[name] == title and is_clear(name)]
        names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
        validation += names[:held_out]
        train += names[held_out : held_out + TRAIN_COUNTS[title]]
    return sorted(train), sorted(validation)


def write_style(
    folder: Path, style: str, drawings: Mapping[str, str], size: int, category: Mapping[str, str]
) -> None:
    """Writes one PNG per concept and, last, the metadata.jsonl that lists them."""
    lines = []
    mode = "L" if style == "ink" else "RGB"  # ink has no colour
    for name in category:
        write_atomically(folder / f"{name}.png", png(drawings[name], size, mode))
        row = {
            "file_name": f"{name}.png",
            "text": caption(style, name),
            "category": category[name],
        }
        lines.append(json.dumps(row) + "\n")
    write_atomically(folder / "metadata.jsonl", "".join(lines).encode())


def write_base_set(folder: Path, names: Iterable[str]) -> None:
    """The table of what UNet and text encoder learn from: two colour styles, no ink.

    Only the concepts of the ink set: few of them, each seen often, draw better than all of them
    seen too rarely.
    """
    rows = [
        {"file_name": f"{style}/{name}.png", "text": caption(style, name)}
        for style in ("flat", "noto")
        for name in sorted(names)
    ]
    table = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(folder / "metadata.jsonl", table.encode())


def write_ink_set(folder: Path, images: Path, names: Iterable[str]) -> None:
    """Writes NAME.png and its caption NAME.txt into `folder`.

    Raises `RecipeError`, before anything is written, if the folder holds any other file.
    """
    contents = {}
    for name in names:
        contents[f"{name}.png"] = (images / f"{name}.png").read_bytes()
        contents[f"{name}.txt"] = f"{caption('ink', name)}\n".encode()
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if strangers := sorted(present - contents.keys()):
        raise RecipeError(
            f"{folder}: expected an empty folder or this same image set, found {strangers[0]}; "
            "name another folder or remove what is there."
        )
    for file_name, content in contents.items():
        write_atomically(folder / file_name, content)


@click.command(epilog="Example: python -m assets.recipe.images build/emoji")
@click.argument("out_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--size",
    default=64,
    show_default=True,
    help="Width and height in pixels.",
    type=click.IntRange(min=8),
)
@click.option(
    "--ink-set",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Also write the ink images for fine-tuning, with caption files, to "
    "FOLDER/train and FOLDER/validation.",
)
def main(out_dir: Path, size: int, ink_set: Path | None) -> None:
    """Draw the concepts in the styles flat, noto and ink into OUT_DIR.

    The three npm packages (5.3 MB) are fetched with `npm pack` into OUT_DIR/.packages, once.
    """
    archives = {package.style: fetch(package, out_dir / ".packages") for package in PACKAGES}
    drawings = {style: svg_documents(archive) for style, archive in archives.items()}
    # Ink has no skin tones, so the names in common have none; noto's table of categories
    # leaves out names that are kept only for compatibility.
    listed = categories_of(archives["noto"])
    common = set.intersection(*(set(documents) for documents in drawings.values()))
    category = {name: listed[name] for name in sorted(common) if name in listed}

    train, validation = split(category)
    for style in archives:
        click.echo(f"{style}: {len(category)} images", err=True)
        write_style(out_dir / style, style, drawings[style], size, category)
    concepts = {
        "all": list(category),
        "ink_train": train,
        "ink_validation": validation,
        "category": category,
    }
    write_atomically(out_dir / "concepts.json", (json.dumps(concepts, indent=1) + "\n").encode())
    write_base_set(out_dir, train + validation)
    if ink_set is not None:
        write_ink_set(ink_set / "train", out_dir / "ink", train)
        write_ink_set(ink_set / "validation", out_dir / "ink", validation)
    click.echo(out_dir)


if __name__ == "__main__":
    main()
