"""A real S3 server behind a proxy that loses, doubles, damages and refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from registry.api import Registry, RegistryError, open_registry
from registry.s3 import S3Store
from tests.registry import fault_proxy as faults
from tests.registry import servers
from tests.registry.conftest import save_lora
from tests.registry.fault_proxy import FaultProxy, fault_proxy
from tests.registry.servers import Server

_QUICK = (faults.CUT, faults.REPEAT, faults.SPOIL_REQUEST, faults.SPOIL_ANSWER)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with servers.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as found:
        yield found


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultProxy]:
    """Does nothing until it is told to."""
    with fault_proxy(server.endpoint_url, faults={}) as found:
        values = {
            **server.environment,
            "AWS_ENDPOINT_URL_S3": found.endpoint_url,
            "LORA_REGISTRY_CACHE": str(tmp_path / "cache"),
        }
        for key, value in values.items():
            monkeypatch.setenv(key, value)
        yield found


@pytest.fixture
def loras(proxy: FaultProxy, tmp_path: Path) -> Registry:
    own = "".join(c for c in tmp_path.name if c.isalnum() or c == "_")
    registry = open_registry(f"s3://loras/{own}")
    registry.create()
    return registry


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A LoRA of 20 MB, which goes in three parts."""
    path = tmp_path / "large.safetensors"
    weights = np.random.default_rng(1).standard_normal((1250, 4000)).astype(np.float32)
    save_lora(path, weights)
    return path


def store_of(registry: Registry) -> S3Store:
    assert isinstance(registry.store, S3Store)
    return registry.store


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=() if fault in _QUICK else pytest.mark.slow)
        for fault in faults.ALL
    ],
)
def test_each_fault_alone(
    loras: Registry, proxy: FaultProxy, large: Path, tmp_path: Path, fault: str
) -> None:
    """Every fifth request, and still each push is there once and comes back whole."""
    proxy.faults, proxy.share = {fault: 1}, 0.2
    for number in (1, 2, 3):
        assert loras.push("ink", large).version == number
    for number in range(5):
        store_of(loras).cache.blob(loras.resolve("ink").files[0].sha256).unlink(missing_ok=True)
        pulled = loras.pull("ink", tmp_path / str(number))
        assert pulled.read_bytes() == large.read_bytes()
    proxy.faults = {}
    assert loras.versions("ink") == [1, 2, 3]
    assert proxy.done[fault] > 0
    for number in (1, 2, 3):
        loras.check(loras.resolve(f"ink@{number}"))


def test_a_clock_that_is_wrong(loras: Registry, proxy: FaultProxy, lora: Path) -> None:
    proxy.faults, proxy.share = {faults.SKEW: 1}, 1.0
    with pytest.raises(RegistryError, match="clock is too far from the server's; let NTP set it"):
        loras.push("ink", lora)
    proxy.faults = {}
    assert loras.push("ink", lora).version == 1


def test_a_server_that_is_busy_for_good(
    loras: Registry, proxy: FaultProxy, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.s3_client._ATTEMPTS", 2)
    loras = open_registry(loras.location)
    proxy.faults, proxy.share = {faults.BUSY: 1}, 1.0
    with pytest.raises(RegistryError, match=r"the server fails \(SlowDown\); try again later"):
        loras.push("ink", lora)
