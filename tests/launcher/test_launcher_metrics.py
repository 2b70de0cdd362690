"""The endpoint of a run: its series, who is let in, and what it does not let through."""

from __future__ import annotations

import http.client
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request as HTTPRequest
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster import tls
from launcher.endpoint import served
from launcher.errors import LaunchError
from launcher.job import Job, prepare, write
from launcher.metrics import Course, text_of
from launcher.observe import observed
from launcher.request import Request, Scraping

STEP = {
    "event": "step",
    "step": 3,
    "steps": 10,
    "images": 12,
    "loss": 0.5,
    "gradient_norm": 0.1,
    "learning_rate": 1e-4,
    "loss_scale": 1.0,
    "skipped": True,
    "images_per_second": 7.5,
    "time": 1000.0,
}


@pytest.fixture
def job(config: Path) -> Job:
    job = prepare(Request(config, device_target="CPU"), datetime(2025, 1, 2))
    write(job)
    return job


@pytest.fixture
def course(job: Job) -> Course:
    course = Course("tiny", job.plan, job.attempt, range(2))
    for event in (
        {"event": "phase", "phase": "encoding images"},
        {"event": "cache", "kind": "images", "done": 3, "total": 4, "seconds": 1.0},
        {"event": "validation", "step": 0, "loss": 0.9, "quarters": []},
        {"event": "compiled", "step": 1, "seconds": 12.5},
        {"event": "phase", "phase": "training"},
        STEP,
        {"event": "checkpoint", "step": 3, "bytes": 9, "seconds": 0.1, "time": 1234.5},
        {"event": "validation", "step": 3, "loss": float("nan"), "quarters": []},
    ):
        course.take(event)
    return course


