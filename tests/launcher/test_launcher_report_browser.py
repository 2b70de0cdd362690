"""The report in a real browser: Chromium, without a window, driven over its debugging pipe."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from launcher.cli import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCRIPT = "<script>document.title='taken'</script>"
WAIT_SECONDS = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]


class Browser:
    """One tab. What it asks for and complains about is kept."""

    def __init__(self, profile: Path):
        here_in, there_out = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in os.pipe())
        there_in, here_out = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in os.pipe())

        def pipes() -> None:
            os.dup2(there_in, 3)
            os.dup2(there_out, 4)

        self.process = subprocess.Popen(
            [
                str(CHROMIUM),
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
                *("--no-first-run", "--disable-background-networking", "--disable-sync"),
                *("--disable-component-update", "--disable-extensions"),
                *("--force-color-profile=srgb", "--hide-scrollbars"),
                *(f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=pipes,
            pass_fds=(3, 4),
            start_new_session=True,
        )
        os.close(there_in)
        os.close(there_out)
        os.set_blocking(here_in, False)
        self._in, self._out, self._rest, self._count = here_in, here_out, b"", 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _message(self) -> dict[str, Any]:
        deadline = time.monotonic() + WAIT_SECONDS
        while b"\0" not in self._rest:
            assert time.monotonic() < deadline, "chromium does not answer"
            assert self.process.poll() is None, "chromium has ended"
            try:
                self._rest += os.read(self._in, 1 << 20)
            except BlockingIOError:
                time.sleep(0.01)
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, path: Path) -> None:
        self.events.clear()
        self.ask("Page.navigate", url=path.absolute().as_uri())
        while not self.named("Page.loadEventFired"):
            self.events.append(self._message())

    def named(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") == method]

    def value(self, expression: str) -> Any:
        """Of JavaScript; that a page forbids scripts to itself does not forbid this."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, path: Path) -> Image.Image:
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))
        return Image.open(path).convert("RGB")

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._in)
        os.close(self._out)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def write_run(run: Path) -> Path:
    """A run with everything; returns its report."""
    attempt = run / "attempt_1"
    attempt.mkdir(parents=True)
    events: list[dict[str, Any]] = []
    for number in range(1, 201):
        event = {"event": "step", "step": number, "steps": 200, "images": 4 * number}
        event |= {"loss": 1 + 1 / number, "learning_rate": 1e-3, "gradient_norm": 0.5}
        events.append({**event, "images_per_second": 20.0, "time": 1.8e9 + number})
        if number % 50 == 0:
            events.append({"event": "validation", "step": number, "loss": 1.0, "time": 1.8e9})
    events.append({"event": "warning", "text": SCRIPT, "time": 1.8e9})
    (attempt / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    result = {"published_step": 100, "steps": 200, "validation_loss": {"base": 2.0, "lora": 1.0}}
    scores = {
        "scores": {
            "kid": {"value": 0.1, "lower": 0.05, "upper": 0.2},
            "kid_base": {"value": 0.3, "lower": 0.2, "upper": 0.4},
        },
        "cautions": [SCRIPT],
    }
    samples = {"prompts": [SCRIPT, "a taco"]}
    files = {"plan.json": {"name": SCRIPT}, "result.json": result, "evaluated.json": scores}
    files["config.yaml"] = {"name": SCRIPT, "samples": samples}  # JSON is YAML
    for name, value in files.items():
        (attempt / name).write_text(json.dumps(value))
    (run / "samples").mkdir()
    for number, colour in ((0, "#ff0000"), (100, "#00ff00"), (200, "#0000ff")):
        Image.new("RGB", (64, 32), colour).save(run / "samples" / f"step_{number:08d}.png")
    done = CliRunner().invoke(main, ["report", str(run)])
    assert done.exit_code == 0, done.output
    return run / "report.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


def count(image: Image.Image, colour: tuple[int, int, int]) -> int:
    return sum(number for number, found in image.getcolors(1 << 24) or [] if found == colour)


def shown_sample(browser: Browser) -> str:
    script = "[...document.querySelectorAll('#samples figure')]"
    script += ".filter(f => f.offsetHeight > 0).map(f => f.textContent).join('|')"
    return str(browser.value(script))


def test_page_loads_with_no_error_and_no_request(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    browser.open(page)
    image = browser.picture(tmp_path / "page.png")
    asked = [event["request"]["url"] for event in browser.named("Network.requestWillBeSent")]
    assert {url for url in asked if not url.startswith("data:")} == {page.absolute().as_uri()}
    said = browser.named("Log.entryAdded") + browser.named("Runtime.consoleAPICalled")
    assert said + browser.named("Runtime.exceptionThrown") == []
    assert browser.value("document.title").startswith(SCRIPT)
    assert browser.value("document.scripts.length") == 1
    assert browser.value(f"document.body.textContent.split({json.dumps(SCRIPT)}).length") >= 5
    for chart in ("loss", "learning-rate", "gradient-norm", "throughput"):
        area = f"document.getElementById('{chart}').getBoundingClientRect()"
        assert browser.value(f"{area}.height") > 100
    path = "document.querySelector('#loss .line.smooth')"
    assert browser.value(f"getComputedStyle({path}).stroke") == "rgb(34, 96, 159)"
    assert count(image, (34, 96, 159)) > 500  # the curve itself
    assert browser.value("document.querySelectorAll('svg.bars rect').length") == 2
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.value(wide) == 0


def test_slider_shows_one_picture_after_the_other(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    browser.open(page)
    assert shown_sample(browser) == "Step 100 – kept"
    image = browser.picture(tmp_path / "one.png")
    assert count(image, (0, 255, 0)) > 10_000
    assert count(image, (255, 0, 0)) == count(image, (0, 0, 255)) == 0
    browser.value("document.getElementById('sample-step').focus()")
    for kind in ("rawKeyDown", "keyUp"):
        key = {"key": "ArrowRight", "code": "ArrowRight", "windowsVirtualKeyCode": 39}
        browser.ask("Input.dispatchKeyEvent", type=kind, **key)
    assert shown_sample(browser) == "Step 200"
    assert count(browser.picture(tmp_path / "two.png"), (0, 0, 255)) > 10_000
    browser.value("document.getElementById('sample-all').click()")
    shown = "Step 0 – before training|Step 100 – kept|Step 200"
    assert shown_sample(browser) == shown


def test_pointer_reads_the_curve(browser: Browser, page: Path) -> None:
    browser.open(page)
    readout = "document.getElementById('loss').closest('figure').querySelector('.readout')"
    area = browser.value(
        "(() => { const svg = document.getElementById('loss'); svg.scrollIntoView();"
        "const a = svg.getBoundingClientRect(); return [a.left, a.top, a.width, a.height] })()"
    )
    left, top, width, height = area
    browser.ask(
        "Input.dispatchMouseEvent", type="mouseMoved", x=left + width / 2, y=top + height / 2
    )
    said = browser.value(f"{readout}.textContent")
    assert said.startswith("step ")
    assert "loss of the step 1.0" in said
    assert "validation loss 1 (step 100)" in said or "step 100:" in said
    browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert browser.value(f"{readout}.textContent") == ""


def test_reading_needs_no_javascript(browser: Browser, page: Path) -> None:
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
    finally:
        # Debugging's own scripts can be run only then; the page's has not been.
        browser.ask("Emulation.setScriptExecutionDisabled", value=False)
    assert shown_sample(browser) == "Step 0 – before training|Step 100 – kept|Step 200"
    assert browser.value("document.querySelector('.slider').offsetHeight") == 0
    assert browser.value("document.querySelector('.prompts').textContent").startswith(SCRIPT)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(browser: Browser, page: Path, tmp_path: Path, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.ask("Emulation.setEmulatedMedia", features=[feature])
    browser.open(page)
    corner = browser.picture(tmp_path / "page.png").getpixel((2, 2))
    assert corner == {"light": (255, 255, 255), "dark": (20, 24, 29)}[scheme]
    browser.ask("Emulation.setEmulatedMedia", features=[])
