"""The gallery: what its pages say, that they stay text and stay together, and how they are
written."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from click.testing import CliRunner, Result
from moto import mock_aws

from registry import signing, site_output
from registry.aliases import set_alias
from registry.api import Registry, blob_key, open_registry
from registry.cli import main
from registry.gates import promote
from registry.pages import edit
from registry.site_content import look
from registry.site_style import STYLE
from registry.site_text import text
from registry.states import remove, yank

Site = Callable[..., Result]
EVIL = "<script>alert('x')</script>"


def picture(path: Path, size: tuple[int, int] = (8, 4), **texts: str) -> Path:
    """A PNG of its own kind, with texts in it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))]
    for key, words in texts.items():
        key_bytes = key.replace("_", " ").encode()
        parts.append(chunk(b"iTXt", key_bytes + b"\0\0\0\0\0" + words.encode()))
    row = b"\0" + zlib.crc32(path.name.encode()).to_bytes(3 * size[0], "big")
    parts += [chunk(b"IDAT", zlib.compress(row * size[1])), chunk(b"IEND", b"")]
    path.write_bytes(b"".join(parts))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "site"


@pytest.fixture
def site(folder: Path, out: Path) -> Site:
    def run(*words: object, code: int = 0, to: object = None) -> Result:
        arguments = ["site", str(to or out), "--registry", str(folder), *map(str, words)]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == code, (result.output, result.exception)
        return result

    return run


def score(value: float) -> dict[str, float]:
    return {"value": value, "lower": value - 0.02, "upper": value + 0.02}


@pytest.fixture
def filled(loras: Registry, make_lora: Any, tmp_path: Path) -> Registry:
    """Three versions of ink, the first measured otherwise, and one of oil."""
    for number, images in ((1, 20), (2, 40), (3, 40)):
        loras.push(
            "ink",
            make_lora(seed=number),
            metrics={
                "validation_loss": score(0.7 - number / 100),
                "validation_loss_base": score(1.1),
                "kid": score(0.1),
                "kid_difference": {"value": -0.3, "lower": -0.4, "upper": -0.2},
            },
            evaluation={"validation_images": images},
            metadata={
                "base": {"path": "sd15", "digest": "ab" * 32},
                "data": {"digest": "cd" * 32, "examples": 200},
                "licence": "apache-2.0",
                "tags": ["style", "dark"],
                "trigger_words": ["ink emoji"],
                "parent": f"ink@{number - 1}" if number > 1 else None,
            },
            samples=[
                picture(tmp_path / f"ink{number}.png", prompt_0="a fox", prompt_1="a taco"),
                picture(tmp_path / f"second{number}.png"),
            ],
        )
    loras.push("oil", make_lora(seed=9), metadata={"base": "sd21", "tags": "style"})
    set_alias(loras, "ink", "prod", 2, reason="darker")
    return loras


def pages(out: Path) -> dict[str, str]:
    found = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*.html")}
    assert "index.html" in found
    return found