def series(text: bytes) -> dict[str, float]:
    """Values by name and labels."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "run")
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_the_series_of_a_run(course: Course) -> None:
    found = series(text_of(course))
    assert found["lora_steps_total"] == 3
    assert found["lora_images_total"] == 12
    assert found["lora_epochs"] == 3
    assert found["lora_loss"] == found["lora_smoothed_loss"] == 0.5
    assert found["lora_best_validation_loss"] == 0.9
    assert found["lora_skipped_steps_total"] == 1
    assert found["lora_compile_seconds_total"] == 12.5
    assert found["lora_checkpoint_step"] == 3
    assert found["lora_checkpoint_timestamp_seconds"] == 1234.5
    assert found["lora_cache_filled_ratio{kind=images}"] == 0.75
    assert found["lora_phase{phase=training}"] == 1
    assert found["lora_phase{phase=compiling}"] == 0
    assert {"lora_rank_age_seconds{rank_id=0}", "lora_rank_age_seconds{rank_id=1}"} <= set(found)
    assert found["lora_ranks_agree"] == 1


def test_every_series_has_a_help_text_and_the_label_of_the_run(course: Course) -> None:
    for family in text_string_to_metric_families(text_of(course).decode()):
        assert family.documentation.endswith(".")
        assert family.name.startswith("lora_")
        if family.name != "lora_build_info":
            assert all(sample.labels["run"] == "tiny" for sample in family.samples)


def test_a_rank_measures_where_the_launcher_reads(job: Job, spawn_rank: Callable[..., Any]) -> None:
    for rank_id in (0, 1):
        spawn_rank(job.start.environment["PROMETHEUS_MULTIPROC_DIR"], rank_id)
    found = series(text_of(Course("tiny", job.plan, job.attempt, range(2))))
    for rank_id in (0, 1):
        labels = f"part=step,rank_id={rank_id}"
        assert found[f"lora_step_seconds_count{{{labels}}}"] == 3
        assert found[f"lora_step_seconds_sum{{{labels}}}"] == pytest.approx(0.6 + 3 * rank_id)
        assert found[f"lora_memory_bytes{{rank_id={rank_id}}}"] > 1e6


@pytest.fixture
def spawn_rank() -> Callable[[str, int], None]:
    """A process that measures three steps."""
    import os
    import sys

    script = (
        "import sys; from trainer.telemetry import Telemetry\n"
        "one = Telemetry('tiny', int(sys.argv[1]))\n"
        "for n in range(3): one.took('step', 0.2 + int(sys.argv[1]))\n"
        "one.look()"
    )

    def run(folder: str, rank_id: int) -> None:
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": folder, "PYTHONPATH": root}
        subprocess.run([sys.executable, "-c", script, str(rank_id)], env=environment, check=True)

    return run


@pytest.fixture
def endpoint() -> Iterator[str]:
    with served(lambda: b"lora_steps_total 1\n", lambda: False, token="secret") as url:
        yield url


def get(url: str, **headers: str) -> tuple[int, bytes]:
    try:
        with urlopen(HTTPRequest(url, headers=headers), timeout=20) as answer:
            return answer.status, answer.read()
    except HTTPError as error:
        return error.code, error.read()


def test_who_is_let_in(endpoint: str) -> None:
    assert get(endpoint)[0] == 401
    assert get(endpoint, Authorization="Bearer wrong")[0] == 401
    assert get(endpoint, Authorization="Bearer secret") == (200, b"lora_steps_total 1\n")
    root = endpoint.removesuffix("/metrics")
    assert get(f"{root}/healthz") == (200, b"ok\n")
    assert get(f"{root}/readyz")[0] == 503
    assert get(f"{root}/etc/passwd")[0] == 404


def test_who_speaks_no_http_or_does_not_read_holds_nobody_up(endpoint: str) -> None:
    port = int(endpoint.rpartition(":")[2].removesuffix("/metrics"))
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    for number, one in enumerate(silent):
        one.sendall(
            b"\x16\x03\x01 nonsense\r\n\r\n" if number % 2 else b"GET /metrics HTTP/1.1\r\n"
        )
    assert get(endpoint, Authorization="Bearer secret")[0] == 200
    for one in silent:
        one.close()


def test_many_scrapes_at_once(endpoint: str) -> None:
    codes: list[int] = []

    def scrape() -> None:
        for _ in range(20):
            codes.append(get(endpoint, Authorization="Bearer secret")[0])

    threads = [threading.Thread(target=scrape) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(codes) == 160
    assert set(codes) <= {200, 503}
    assert codes.count(200) > 100


def test_over_tls(tmp_path: Path) -> None:
    tls.make(tmp_path / "tls", datetime.now(timezone.utc))
    command = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
        *("-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")),
        *("-subj", "/CN=localhost"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    with served(
        lambda: b"x 1\n",
        lambda: True,
        certificate=tmp_path / "cert.pem",
        key=tmp_path / "key.pem",
    ) as url:
        assert url.startswith("https://")
        port = int(url.rpartition(":")[2].removesuffix("/metrics"))
        with socket.create_connection(("127.0.0.1", port)):  # says nothing at all
            context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
            context.check_hostname = False
            connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=20)
            connection.request("GET", "/readyz")
            assert connection.getresponse().status == 200
    missing = served(lambda: b"", lambda: True, certificate=tmp_path / "none.pem")
    with pytest.raises(LaunchError, match="--metrics-certificate"), missing:
        pass


def test_a_port_that_is_taken() -> None:
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with observed(Scraping(port), said.append):
            pass
        assert said[0].startswith(f"warning: --metrics-port {port}: cannot listen on 127.0.0.1")
        assert said[0].endswith("training goes on without")
        required = observed(Scraping(port, required=True), said.append)
        with pytest.raises(LaunchError, match=f"--metrics-port {port}"), required:
            pass


def test_a_token_that_cannot_be_read(tmp_path: Path) -> None:
    token = tmp_path / "token"
    for content in (None, b"", b"\xff\xfe"):
        if content is not None:
            token.write_bytes(content)
        required = observed(Scraping(0, token_file=token, required=True), print)
        with pytest.raises(LaunchError, match="--metrics-token-file"), required:
            pass


def test_metrics_are_sent_to_a_gateway_at_the_end(job: Job, course: Course) -> None:
    got: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    said: list[str] = []
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        with observed(Scraping(push_gateway=url), said.append) as observer:
            observer.course = course
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    ((path, body),) = got
    assert path.startswith("/metrics/job/lora-launch/")
    assert b"lora_steps_total" in body
    assert not said


def test_a_gateway_that_is_not_there_is_a_warning_without_secrets(course: Course) -> None:
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    url = f"http://user:s3cret@127.0.0.1:{port}"
    with observed(Scraping(push_gateway=url), said.append) as observer:
        observer.course = course
    assert len(said) == 1
    assert f"the Pushgateway at 127.0.0.1:{port} does not take metrics" in said[0]
    assert "s3cret" not in said[0]


@pytest.mark.parametrize("content", [b"", b"\x10", b"\xff" * 64, b"\x40\x00\x00\x00" + b"x" * 60])
def test_a_file_that_a_killed_rank_has_left_is_in_nobodys_way(
    course: Course, job: Job, spawn_rank: Callable[..., Any], content: bytes
) -> None:
    folder = Path(job.start.environment["PROMETHEUS_MULTIPROC_DIR"])
    spawn_rank(str(folder), 1)
    (folder / "histogram_1.db").write_bytes(content)
    found = series(text_of(course))
    assert found["lora_steps_total"] == 3
