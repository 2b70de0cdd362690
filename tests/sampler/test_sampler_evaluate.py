"""lora-eval with a tiny base: real drawing, real features, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from sampler.eval_cli import main
from sampler.evaluate import digest_of, images_in
from tests.sampler.tiny_base import Tiny

PROMPTS = ("a fox", "an owl", "a (big:1.2) taco", "a bus", "a violin", "a penguin")
KID, NEAREST = "kid_efficientnet_lite0", "nearest_efficientnet_lite0"


def picture(folder: Path, number: int, level: int = 0) -> Path:
    """A disc on coloured ground, of its own size and colours."""
    draw = np.random.default_rng([number, level])
    y, x = np.mgrid[-1:1:24j, -1:1:24j]
    disc = (x**2 + y**2 < draw.uniform(0.2, 0.8))[..., None]
    pixels = np.where(disc, draw.integers(0, 256, 3), draw.integers(0, 256, 3))
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{number}.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def compiled_once() -> Iterator[None]:
    """The network of features is compiled for the first of these tests only."""
    from sampler import features

    found: list[Any] = []
    real = features.efficientnet

    def once() -> Any:
        if not found:
            found.append(real())
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "efficientnet", once)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real and training pictures, and prompts."""
    folder = tmp_path_factory.mktemp("evaluation")
    for number in range(12):
        picture(folder / "real", number)
        picture(folder / "train", number, 1)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in arguments])


def words(tiny: Tiny, place: Path, *more: object) -> list[object]:
    return [
        *("--lora", tiny.lora, *tiny.arguments, "--steps", 2, "--real", place / "real"),
        *("--prompts", place / "prompts.txt", "--out", place / "out", *more),
    ]


@pytest.fixture(scope="module")
def evaluated(tiny: Tiny, place: Path) -> dict[str, Any]:
    result = run(*words(tiny, place, "--train", place / "train", "--json"))
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_scores_of_lora_and_base_with_intervals(evaluated: dict[str, Any]) -> None:
    scores = evaluated["scores"]
    keys = [KID, "diversity_efficientnet_lite0", "nearest_efficientnet_lite0"]
    assert set(scores) == {k + s for k in keys for s in ("", "_base", "_difference")}
    for score in scores.values():
        assert score["lower"] <= score["value"] <= score["upper"]
    for key in keys:
        apart = scores[key]["value"] - scores[f"{key}_base"]["value"]
        assert scores[f"{key}_difference"]["value"] == pytest.approx(apart, abs=1e-9)
    assert scores[KID]["value"] > 0.02  # noise is not discs
    assert [one["picture"] for one in evaluated["nearest"]]
    assert any("rough guess" in text for text in evaluated["cautions"])


def test_the_spec_says_how_it_was_measured(
    evaluated: dict[str, Any], place: Path, tiny: Tiny
) -> None:
    spec, near = evaluated["evaluation"][KID], evaluated["evaluation"][NEAREST]
    assert spec["metrics"] == [KID, "diversity_efficientnet_lite0"]
    assert near["metrics"] == [NEAREST]
    assert near["training"]["pictures"] == 12
    assert "training" not in spec  # it does not change KID
    assert (spec["prompts"], spec["pictures"], spec["steps"], spec["seed"]) == (6, 6, 2, 0)
    digest = digest_of(images_in(place / "real").paths)
    assert spec["real"] == {"pictures": 12, "sha256": digest}
    assert spec["network"]["weights_sha256"].startswith("57934424")
    folder = Path(evaluated["folder"])
    assert json.loads((folder / "scores.json").read_text()) == evaluated["scores"]
    assert json.loads((folder / "evaluation.json").read_text()) == evaluated["evaluation"]
    with Image.open(evaluated["sheet"]) as sheet:
        assert np.asarray(sheet).std() > 10