class Reader(HTMLParser):
    """What a page refers to, its ids, its text, and whether its elements nest."""

    VOID = ("meta", "link", "img", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self._seen(tag, attrs)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._seen(tag, attrs)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["script"]:
            self.text += data

    def _seen(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag in ("dt", "dd", "td", "th", "li", "p", "summary"):
            self.text += " "
        for key, value in attrs:
            self.attributes.append(key)
            if key in ("href", "src"):
                self.references.append(value or "")
            if key == "id":
                self.ids.append(value or "")


def test_the_index_has_a_card_for_each(filled: Registry, site: Site, out: Path) -> None:
    site()
    page = pages(out)["index.html"]
    text = " ".join(Reader(page).text.split())
    for words in (
        "2 LoRAs for Stable Diffusion",
        "ink @3 prod = @2",
        "Trigger ink emoji Base sd15 Licence apache-2.0",
        "Validation loss 0.67 (0.65 to 0.69) base 1.1",
        "oil @1",
        "Licence not stated",
    ):
        assert words in text, words
    (image,) = re.findall(r"<img [^>]*>", page)
    assert 'width="8" height="4" alt="a fox; a taco" loading="lazy"' in image
    assert '<option value="sd15">' in page and '<option value="dark">' in page


def test_the_page_of_a_lora_answers_what_one_asks(filled: Registry, site: Site, out: Path) -> None:
    site("--pull-from", "s3://bucket/loras")
    page = pages(out)["loras/ink.html"]
    text = " ".join(Reader(page).text.split())
    manifest = filled.resolve("ink@3")
    for words in (
        "Write ink emoji into the prompt.",
        "newest @3 prod = @2",
        "Licence apache-2.0",
        "lora-registry pull ink@3 --out loras/ --registry s3://bucket/loras",
        "lora-sample --lora ink@3 --prompt 'ink emoji, a lighthouse'",
        f"Base’s sha256 {'ab' * 32}",
        f"Data’s sha256 {'cd' * 32}",
        "Prompts, row by row: a fox a taco",
        "better than the base",
        "set prod: ink@2",
        "darker",
        *(file.sha256 for file in manifest.files),
    ):
        assert words in text, words
    assert '<a href="ink.html#v2">ink@2</a>' in page
    order = re.findall(r'<div id="v(\d)"', page)
    assert order == ["3", "2", "1"]


def test_only_what_was_measured_alike_is_compared(filled: Registry, site: Site, out: Path) -> None:
    site()
    page = pages(out)["loras/ink.html"]
    table = page.partition("<caption>Validation loss")[2].partition("</table>")[0]
    alike, otherwise = table.split("Measured in another way, not to be compared")
    assert re.findall(r">@(\d)<", alike) == ["3", "2"]
    assert "validation_images is 40 for ink@3 and 20 for ink@1" in otherwise
    assert re.findall(r">@(\d)<", otherwise) == ["1"]
    # The same value of the base stands at the same place of a scale, and only there.
    base = re.findall(r'<g class="base">.*?cx="([0-9.]+)"', table)
    assert len(base) == 3 and base[0] == base[1]
    assert len(re.findall('class="scale"', table)) == 2


def test_names_and_words_of_publishers_stay_text(
    loras: Registry, lora: Path, site: Site, out: Path, tmp_path: Path
) -> None:
    facts = {
        "base": f'">{EVIL}',
        "licence": EVIL,
        "tags": [EVIL],
        "trigger_words": [EVIL, "\u202ex"],
    }
    loras.push(
        "ink",
        lora,
        metrics={EVIL: 1.0, f"{EVIL}_base": 2.0},
        evaluation={EVIL: EVIL},
        metadata={**facts, "parent": EVIL, "seed": EVIL, "data": EVIL},
        samples=[picture(tmp_path / "a.png", prompt_0=EVIL, prompt_1='" onload="x')],
        card=f"# {EVIL}\n",
    )
    loras.push("ink", lora, metadata=facts, evaluation={EVIL: 2}, metrics={EVIL: 1.0})
    set_alias(loras, "ink", "prod", 1, reason=EVIL)
    edit(loras, loras.resolve("ink@2"), f"</pre>{EVIL}")
    yank(loras, "ink@1", EVIL)
    site("--title", EVIL, "--pull-from", EVIL)
    for name, page in pages(out).items():
        read = Reader(page)
        assert read.tags.count("script") == (name == "index.html")
        assert EVIL in read.text
        assert not [key for key in read.attributes if key.startswith("on")]
        assert "style" not in read.attributes
        assert "\u202e" not in page
    assert "$(" not in pages(out)["loras/ink.html"].replace("'$(", "")


def test_what_turns_text_around_is_replaced_and_emoji_stay() -> None:
    assert text("a\u202eb\x00\ud800") == "a\ufffdb\ufffd\ufffd"
    assert text("👩\u200d🎤 <é>") == "👩\u200d🎤 &lt;é&gt;"


def test_a_prompt_cannot_run_in_a_shell(loras: Registry, lora: Path, site: Site, out: Path) -> None:
    loras.push("ink", lora, metadata={"trigger_words": ["$(rm -rf ~)' `x`"]})
    site()
    shown = Reader(pages(out)["loras/ink.html"]).text
    assert """--prompt '$(rm -rf ~)'"'"' `x`, a lighthouse'""" in shown


def test_links_are_relative_and_lead_to_what_was_written(
    filled: Registry, site: Site, out: Path
) -> None:
    site()
    found = pages(out)
    reached = set()
    for name, page in found.items():
        for reference in Reader(page).references:
            parts = urlsplit(reference)
            assert not parts.scheme and not parts.netloc, reference
            assert not parts.path.startswith("/")
            path = os.path.normpath(Path(name).parent / parts.path) if parts.path else name
            assert (out / path).is_file(), f"{name}: {reference}"
            reached.add(path)
            if parts.fragment:
                assert parts.fragment in Reader(found[path]).ids, f"{name}: {reference}"
        assert not re.search(r"https?://(?!www\.w3\.org)", page)
        ids = Reader(page).ids
        assert len(ids) == len(set(ids))
    written = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert written - reached == {"site.json"}
    assert "url(" not in STYLE and "@import" not in STYLE


def test_pages_allow_only_what_is_their_own(filled: Registry, site: Site, out: Path) -> None:
    site()
    for name, page in pages(out).items():
        (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
        assert policy.startswith("default-src 'none'; img-src 'self'; style-src 'self'; script-src")
        assert ("'sha256-" in policy) == (name == "index.html")
        assert "unsafe" not in policy


def test_pages_are_read_without_javascript(filled: Registry, site: Site, out: Path) -> None:
    site()
    page = pages(out)["index.html"]
    assert '<form id="filter" role="search" hidden>' in page
    body = page.partition("</form>")[2].partition("<script>")[0]
    assert " hidden" not in body
    assert "<script" not in pages(out)["loras/ink.html"]


def test_pages_are_made_for_everybody(filled: Registry, site: Site, out: Path) -> None:
    site()
    for page in pages(out).values():
        read = Reader(page)
        assert '<html lang="en">' in page and '<meta name="viewport"' in page
        for tag in ("main", "h1", "title"):
            assert read.tags.count(tag) == 1
        assert read.tags.count("table") == read.tags.count("caption")
        assert len(re.findall("<th[ >]", page)) == len(re.findall("<th scope=", page))
        assert len(re.findall("<img ", page)) == len(re.findall('<img [^>]*alt="[^"]+"', page))
        levels = [int(tag[1]) for tag in read.tags if re.fullmatch("h[1-6]", tag)]
        assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))


def test_colours_can_be_told_apart() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one: str, two: str) -> float:
        low, high = sorted((luminance(one), luminance(two)))
        return (high + 0.05) / (low + 0.05)

    schemes = STYLE.split("@media (prefers-color-scheme: dark)")
    for scheme in (schemes[0], schemes[1].partition("*,")[0]):
        colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", scheme))
        for ink in ("ink", "muted", "accent", "other"):
            for paper in ("paper", "card", "well"):
                assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
        for word in ("bad", "good"):
            assert contrast(colours[f"{word}-ink"], colours[f"{word}-paper"]) >= 4.5


