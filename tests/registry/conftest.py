from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import registry
from registry.api import Registry, open_registry

MakeLora = Callable[..., Path]
Spawn = Callable[..., "subprocess.Popen[str]"]


def save_lora(path: Path, down: np.ndarray, metadata: dict[str, str] | None = None) -> None:
    """A LoRA of one module with this matrix, as a kohya file."""
    module = "lora_unet_mid_block_attentions_0_proj_in"
    up = np.ones((8, len(down)), np.float32)
    tensors = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    save_file(tensors, path, metadata=metadata)


@pytest.fixture
def make_lora(tmp_path: Path) -> MakeLora:
    """Write a small LoRA whose bytes depend on ``seed``."""

    def make(file_name: str = "lora.safetensors", seed: int = 0) -> Path:
        path = tmp_path / file_name
        weights = np.random.default_rng(seed).standard_normal((4, 8)).astype(np.float32)
        save_lora(path, weights, {"format": "np"})
        return path

    return make


@pytest.fixture
def lora(make_lora: MakeLora) -> Path:
    return make_lora()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the registry of the test is; nothing is there yet."""
    return tmp_path / "registry"


@pytest.fixture
def loras(folder: Path) -> Registry:
    """The registry in ``folder``."""
    return open_registry(str(folder))


@pytest.fixture
def damage() -> Callable[[Path], None]:
    """Change the last byte of a file, whose size stays the same."""

    def change(path: Path) -> None:
        path.chmod(0o644)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    return change


@pytest.fixture
def blob(folder: Path) -> Callable[[], Path]:
    """The only LoRA of the registry; the other blobs are cards."""

    def find() -> Path:
        files = [path for path in (folder / "blobs").rglob("*") if path.is_file()]
        (path,) = (path for path in files if not path.read_bytes().startswith(b"---"))
        return path

    return find


@pytest.fixture
def spawn() -> Spawn:
    """Start a Python process that can import this registry."""
    root = str(Path(registry.__file__).parents[1])

    def start(script: str, *arguments: object) -> subprocess.Popen[str]:
        environment = {key: value for key, value in os.environ.items() if key != "LORA_REGISTRY"}
        return subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            env={**environment, "PYTHONPATH": root},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Of a server of the user's own, a table of what holds there (`make test-s3`)."""
    if "LORA_TEST_S3_ENDPOINT" not in os.environ:
        return
    words = {"passed": "holds", "failed": "DOES NOT HOLD", "skipped": "not tried"}
    rows = []
    for outcome, word in words.items():
        for report in terminalreporter.stats.get(outcome, ()):
            test = report.nodeid.rpartition("::")[2].removeprefix("test_")
            test = re.sub(r"\[own-?(.*)\]", lambda case: case[1] and f", {case[1]}", test)
            rows.append((test.replace("_", " "), word))
    width = max((len(test) for test, _ in rows), default=0)
    terminalreporter.section(f"what holds at {os.environ['LORA_TEST_S3_ENDPOINT']}")
    for test, word in sorted(rows):
        terminalreporter.line(f"{test:<{width}}  {word}")
