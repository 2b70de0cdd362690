"""A run of two ranks, watched by a real Prometheus with the rules and the dashboard of configs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml

from tests.end_to_end.test_main_job import ROOT, short_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MONITORING = ROOT / "configs" / "monitoring"
PACKAGES = ("prometheus", "prometheus-pushgateway")
NOT_ON_CPU = "lora_device_memory"
WAIT_SECONDS = 400


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def until(condition: Callable[[], Any], process: subprocess.Popen[Any], what: str) -> Any:
    """What the condition comes to once it is true."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            if found := condition():
                return found
        except OSError:  # not listening as yet
            pass
        assert process.poll() is None, f"{process.args} has ended"
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)


@pytest.fixture(scope="module", autouse=True)
def programs() -> None:
    if shutil.which("promtool") and shutil.which("prometheus-pushgateway"):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip(f"needs {' and '.join(PACKAGES)}, and nobody here may install them")
    command = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a program, whose output goes to a file; it is ended with the test."""
    with ExitStack() as stack:

        def run(*command: object) -> subprocess.Popen[bytes]:
            words = [str(word) for word in command]
            log = stack.enter_context((tmp_path / f"{Path(words[0]).name}.log").open("ab"))
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            process = subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT, env=environment)

            def end() -> None:
                process.terminate()
                process.wait()

            stack.callback(end)
            return process

        yield run


class Prometheus:
    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}/api/v1"

    def ask(self, path: str, **parameters: str) -> Any:
        with urlopen(f"{self.url}/{path}?{urlencode(parameters)}", timeout=20) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[Any]:
        return list(self.ask("query", query=expression)["result"])

    def firing(self) -> set[str]:
        alerts = self.ask("alerts")["alerts"]
        return {a["labels"]["alertname"] for a in alerts if a["state"] == "firing"}


def test_rules_and_config_are_what_promtool_expects() -> None:
    for command in (
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ):
        done = subprocess.run(
            ["promtool", *command], cwd=MONITORING, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def expressions() -> list[str]:
    board = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [expression.replace("$run", ".*") for expression in found]


def conditions() -> list[str]:
    """Of the alerts, which are silent as long as nothing is wrong."""
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def configured(folder: Path, target: str, gateway: str) -> Path:
    """The scrape config with these targets and a second between scrapes, and with an alert that
    need not wait for ten minutes."""
    text = (MONITORING / "prometheus.yml").read_text()
    text = text.replace("127.0.0.1:9400", target).replace("127.0.0.1:9091", gateway)
    (folder / "prometheus.yml").write_text(text.replace("15s", "1s"))
    rules = (MONITORING / "alerts.yml").read_text()
    assert "lora_last_step_timestamp_seconds > 600" in rules
    (folder / "alerts.yml").write_text(rules.replace("seconds > 600", "seconds > 0"))
    return folder / "prometheus.yml"


def test_prometheus_scrapes_a_run(
    tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    gateway = f"127.0.0.1:{free_port()}"
    pushgateway = start("prometheus-pushgateway", f"--web.listen-address={gateway}")
    until(lambda: urlopen(f"http://{gateway}/-/ready").read(), pushgateway, "the Pushgateway")
    settings = ("images=64000", "save_every=5", "validate_every=320")
    options = ("--metrics-port", "0", "--push-gateway", f"http://{gateway}")
    run = start(
        *(sys.executable, "-m", "launcher.cli", *options),
        *short_run(tmp_path / "run", 2, *settings),
    )
    log = tmp_path / f"{Path(sys.executable).name}.log"

    def url() -> str:
        _, _, rest = log.read_text().partition("metrics at ")
        return rest.split()[0] if "\n" in rest else ""

    endpoint = until(url, run, "the endpoint")
    port = free_port()
    config = configured(tmp_path, endpoint.split("/")[2], gateway)
    server = start(
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    )
    prometheus = Prometheus(port)
    until(lambda: prometheus.query("lora_steps_total{job='lora'} > 25"), run, "25 steps")
    until(lambda: prometheus.query("lora_checkpoint_step"), run, "a checkpoint")
    assert server.poll() is None

    for expression in expressions():
        found = prometheus.query(expression)
        assert found or NOT_ON_CPU in expression, expression
    for expression in conditions():
        prometheus.query(expression)  # an error would be raised
        for name in re.findall(r"\blora_\w+", expression):
            assert prometheus.query(name), name
    ranks = prometheus.query("lora_rank_own_seconds{job='lora'}")
    assert {one["metric"]["rank_id"] for one in ranks} == {"0", "1"}
    until(lambda: "LoraNoProgress" in prometheus.firing(), run, "the alert")

    text = urlopen(endpoint).read()
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")

    run.send_signal(signal.SIGTERM)
    run.wait(WAIT_SECONDS)
    pushed = urlopen(f"http://{gateway}/metrics").read().decode()
    assert 'lora_steps_total{instance="' in pushed