def test_a_yanked_version_is_marked(filled: Registry, site: Site, out: Path) -> None:
    yank(filled, "ink@3", "wrong set")
    site()
    page = pages(out)["loras/ink.html"]
    assert "newest @2" in page
    assert "Do not use ink@3.</strong> wrong set" in page
    assert '<strong>ink@3</strong> <span class="badge yanked">yanked</span>' in page
    assert "ink@2 --out" in page and "--force" not in page
    assert "Do not use" not in pages(out)["index.html"]
    yank(filled, "oil@1", "wet")
    site()
    assert "Do not use: wet" in pages(out)["index.html"]
    assert "oil@1 --out loras/ --registry" in pages(out)["loras/oil.html"]
    assert "--force" in pages(out)["loras/oil.html"]


def test_refused_promotions_are_in_the_log(filled: Registry, site: Site, out: Path) -> None:
    from registry.errors import RegistryError

    with pytest.raises(RegistryError):
        promote(filled, "ink@3", "prod", "kid < 0")
    site()
    assert "refuse ink@3 as prod" in Reader(pages(out)["loras/ink.html"]).text


def test_the_newest_versions_and_what_aliases_mean_are_shown(
    loras: Registry, make_lora: Any, site: Site, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 7):
        loras.push("ink", make_lora(seed=number))
    set_alias(loras, "ink", "first", 1)
    read: list[tuple[str, int]] = []
    manifests = Registry.manifests
    monkeypatch.setattr(
        Registry, "manifests", lambda self, asked: (read.extend(asked), manifests(self, asked))[1]
    )
    site("--versions", 2)
    page = pages(out)["loras/ink.html"]
    assert re.findall(r'<div id="v(\d)"', page) == ["6", "5", "1"]
    assert "3 more versions are not shown" in page
    assert sorted(read) == [("ink", 1), ("ink", 5), ("ink", 6)]


