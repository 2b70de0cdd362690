"""Real pictures of a tiny base: the same alone and together, merged and apart, once more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sampler.errors import SampleError
from sampler.prompt_file import Prompt
from sampler.sample import Drawn, Request, Where, draw_again, sample, write_sheet
from tests.sampler.tiny_base import Tiny

ROOT = Path(__file__).parents[2]
PROMPTS = ("flat emoji of fox", "flat emoji of (pizza:1.2)", "flat emoji of taco", "ink owl")


@pytest.fixture(scope="module", autouse=True)
def compiled_once() -> Iterator[None]:
    """What several calls load and compile alike, they share here; in the test of the main job each
    is a process of its own."""
    from sampler import artist

    real, known = artist.Artist, {}

    def shared(config: Any, base: Any, adapters: Any, **options: Any) -> Any:
        key = (str(base.path), tuple(adapters), *options.values())
        if key not in known:
            known[key] = real(config, base, adapters, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artist, "Artist", shared)
        yield


def where(tiny: Tiny, out: Path, **settings: object) -> Where:
    return Where(out, base=str(tiny.base), model=str(tiny.model), **settings)  # type: ignore[arg-type]


def request(lora: Path | None, *prompts: str, **settings: object) -> Request:
    loras = ((str(lora), 1.0),) if lora else ()
    fields = {"steps": 2, "solver": "euler-a", **settings}
    return Request(loras, tuple(map(Prompt, prompts)), **fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def drawn(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    out = tmp_path_factory.mktemp("drawn")
    return sample(request(tiny.lora, *PROMPTS, compare=True), where(tiny, out))


def pixels(folder: Path, name: str) -> np.ndarray:
    with Image.open(folder / name) as image:
        return np.asarray(image).astype(int)


def files(drawn: Drawn, base: bool = False) -> list[str]:
    return [panel.file for panel in drawn.panels if bool(panel.picture.loras) != base]


def test_a_picture_is_the_same_alone(tiny: Tiny, drawn: Drawn, tmp_path: Path) -> None:
    alone = sample(request(tiny.lora, PROMPTS[2], seed=2), where(tiny, tmp_path))
    (name,) = files(alone)
    assert (tmp_path / name).read_bytes() == (drawn.folder / files(drawn)[2]).read_bytes()


def test_the_lora_is_seen_and_the_base_comes_back(tiny: Tiny, drawn: Drawn, tmp_path: Path) -> None:
    for with_lora, without in zip(files(drawn), files(drawn, base=True), strict=True):
        difference = pixels(drawn.folder, with_lora) - pixels(drawn.folder, without)
        assert np.abs(difference).mean() > 3
    plain = sample(request(None, PROMPTS[3], seed=3), where(tiny, tmp_path))
    (name,) = files(plain, base=True)
    wanted = pixels(drawn.folder, files(drawn, base=True)[3])
    np.testing.assert_array_equal(pixels(tmp_path, name), wanted)


def test_again_is_the_same_to_the_byte(drawn: Drawn, tmp_path: Path) -> None:
    chosen = [drawn.folder / files(drawn)[1], drawn.folder / files(drawn, base=True)[0]]
    draw_again(chosen, Where(tmp_path))
    for path in chosen:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_again_with_a_lora_that_was_moved_and_names_that_are_the_same(
    tiny: Tiny, drawn: Drawn, tmp_path: Path
) -> None:
    moved, place = tmp_path / "moved.safetensors", tmp_path / "copy"
    lora = tmp_path / "lora.safetensors"
    shutil.copy(tiny.lora, lora)
    sample(request(lora, PROMPTS[0]), where(tiny, place))
    (name,) = [path.name for path in place.glob("*.png")]
    lora.rename(moved)
    twice = [place / name, place / name]
    with pytest.raises(SampleError, match="there is no such file; say with --lora"):
        draw_again(twice, Where(tmp_path / "again"))
    (again,) = draw_again(twice, Where(tmp_path / "again"), [str(moved)])
    assert [panel.file for panel in again.panels] == [name, f"{name[:-4]}-2.png"]
    for panel in again.panels:
        assert (tmp_path / "again" / panel.file).read_bytes() == (place / name).read_bytes()


def test_a_folder_that_cannot_be_made(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SampleError, match="cannot make this folder"):
        sample(request(tiny.lora, "a fox"), where(tiny, tmp_path / "file" / "out"))


def test_apart_and_in_a_batch_it_is_the_same_but_for_rounding(
    tiny: Tiny, drawn: Drawn, tmp_path: Path
) -> None:
    out = tmp_path / "apart"
    apart = sample(request(tiny.lora, *PROMPTS, batch=2), where(tiny, out, apart=True))
    for ours, wanted in zip(files(apart), files(drawn), strict=True):
        difference = pixels(out, ours) - pixels(drawn.folder, wanted)
        assert np.abs(difference).max() <= 1
    last = out / files(apart)[3]
    draw_again([last], Where(tmp_path / "again"))
    assert (tmp_path / "again" / last.name).read_bytes() == last.read_bytes()


def test_what_is_there_is_not_drawn_anew_and_other_pictures_are_kept(
    tiny: Tiny, drawn: Drawn
) -> None:
    same = where(tiny, drawn.folder)
    times = {path: path.stat().st_mtime_ns for path in drawn.folder.glob("*.png")}
    (drawn.folder / files(drawn)[0]).unlink()
    sample(request(tiny.lora, *PROMPTS, compare=True), same)
    new = {path: path.stat().st_mtime_ns for path in drawn.folder.glob("0*.png")}
    assert [path.name for path in new if new[path] != times[path]] == [files(drawn)[0]]
    with pytest.raises(SampleError, match="there is another picture with another steps"):
        sample(request(tiny.lora, *PROMPTS, compare=True, steps=3), same)


def test_a_sheet_shows_them_and_replaces_only_itself(drawn: Drawn, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    write_sheet(drawn, sheet, False, False)
    write_sheet(drawn, sheet, False, False)
    write_sheet(replace(drawn, panels=drawn.panels[:2]), sheet, False, False)
    other = drawn.folder / drawn.panels[0].file
    with pytest.raises(SampleError, match="the file exists"):
        write_sheet(drawn, other, False, False)
    with Image.open(sheet) as image:
        assert np.asarray(image).std() > 10


def test_nan_is_said_and_not_saved(tiny: Tiny, tmp_path: Path) -> None:
    """A LoRA so strong that nothing is a number any more."""
    command = [
        *(sys.executable, "-m", "sampler.cli", "--lora", f"{tiny.lora}:1e30", *tiny.arguments),
        *("--prompt", "a fox", "--steps", "1", "--out", str(tmp_path / "out")),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "1 pictures came out as NaN and are not saved (0001-a-fox-0.png)" in done.stderr
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.slow
def test_on_two_devices_the_pictures_are_the_same(tiny: Tiny, drawn: Drawn, tmp_path: Path) -> None:
    two = where(tiny, tmp_path, devices="2")
    together = sample(request(tiny.lora, *PROMPTS, compare=True), two)
    for name in files(together):
        assert (tmp_path / name).read_bytes() == (drawn.folder / name).read_bytes()