def test_scores_can_be_published(evaluated: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    from registry.api import open_registry
    from registry.cli import main as registry

    folder = Path(evaluated["folder"])
    arguments = [
        *("push", tiny.lora, "tiny", "--registry", tmp_path / "registry"),
        *("--metrics", folder / "scores.json", "--evaluation", folder / "evaluation.json"),
    ]
    result = CliRunner().invoke(registry, [str(word) for word in arguments])
    assert result.exit_code == 0, result.output
    manifest = open_registry(str(tmp_path / "registry")).resolve("tiny")
    assert manifest.metrics[KID] == evaluated["scores"][KID]["value"]


def test_once_more_nothing_is_computed_and_the_scores_are_the_same(
    evaluated: dict[str, Any], tiny: Tiny, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sampler import artist, features

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(artist.Artist, "__init__", never)
    monkeypatch.setattr(features.Extractor, "__call__", never)
    result = run(*words(tiny, place, "--train", place / "train", "--json"))
    assert json.loads(result.stdout) == evaluated


def test_real_pictures_against_real_ones_score_about_0(place: Path, tmp_path: Path) -> None:
    for number in range(12):
        picture(tmp_path / "more", 100 + number)
    result = run(
        *("--pictures", tmp_path / "more", "--real", place / "real", "--out", tmp_path / "out"),
        "--json",
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    score = found["scores"][KID]
    assert score["lower"] < 0 < score["upper"]
    assert "prompts" not in found["evaluation"][KID]


def test_a_copied_training_picture_is_found(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "real", tmp_path / "drawn")
    shutil.copy(place / "train" / "7.png", tmp_path / "drawn" / "x.png")
    result = run(
        *("--pictures", tmp_path / "drawn", "--real", place / "real", "--train", place / "train"),
        *("--out", tmp_path / "out", "--json"),
    )
    (nearest, *_) = json.loads(result.stdout)["nearest"]
    assert (nearest["picture"], nearest["training_image"]) == ("x.png", "7.png")
    assert nearest["distance"] == pytest.approx(0, abs=1e-5)


def test_the_table_for_people(evaluated: dict[str, Any], tiny: Tiny, place: Path) -> None:
    result = run(*words(tiny, place, "--train", place / "train"))
    lines = result.stdout.splitlines()
    assert lines[1].startswith("KID on EfficientNet-Lite0 × 10³")
    assert "FID" not in result.stdout
    assert "CLIP" not in result.stdout
    assert "caution: " in result.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--real", "NOWHERE"], "there is no such folder"),
        (["--real", "EMPTY"], "expected pictures (.png, "),
        (["--real", "BROKEN"], "bad.png: expected an image, found a file that does not decode"),
        (["--real", "ONE"], "expected at least 2 real pictures, found 1"),
        (["--inception", "inception.pth"], "pt_inception-2015-12-05-6726825d.pth"),
        (["--clip", "clip.safetensors"], "clip-vit-large-patch14"),
        (["--prompts", "NOWHERE"], "cannot be read"),
        (["--lora", "nothing@1"], "no registry is named"),
        (["--pictures", "REAL"], "leave --lora out"),
        (["--base-pictures", "REAL"], "--base-pictures goes with --pictures"),
        (["--size", "15"], "multiples of 2"),
    ],
)
def test_what_is_refused(
    tiny: Tiny, place: Path, tmp_path: Path, more: list[str], said: str
) -> None:
    folders = {name: tmp_path / name.lower() for name in ("NOWHERE", "EMPTY", "BROKEN", "ONE")}
    folders["REAL"] = place / "real"
    folders["EMPTY"].mkdir()
    picture(folders["ONE"], 1)
    picture(folders["BROKEN"], 1)
    picture(folders["BROKEN"], 2)
    (folders["BROKEN"] / "bad.png").write_bytes(b"\x89PNG nothing")
    arguments = words(tiny, place, *(folders.get(word, word) for word in more))
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_pictures_and_prompts_that_do_not_match(place: Path, tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / "base", number)
    given = ["--pictures", place / "real", "--real", place / "train", "--out", tmp_path / "out"]
    result = run(*given, "--prompts", place / "prompts.txt")
    assert "6 prompts with 1 pictures each do not match the 12 pictures" in result.stderr
    result = run(*given, "--base-pictures", tmp_path / "base")
    assert "has 3 pictures and" in result.stderr
    assert not (tmp_path / "out").exists()


def test_pictures_of_one_prompt_count_once(tiny: Tiny, place: Path, tmp_path: Path) -> None:
    """Three prompts, many pictures: what is said is of three, and so are the intervals."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(["a fox", "an owl", "a bus"]))
    more = ["--prompts", prompts, "--images-per-prompt", 4, "--out", tmp_path / "out", "--json"]
    result = run(*words(tiny, place), *more)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["evaluation"][KID]["pictures"] == 12
    assert any("from 3 pictures" in text or "3 prompts" in text for text in found["cautions"])
    assert len(found["cautions"]) == len(set(found["cautions"]))
    folder = Path(found["folder"])
    given = ["--pictures", folder, "--base-pictures", tmp_path / "out" / "base"]
    again = run(*given, "--real", place / "real", "--out", tmp_path / "two", "--json")
    assert again.exit_code == 0, again.output  # the sheet in there is no picture
    assert json.loads(again.stdout)["scores"][KID] == found["scores"][KID]


def test_one_prompt_is_scored_too(tiny: Tiny, place: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n")
    more = ["--prompts", prompts, "--images-per-prompt", 3, "--out", tmp_path / "out", "--json"]
    result = run(*words(tiny, place), *more)
    assert result.exit_code == 0, result.output


def test_a_list_of_pictures_with_captions(place: Path, tmp_path: Path) -> None:
    rows = [{"file": str(place / "real" / f"{n}.png"), "caption": "x"} for n in range(5)]
    listed = tmp_path / "real.json"
    listed.write_text(json.dumps(rows))
    found = images_in(listed)
    assert (len(found), found.captions[0]) == (5, "x")
    listed.write_text("{}")
    assert run("--pictures", place / "real", "--real", listed).exit_code == 2


def test_a_lora_for_another_base(place: Path, tiny: Tiny) -> None:
    base = Path(__file__).parents[2] / "assets" / "emoji-base"
    arguments = ["--lora", tiny.lora, "--base", base, "--real", place / "real"]
    result = run(*arguments, "--prompts", place / "prompts.txt", "--out", place / "other")
    assert result.exit_code == 2
    assert "use it with the base it was made for" in result.stderr
    assert not (place / "other").exists()