def test_a_card_of_ones_own_is_shown_and_a_written_one_is_folded(
    filled: Registry, site: Site, out: Path
) -> None:
    edit(filled, filled.resolve("oil@1"), "---\ntags: [x]\n---\n# Mine & yours\n")
    site()
    oil = pages(out)["loras/oil.html"].partition('<section id="card"')[2]
    assert "<pre># Mine &amp; yours</pre>" in oil and "tags: [x]" not in oil
    assert "<details" not in oil
    assert "Written from the facts above" in pages(out)["loras/ink.html"]


def test_what_the_policy_forbids_is_not_shown(
    filled: Registry, make_lora: Any, site: Site, out: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    key = signing.new_key(tmp_path / "key.pem")
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"keys: {{alice: '{key.public}'}}\npublish: {{'*': [alice]}}\n")
    with monkeypatch.context() as patch:
        patch.setenv(signing.KEY_VARIABLE, str(tmp_path / "key.pem"))
        filled.push("ink", make_lora(seed=20))
    monkeypatch.setenv(signing.POLICY_VARIABLE, str(policy))
    site()
    page = pages(out)["loras/ink.html"]
    assert re.findall(r'<div id="v(\d)"', page) == ["4"]
    assert f"<code>{key.public}</code>" in page
    assert "prod = @2" not in page and "oil" not in pages(out)["index.html"]


def contents(out: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.relative_to(out).as_posix(): (path.read_bytes(), path.stat().st_ino)
        for path in out.rglob("*")
        if path.is_file()
    }


def test_the_same_registry_gives_the_same_bytes(
    filled: Registry, site: Site, out: Path, tmp_path: Path
) -> None:
    site()
    site(to=tmp_path / "other")
    one, two = contents(out), contents(tmp_path / "other")
    assert {k: v[0] for k, v in one.items()} == {k: v[0] for k, v in two.items()}


