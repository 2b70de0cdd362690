"""What a version carries beside the LoRA: card, pictures, facts; and how they are seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.numpy import load_file

from registry.aliases import set_alias
from registry.api import Registry, RegistryError, blob_key, open_registry
from registry.cli import main
from registry.states import yank
from tests.registry.conftest import save_lora
from weights import files

HEADER = {
    "ss_network_dim": "16",
    "ss_network_alpha": "8",
    "ss_base_model_version": "sd_v2_v",
    "ss_new_sd_model_hash": "cd" * 32,
    "modelspec.trigger_phrase": "ink emoji",
    "modelspec.license": "apache-2.0",
    "modelspec.resolution": "768x768",
    "modelspec.thumbnail": "data:" + "x" * 1000,
    "unknown": "left out",
}

Invoke = Callable[..., Result]


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """A LoRA whose header tells of it, as kohya's and this project's trainer write it."""
    path = tmp_path / "told.safetensors"
    save_lora(path, np.zeros((4, 8), np.float32), HEADER)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    found = [tmp_path / f"drawn-{k}.png" for k in range(2)]
    for number, path in enumerate(found):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    return found


@pytest.fixture
def invoke(folder: Path) -> Invoke:
    def run(*words: object) -> Result:
        return CliRunner().invoke(main, [*map(str, words), "--registry", str(folder)])

    return run


def told_as(invoke: Invoke, told: Path, pictures: Sequence[Path]) -> None:
    result = invoke(
        *("push", told, "ink", "--trigger", "brush", "--tag", "style", "--tag", "dark"),
        *("--sample", pictures[0], "--sample", pictures[1], "--set", "base=sd21-v"),
    )
    assert result.exit_code == 0, result.stderr


def test_pictures_and_card_are_pulled_if_asked_for(
    invoke: Invoke, told: Path, pictures: list[Path], tmp_path: Path
) -> None:
    told_as(invoke, told, pictures)
    one, all_ = tmp_path / "one", tmp_path / "all"
    assert invoke("pull", "ink", "--out", one).exit_code == 0
    assert [path.name for path in one.iterdir()] == ["ink.safetensors"]
    assert invoke("pull", "ink", "--out", all_, "--all").exit_code == 0
    assert sorted(path.name for path in all_.iterdir()) == [
        "ink.2.png",
        "ink.md",
        "ink.preview.png",
        "ink.safetensors",
    ]
    assert (all_ / "ink.preview.png").read_bytes() == pictures[0].read_bytes()
    assert (all_ / "ink.2.png").read_bytes() == pictures[1].read_bytes()


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_a_report_goes_with_a_version(
    invoke: Invoke,
    told: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    later: bool,
) -> None:
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(tmp_path / "cache"))
    page = tmp_path / "report.html"
    page.write_text("<!DOCTYPE html><title>ink</title>")
    words = ["push", told, "ink", "--report", page, *(["--later"] if later else [])]
    assert invoke(*words).exit_code == 0
    if later:
        assert invoke("sync").exit_code == 0
    assert invoke("pull", "ink", "--out", tmp_path / "out", "--all").exit_code == 0
    assert (tmp_path / "out" / "ink.html").read_bytes() == page.read_bytes()


def test_all_or_nothing_is_pulled(
    loras: Registry,
    told: Path,
    pictures: list[Path],
    tmp_path: Path,
    folder: Path,
    damage: Callable[[Path], None],
) -> None:
    manifest, out = loras.push("ink", told, samples=pictures), tmp_path / "out"
    out.mkdir()
    (out / manifest.files[-1].path).write_text("mine")
    with pytest.raises(RegistryError, match="exists and is not that of"):
        loras.pull("ink", out, everything=True)
    assert [path.name for path in out.iterdir()] == [manifest.files[-1].path]
    damage(folder / blob_key(manifest.files[-1]))
    with pytest.raises(RegistryError, match="is damaged"):
        loras.pull("ink", out, True, everything=True)
    assert [path.name for path in out.iterdir()] == [manifest.files[-1].path]


def test_the_card_says_the_facts_to_people_and_programs(
    invoke: Invoke, told: Path, pictures: list[Path]
) -> None:
    told_as(invoke, told, pictures)
    text = invoke("card", "ink").stdout
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "tags": ["lora", "stable-diffusion", "text-to-image", "style", "dark"],
        "license": "apache-2.0",
        "base_model": "sd21-v",
        "instance_prompt": "brush",
    }
    for words in (
        "Write **brush** into the prompt.",
        "![ink](ink.preview.png) ![ink](ink.2.png)",
        "| base | sd21-v, Stable Diffusion 2.x, predicts v |",
        "| LoRA | rank 16, alpha 8, 768x768 |",
        f"| base's sha256 | {'cd' * 32} |",
    ):
        assert words in body


def test_markup_in_facts_is_text(loras: Registry, told: Path, invoke: Invoke) -> None:
    loras.push("ink", told, metadata={"base": "<script>a|b\n# c</script>"})
    assert "\\<script\\>a\\|b # c\\</script\\>" in invoke("card", "ink").stdout


def test_a_card_of_ones_own_and_its_revisions(invoke: Invoke, told: Path, tmp_path: Path) -> None:
    page = tmp_path / "card.md"
    page.write_text("# mine\n")
    assert invoke("push", told, "ink", "--card", page).exit_code == 0
    assert invoke("card", "ink").stdout == "# mine\n"
    page.write_text("# better\n")
    assert invoke("card", "ink", "--set", page).stdout == "# better\n"
    assert json.loads(invoke("card", "ink@1", "--json").stdout)["card"] == "# better\n"
    assert invoke("verify").exit_code == 0
    page.write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in invoke("card", "ink", "--set", page).stderr
    page.write_text("x" * 200_001)
    assert "200,000 are the most" in invoke("card", "ink", "--set", page).stderr


def test_the_header_is_known_without_being_told(loras: Registry, told: Path) -> None:
    manifest = loras.push("ink", told)
    assert set(manifest.header) == set(HEADER) - {"modelspec.thumbnail", "unknown"}


def test_what_is_said_of_it_is_in_its_header_too(
    invoke: Invoke, loras: Registry, told: Path, tmp_path: Path
) -> None:
    before = told.read_bytes()
    words = ("--trigger", "brush", "--trigger", "ink, wet", "--licence", "mit")
    assert invoke("push", told, "ink", *words).exit_code == 0
    path = loras.pull("ink@1", tmp_path / "out")
    metadata, tensors = files.metadata(path), load_file(path)
    assert metadata["modelspec.trigger_phrase"] == "brush, ink, wet"
    assert metadata["modelspec.license"] == "mit"
    assert {**metadata, **HEADER} == {**files.metadata(told), **HEADER}
    assert all(np.array_equal(tensors[key], value) for key, value in load_file(told).items())
    assert told.read_bytes() == before
    # What it says already leaves its bytes alone.
    assert invoke("push", path, "ink", *words).exit_code == 0
    assert loras.resolve("ink@2").files[0] == loras.resolve("ink@1").files[0]


def test_show_answers_whether_it_can_be_used(
    invoke: Invoke, loras: Registry, told: Path, pictures: list[Path]
) -> None:
    told_as(invoke, told, pictures)
    loras.push(
        "ink", told, metrics={"kid": {"value": 0.3, "lower": 0.2, "upper": 0.4}, "kid_base": 0.5}
    )
    set_alias(loras, "ink", "prod", 1)
    lines = invoke("show", "ink@prod").stdout.splitlines()
    assert lines[0] == "ink@1, prod"
    assert lines[2] == "2 versions; 2 is the newest"
    text = "\n".join(" ".join(line.split()) for line in lines)
    for words in (
        "trigger words brush",
        "licence apache-2.0",
        "base sd21-v, Stable Diffusion 2.x, predicts v",
        "tags style, dark",
        'lora-sample --lora ink@1 --prompt "brush, a lighthouse"',
    ):
        assert words in text
    assert len(lines) < 45
    assert "kid  0.3  0.2 to 0.4  base 0.5" in invoke("show", "ink").stdout
    yank(loras, "ink@1", "wrong set")
    assert "DO NOT USE: wrong set" in invoke("show", "ink@1").stdout
    found = json.loads(invoke("show", "ink@1", "--json").stdout)
    assert (found["aliases"], found["yanked"], found["versions"]) == (["prod"], "wrong set", [1, 2])


def test_list_finds_by_base_trigger_and_tag(
    invoke: Invoke, loras: Registry, told: Path, lora: Path, pictures: list[Path]
) -> None:
    told_as(invoke, told, pictures)
    loras.push("ink", told)
    loras.push("oil", lora, metadata={"base": "sd15", "trigger_words": "oil paint, canvas"})
    set_alias(loras, "ink", "prod", 1)

    def names(*words: str) -> list[Any]:
        found = json.loads(invoke("list", "--json", *words).stdout)
        return [f"{row['name']}@{row['version']}" for row in found]

    assert names() == ["ink@2", "oil@1"]
    assert names("--versions") == ["ink@1", "ink@2", "oil@1"]
    assert names("o*") == ["oil@1"]
    assert names("--base", "SD15") == ["oil@1"]
    assert names("--base", "cdcd", "--versions") == ["ink@1", "ink@2"]
    assert names("--trigger", "canvas") == ["oil@1"]
    assert names("--tag", "dark", "--versions") == ["ink@1"]
    assert names("--tag", "dar") == []
    assert "nothing there fits" in invoke("list", "--tag", "dar").stderr
    row = next(line for line in invoke("list", "--versions").stdout.splitlines() if "prod" in line)
    assert row.split()[:4] == ["ink", "1", "2", "prod"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sample", "absent.png"], "there is no file absent.png to push"),
        (["--sample", "TOLD"], "is no PNG; convert the picture"),
        (["--card", "absent.md"], "cannot read absent.md"),
        (["--evaluation", "TOLD"], "utf-8|is not JSON"),
    ],
)
def test_bad_company(
    invoke: Invoke, told: Path, folder: Path, words: list[str], message: str
) -> None:
    result = invoke("push", told, "ink", *(str(told) if w == "TOLD" else w for w in words))
    assert result.exit_code == 2
    import re

    assert re.search(message, result.stderr), result.stderr
    assert not folder.exists()


def test_copy_takes_everything_along(
    invoke: Invoke, told: Path, pictures: list[Path], tmp_path: Path
) -> None:
    told_as(invoke, told, pictures)
    other = tmp_path / "other"
    assert invoke("copy", "ink@1", other).exit_code == 0
    copied = open_registry(str(other)).resolve("ink")
    assert [file.path for file in copied.files] == [
        "ink.safetensors",
        "ink.md",
        "ink.preview.png",
        "ink.2.png",
    ]
    assert copied.metadata["copied_from"] == {
        "registry": str(tmp_path / "registry"),
        "registry_id": open_registry(str(tmp_path / "registry")).settings.id,
        "version": "ink@1",
    }


def test_push_reads_back_if_told(
    invoke: Invoke, told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    check = Registry.check
    monkeypatch.setattr(
        Registry, "check", lambda self, m: (read.append(m.reference), check(self, m))
    )
    assert invoke("push", told, "ink").exit_code == 0
    assert read == []
    assert invoke("push", told, "ink", "--verify", "full").exit_code == 0
    assert read == ["ink@2"]


def test_a_card_that_is_missing_is_said(
    loras: Registry, told: Path, folder: Path, invoke: Invoke
) -> None:
    manifest = loras.push("ink", told)
    (folder / f"blobs/sha256/{manifest.files[1].sha256[:2]}/{manifest.files[1].sha256}").unlink()
    with pytest.raises(RegistryError, match="a file of ink@1, is missing"):
        loras.check(manifest)
    assert "is missing" in invoke("card", "ink").stderr
