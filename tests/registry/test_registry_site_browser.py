"""The gallery in a browser, Debian's Chromium: from disk, with JavaScript and without."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from registry.aliases import set_alias
from registry.api import Registry
from registry.cli import main
from registry.states import yank

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "<script>document.title = 'taken'; console.error('taken')</script>"
LOADED = (
    "document.title = `${[...document.images].filter(i => i.complete && i.naturalWidth).length} of "
    "${document.images.length} pictures, ${getComputedStyle(document.body).margin}`;"
)

Browse = Callable[..., tuple[str, str]]


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """The document that a browser makes of an address, and what it logs; in a profile of its own,
    with nothing to be reached but what the test names."""
    if CHROMIUM is None:
        pytest.skip("no chromium; install Debian's package of that name")

    def run(address: str, *options: str, javascript: bool = True) -> tuple[str, str]:
        number = len(list(tmp_path.glob("profile*")))
        if not javascript:  # as a user switches it off; --blink-settings would stop --dump-dom too
            preferences = tmp_path / f"profile{number}/Default/Preferences"
            preferences.parent.mkdir(parents=True)
            off = {"default_content_setting_values": {"javascript": 2}}
            preferences.write_text(json.dumps({"profile": off}))
        net = tmp_path / f"net{number}.json"
        done = subprocess.run(
            [
                *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
                *(
                    "--no-first-run",
                    "--disable-background-networking",
                    "--disable-component-update",
                ),
                *("--disable-sync", f"--user-data-dir={tmp_path / f'profile{number}'}"),
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=10000"),
                *(f"--log-net-log={net}", "--window-size=1280,4000", *options),
                *("--dump-dom", address),
            ],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        own = address[: address.index("/", 8)] + "/"
        assert {url for url in asked_by_pages(net) if not url.startswith(own)} == set()
        logged = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
        return done.stdout, logged

    return run


def asked_by_pages(net_log: Path) -> set[str]:
    """What documents, and not the browser for itself, wanted from a network."""
    events = json.loads(net_log.read_text())["events"]
    return {
        params["url"]
        for params in (event.get("params", {}) for event in events)
        if params.get("initiator", "not an origin") != "not an origin"
        and urlsplit(params.get("url", "")).scheme not in ("", "file", "data", "devtools")
    }


@pytest.fixture
def gallery(loras: Registry, make_lora: Any, tmp_path: Path, folder: Path) -> Path:
    """Pages of three LoRAs, two of them with what tries to get out."""
    sheet = tmp_path / "sheet.png"
    info = PngInfo()
    info.add_itxt("prompt 0", EVIL)
    info.add_itxt("prompt 1", "a fox in ink")
    Image.linear_gradient("L").resize((128, 64)).save(sheet, pnginfo=info)
    scores = {"value": 0.7, "lower": 0.6, "upper": 0.8}
    for number, name in enumerate(("ink", "oil", "paper")):
        loras.push(
            name,
            make_lora(seed=number),
            metrics={"validation_loss": scores, "validation_loss_base": 1.1},
            metadata={
                "base": "sd15" if number else f'">{EVIL}',
                "licence": ("apache-2.0", "mit", "mit")[number],
                "tags": ["style", EVIL] if number else ["style"],
                "trigger_words": [EVIL, f"{name} drawing"],
            },
            samples=[sheet],
            card=f"# {EVIL}",
        )
    set_alias(loras, "ink", "prod", 1, reason=EVIL)
    yank(loras, "paper@1", EVIL)
    out = tmp_path / "site"
    result = CliRunner().invoke(main, ["site", str(out), "--registry", str(folder)])
    assert result.exit_code == 0, result.output
    return out


def colours_of(path: Path) -> int:
    """How many a screenshot has."""
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(1 << 24) or ())


def shown(document: str) -> list[str]:
    """The LoRAs whose cards are not hidden."""
    cards = re.findall(r'<li data-text=.*?<h2><a href="loras/(.*?)\.html">', document, re.DOTALL)
    hidden = re.findall(
        r'<li data-text=[^>]*hidden=""[^>]*>.*?loras/(.*?)\.html', document, re.DOTALL
    )
    return [name for name in sorted(cards) if name not in hidden]


@pytest.mark.parametrize("name", ["index.html", "loras/ink.html", "loras/paper.html"])
def test_pages_load_from_disk_without_an_error(gallery: Path, browse: Browse, name: str) -> None:
    document, logged = browse((gallery / name).as_uri())
    assert logged == ""
    assert "<title>taken" not in document
    assert "&lt;script&gt;document.title" in document
    assert document.count("<script>") == (name == "index.html")
    if name == "index.html":
        assert '<form id="filter" role="search">' in document
        assert shown(document) == ["ink", "oil", "paper"]
        assert ">3 LoRAs</p>" in document


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "index.html",
            ["prod = @1", "apache-2.0", "0.7 <small>(0.6 to 0.8)", "Do not use: &lt;scr"],
        ),
        (
            "loras/ink.html",
            ["pull ink@1", "<li>a fox in ink</li>", "0.6 to 0.8", "set prod: ink@1"],
        ),
    ],
)
def test_pages_are_read_without_javascript(
    gallery: Path, browse: Browse, tmp_path: Path, name: str, words: list[str]
) -> None:
    target = tmp_path / "drawn.png"
    document, logged = browse((gallery / name).as_uri(), f"--screenshot={target}", javascript=False)
    assert logged == ""
    assert colours_of(target) > 100
    for word in words:
        assert word in document
    assert " hidden" not in document.partition("</form>")[2].partition("<script>")[0]
    if name == "index.html":  # what would do nothing is not there
        assert '<form id="filter" role="search" hidden="">' in document
        assert shown(document) == ["ink", "oil", "paper"]


def test_pictures_and_style_are_loaded(gallery: Path, browse: Browse) -> None:
    """A page beside the site's own looks at them: those have no place for a script."""
    for name, count in (("index.html", 3), ("loras/ink.html", 1)):
        page = gallery / name
        probe = page.with_name(f"probe-{page.name}")
        text = re.sub(r"<meta http-equiv.*?>", "", page.read_text()).replace(' loading="lazy"', "")
        probe.write_text(
            text.replace("</body>", f"<script>onload = () => {{{LOADED}}}</script></body>")
        )
        document, _ = browse(probe.as_uri())
        assert f"<title>{count} of {count} pictures, 0px</title>" in document