def test_what_is_there_is_not_written_again(
    filled: Registry, make_lora: Any, site: Site, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = json.loads(site("--json").stdout)
    assert first["index"] == str(out / "index.html")
    assert len(first["written"]) == 11 and first["problems"] == []
    before = contents(out)
    looked: list[str] = []
    monkeypatch.setattr("registry.site_content.look", lambda data: looked.append("x"))
    again = json.loads(site("--json").stdout)
    assert (again["written"], again["unchanged"], looked) == ([], 11, [])
    assert contents(out) == before
    filled.push("oil", make_lora(seed=10))
    changed = json.loads(site("--json").stdout)
    assert changed["written"] == ["index.html", "loras/oil.html"]
    after = contents(out)
    assert {k for k in after if after[k] != before[k]} == {*changed["written"], "site.json"}


def test_what_is_gone_goes(filled: Registry, site: Site, out: Path) -> None:
    site()
    (out / "CNAME").write_text("example.org")  # somebody else's
    remove(filled, "oil@1")
    remove(filled, "ink@1")
    found = json.loads(site("--json").stdout)
    assert "loras/oil.html" in found["removed"] and len(found["removed"]) == 3
    assert not (out / "loras/oil.html").exists()
    assert (out / "CNAME").exists()
    assert 'id="v1"' not in pages(out)["loras/ink.html"]


def test_files_appear_whole_and_a_cut_run_is_made_good(
    filled: Registry, site: Site, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site()
    before = contents(out)
    yank(filled, "oil@1", "wet")
    renamed: list[str] = []
    replace = os.replace

    def broken(source: Any, target: Any) -> None:
        renamed.append(Path(target).name)
        if Path(target).name == "index.html":
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(site_output.os, "replace", broken)
        result = site(code=2)
    assert result.stderr.startswith("error: cannot write index.html into")
    assert len(result.stderr.splitlines()) == 1
    assert renamed == ["site.json", "oil.html", "index.html"]  # the index after what it links to
    assert contents(out)["index.html"] == before["index.html"]
    assert not list(out.rglob(".*.tmp"))
    assert json.loads(site("--json").stdout)["written"] == ["index.html", "loras/oil.html"]
    assert json.loads(site("--json").stdout)["written"] == []


def test_an_empty_registry(loras: Registry, site: Site, out: Path) -> None:
    loras.create()
    site()
    assert "Nothing has been pushed to" in pages(out)["index.html"]
    assert list(pages(out)) == ["index.html"]


def blob_of(registry: Registry, folder: Path, reference: str, name: str) -> Path:
    entry = next(e for e in registry.resolve(reference).files if e.path == name)
    return folder / blob_key(entry)


def test_a_missing_or_damaged_file_is_said(
    filled: Registry, site: Site, out: Path, folder: Path, damage: Callable[[Path], None]
) -> None:
    blob_of(filled, folder, "ink@3", "ink.preview.png").unlink()
    damage(blob_of(filled, folder, "ink@2", "ink.2.png"))
    damage(blob_of(filled, folder, "ink@3", "ink.md"))
    result = site(code=1)
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    remedy = f"push the same file again to {folder} to repair it"
    assert warnings == [
        f"warning: ink.md of ink@3 is damaged in the registry; {remedy}",
        f"warning: ink.2.png of ink@2 is damaged in the registry; {remedy}",
        f"warning: ink.preview.png of ink@3 is missing from the registry; {remedy}",
    ]
    page = pages(out)["loras/ink.html"]
    assert f"ink.2.png of ink@2 is damaged in the registry; {remedy}" in page
    assert "ink.preview.png of ink@3 is missing" in page
    found = json.loads(site("--json", code=1).stdout)
    assert found["written"] == [] and len(found["problems"]) == 3


def test_a_picture_that_is_none_is_said(
    loras: Registry, lora: Path, site: Site, out: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\nand nothing else that is a picture")
    loras.push("ink", lora, samples=[bad])
    assert "ink.preview.png of ink@1 is no PNG; push it with another" in site(code=1).stderr
    assert "no picture" in pages(out)["index.html"]
    assert not (out / "pictures").exists()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            lambda out: (out.mkdir(), (out / "thesis.txt").touch()),
            "is not empty and has no site.js",
        ),
        (lambda out: out.touch(), "is a file, and a site goes to a folder"),
        (lambda out: (out.mkdir(), (out / "site.json").write_text("{")), "is no record of a site"),
        (
            lambda out: (
                out.mkdir(),
                (out / "site.json").write_text('{"files": {"../../etc/passwd": null}}'),
            ),
            "is no record of a site",
        ),
    ],
)
def test_something_else_is_there(
    filled: Registry, site: Site, out: Path, prepare: Callable[[Path], object], message: str
) -> None:
    prepare(out)
    result = site(code=2)
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not list(out.rglob("*.html"))


def test_bad_places(site: Site, out: Path, folder: Path, lora: Path, loras: Registry) -> None:
    assert "there is no registry at" in site(code=2).stderr
    assert not out.exists()
    loras.push("ink", lora)
    assert "ftp://x is neither" in site(code=2, to="ftp://x").stderr
    assert "is not empty" in site(code=2, to=folder).stderr
    assert "--versions" in site("--versions", 0, code=2).stderr


