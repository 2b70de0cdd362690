"""From what is asked for to pictures: seeds, settings, grids, passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffusion.solvers import SOLVERS as REAL_SOLVERS
from sampler.errors import SampleError
from sampler.picture import SOLVERS, SPACINGS, Picture, Used
from sampler.plan import Panel, batches_of, check_size, parse_axis, pictures
from sampler.prompt_file import Prompt, parse, read

INK = Used("ink@1", "ab" * 32, 0.7)
PLAIN = Picture("", "", 5, (INK,), 20, "dpm++2m", 4.0, 64, 64)


def planned(*prompts: str, per_prompt: int = 1, grid: tuple[str, ...] = ()) -> list[Panel]:
    lines = [parse(text, "here") for text in prompts]
    axes = [parse_axis(text) for text in grid]
    used = {"ink@2": Used("ink@2", "cd" * 32, 1.0)}
    return pictures(PLAIN, lines, per_prompt, axes, False, used)


def test_names_of_solvers_and_spacings_are_those_that_exist() -> None:
    from diffusion import solvers

    assert tuple(REAL_SOLVERS) == SOLVERS
    assert sorted(solvers.SPACINGS) == sorted(SPACINGS)


def test_each_picture_has_a_seed_of_its_own() -> None:
    found = planned("a fox", "an owl", per_prompt=2)
    assert [(p.picture.prompt, p.picture.seed) for p in found] == [
        ("a fox", 5),
        ("a fox", 6),
        ("an owl", 7),
        ("an owl", 8),
    ]
    assert [p.file for p in found][:2] == ["0001-a-fox-5.png", "0002-a-fox-6.png"]


def test_a_line_says_its_own_settings() -> None:
    line = "a fox, day --n night, blurry --w 128 --h 64 --s 30 --d 42 --l 7.5"
    fox, again, owl = (p.picture for p in planned(line, "x --d 42", "an owl"))
    assert fox == replace(
        PLAIN,
        prompt="a fox, day",
        negative="night, blurry",
        width=128,
        height=64,
        steps=30,
        seed=42,
        scale=7.5,
    )
    assert again.seed == 42
    assert owl == replace(PLAIN, prompt="an owl", seed=7)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a --s many", "--s is a whole number, found 'many'"),
        ("a --l nan", "--l is a number, found 'nan'"),
        ("a --w -64", "--w is a whole number"),
        ("a --q 3", "--q is not known; use --n"),
    ],
)
def test_a_line_that_cannot_be_read(line: str, said: str) -> None:
    with pytest.raises(SampleError, match=f"^here: {said}"):
        parse(line, "here")


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# notes\n\na fox --s 9\n  ein Löwe -- mit Mähne\n")
    assert read(path) == [Prompt("a fox", {"steps": 9}), Prompt("ein Löwe -- mit Mähne", {})]
    path.write_text("# nothing\n")
    with pytest.raises(SampleError, match="found none"):
        read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SampleError, match="not UTF-8"):
        read(path)
    path.with_suffix(".json").write_text('["a --s 3", "# b"]')
    assert read(path.with_suffix(".json")) == [Prompt("a --s 3"), Prompt("# b")]
    path.with_suffix(".json").write_text('{"a": 1}')
    with pytest.raises(SampleError, match="expected a JSON list"):
        read(path.with_suffix(".json"))
    path.write_text("a\nb --s x\n")
    with pytest.raises(SampleError, match="line 2: --s"):
        read(path)


def test_a_grid_has_a_picture_for_each_pair() -> None:
    found = planned("a fox", grid=("weight=0,0.5,1", "steps=10,20"))
    assert [(p.row, p.column) for p in found] == [
        (f"steps {steps}", f"weight {weight}") for steps in (10, 20) for weight in ("0", "0.5", "1")
    ]
    assert found[1].picture.loras == (replace(INK, weight=0.5),)
    assert found[3].picture.steps == 20
    assert {p.picture.seed for p in found} == {5}
    assert len({p.file for p in found}) == 6


def test_a_grid_of_versions_and_prompts() -> None:
    found = planned(grid=("lora=ink@2", "prompt=a fox,an owl"))
    assert [p.picture.prompt for p in found] == ["a fox", "an owl"]
    assert [used.reference for used in found[0].picture.loras] == ["ink@1", "ink@2"]


@pytest.mark.parametrize("grid", [("weight=0,1", "lora=ink@2"), ("lora=ink@2", "weight=0,1")])
def test_a_grid_of_loras_and_weights(grid: tuple[str, str]) -> None:
    found = pictures(
        replace(PLAIN, loras=()),
        [Prompt("a fox")],
        1,
        [parse_axis(text) for text in grid],
        False,
        {"ink@2": Used("ink@2", "cd" * 32, 0.5)},
    )
    assert [p.picture.loras[0].weight for p in found] == [0, 1]


@pytest.mark.parametrize(
    ("grid", "prompts", "per_prompt", "loras", "said"),
    [
        ("prompt=a,b", ["c"], 1, (INK,), "takes the place of --prompt"),
        ("seed=1,2", ["c"], 2, (INK,), "takes the place of --images-per-prompt"),
        ("weight=0,1", ["c"], 1, (), "needs a --lora"),
    ],
)
def test_a_grid_with_nothing_to_vary(
    grid: str, prompts: list[str], per_prompt: int, loras: tuple[Used, ...], said: str
) -> None:
    with pytest.raises(SampleError, match=said):
        pictures(
            replace(PLAIN, loras=loras),
            [Prompt(text) for text in prompts],
            per_prompt,
            [parse_axis(grid)],
            False,
            {},
        )


def test_values_with_commas_stand_in_quotes() -> None:
    assert parse_axis('prompt="a fox, red", an owl').values == ("a fox, red", "an owl")


@pytest.mark.parametrize(
    "axis", ["weight", "wieght=1", "steps=0", "steps=1.5", "solver=euler2", "seed=1,,2", "eta=2"]
)
def test_a_grid_that_cannot_be_read(axis: str) -> None:
    with pytest.raises(SampleError, match=f"--grid {axis}: "):
        parse_axis(axis)


def test_sizes_fit_the_networks() -> None:
    check_size(64, 128, 16)
    with pytest.raises(SampleError, match=r"multiples of 16 .*; use 64 × 112"):
        check_size(60, 110, 16)
    with pytest.raises(SampleError, match="4096 pixels a side is the most"):
        check_size(8192, 64, 8)


def test_passes_have_one_setting_and_lora_and_text_length() -> None:
    one = replace(PLAIN, prompt="short", batch=2)
    other = replace(one, loras=())
    long = replace(one, prompt="long")
    batches = batches_of([one, other, one, long, other, one], lambda picture: len(picture.prompt))
    assert batches == [[0, 2], [5], [3], [1, 4]]