def test_nothing_is_refused_by_the_policy_of_the_pages(gallery: Path, browse: Browse) -> None:
    """What it would refuse is logged: a script that is not the page's own."""
    page = gallery / "loras/ink.html"
    probe = page.with_name("probe.html")
    bad = f'{EVIL}<img src="http://127.0.0.1:9/x.png"><p style="margin: 5px">'
    probe.write_text(page.read_text().replace("</main>", f"{bad}</p></main>"))
    document, logged = browse(probe.as_uri())
    assert "<title>taken" not in document
    assert logged.count("Content Security Policy") == 3, logged


def test_a_request_to_elsewhere_would_be_seen(browse: Browse, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<img src="https://gallery.invalid/x.png">')
    with pytest.raises(AssertionError, match=r"gallery\.invalid"):
        browse(page.as_uri())


@pytest.mark.parametrize(
    ("action", "names", "count"),
    [
        ("f.words.value = 'OIL draw'", ["oil"], "1 of 3 LoRAs"),
        ("f.words.value = 'nowhere'", [], "0 of 3 LoRAs"),
        ("f.base.value = 'sd15'", ["oil", "paper"], "2 of 3 LoRAs"),
        ("f.licence.value = 'apache-2.0'", ["ink"], "1 of 3 LoRAs"),
        ("f.tag.selectedIndex = 1", ["oil", "paper"], "2 of 3 LoRAs"),
        ("f.words.value = 'paper'; f.licence.value = 'mit'", ["paper"], "1 of 3 LoRAs"),
        ("f.words.value = 'prod'", ["ink"], "1 of 3 LoRAs"),
    ],
)
def test_the_filter(
    gallery: Path, browse: Browse, action: str, names: list[str], count: str
) -> None:
    page = gallery / "index.html"
    acts = (
        f"<script>{{const f = document.getElementById('filter').elements; {action};"
        "f.words.form.dispatchEvent(new Event('input', {bubbles: true}))}</script></body>"
    )
    text = re.sub(r"<meta http-equiv.*?>", "", page.read_text())
    page.with_name("probe.html").write_text(text.replace("</body>", acts))
    document, logged = browse(page.with_name("probe.html").as_uri())
    assert logged == ""
    assert shown(document) == names
    assert f">{count}</p>" in document


@pytest.fixture
def served(gallery: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(gallery))

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["index.html", "loras/ink.html"])
def test_from_a_server_too(served: str, browse: Browse, name: str) -> None:
    document, logged = browse(f"{served}/{name}")
    assert logged == ""
    assert "validation" in document.lower()


def test_a_picture_of_it_can_be_taken(gallery: Path, browse: Browse, tmp_path: Path) -> None:
    """For people: LORA_TEST_SCREENSHOTS names a folder to keep them in."""
    folder = Path(os.environ.get("LORA_TEST_SCREENSHOTS", tmp_path))
    for name in ("index", "loras/ink"):
        target = folder / f"gallery-{Path(name).name}.png"
        browse((gallery / f"{name}.html").as_uri(), f"--screenshot={target}", "--hide-scrollbars")
        assert colours_of(target) > 100