def test_an_unreadable_manifest_leaves_the_site_as_it_was(
    filled: Registry, site: Site, out: Path, folder: Path, damage: Callable[[Path], None]
) -> None:
    site()
    before = contents(out)
    damage(folder / "models/ink/versions/00000002.json")
    assert "is not a manifest" in site(code=2).stderr
    assert contents(out) == before


def test_what_pictures_say(tmp_path: Path) -> None:
    web = picture(
        tmp_path / "a.png", (64, 32), parameters="a fox\nin ink\nNegative prompt: blue\nSteps: 2"
    )
    assert look(web.read_bytes()).model_dump() == {
        "width": 64,
        "height": 32,
        "captions": ("a fox in ink",),
    }
    many = {f"prompt_{k}": "x" * 1000 for k in range(40)}
    found = look(picture(tmp_path / "b.png", **many).read_bytes())
    assert len(found.captions) == 16 and {len(text) for text in found.captions} == {401}
    data = web.read_bytes()
    for cut in range(0, len(data), 7):  # cut off anywhere
        try:
            look(data[:cut])
        except ValueError as error:
            assert cut < 33, error


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[boto3.client]:
    """S3 in this process."""
    for key, value in {
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_REGION": "us-east-1",
        "LORA_REGISTRY_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(key, value)
    with mock_aws():
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="loras")
        yield client


def test_into_a_bucket(
    filled: Registry, site: Site, aws: boto3.client, tmp_path: Path, out: Path
) -> None:
    found = json.loads(site("--json", to="s3://loras/gallery").stdout)
    assert found["index"] == "s3://loras/gallery/index.html"
    site()
    types = {}
    for path in found["written"]:
        stored = aws.get_object(Bucket="loras", Key=f"gallery/{path}")
        assert stored["Body"].read() == (out / path).read_bytes()
        types[Path(path).suffix] = (stored["ContentType"], stored["CacheControl"])
    assert types == {
        ".html": ("text/html; charset=utf-8", "no-cache"),
        ".css": ("text/css; charset=utf-8", "no-cache"),
        ".svg": ("image/svg+xml", "no-cache"),
        ".png": ("image/png", "public, max-age=31536000, immutable"),
    }
    assert json.loads(site("--json", to="s3://loras/gallery").stdout)["written"] == []
    remove(filled, "oil@1")
    again = json.loads(site("--json", to="s3://loras/gallery").stdout)
    assert again["removed"] == ["loras/oil.html"] and again["written"] == ["index.html"]
    assert "there is no bucket absent" in site(to="s3://absent/x", code=2).stderr


def test_a_registry_in_a_bucket(
    aws: boto3.client, lora: Path, out: Path, tmp_path: Path, site: Site
) -> None:
    loras = open_registry("s3://loras/registry")
    manifest = loras.push("ink", lora, samples=[picture(tmp_path / "a.png")])
    run = ["site", str(out), "--registry", "s3://loras/registry"]
    result = CliRunner().invoke(main, run)
    assert result.exit_code == 0, result.output
    assert "--registry s3://loras/registry" in pages(out)["loras/ink.html"]
    assert len(list(out.glob("pictures/*.png"))) == 1
    # Beside the registry, and not into it.
    assert "is not empty" in CliRunner().invoke(main, ["site", run[3], *run[2:]]).stderr
    # A damaged blob in the bucket, and nothing in the cache.
    entry = manifest.files[2]
    aws.put_object(Bucket="loras", Key=f"registry/{blob_key(entry)}", Body=bytes(entry.size))
    (tmp_path / "cache/blobs" / entry.sha256[:2] / entry.sha256).unlink()
    result = CliRunner().invoke(main, ["site", str(tmp_path / "new"), *run[2:]])
    assert result.exit_code == 1
    assert "ink.preview.png of ink@1 is damaged in the registry" in result.stderr
