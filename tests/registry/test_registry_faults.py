"""A real S3 server behind a proxy that loses, doubles, damages and refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from registry.api import Registry, RegistryError, open_registry
from registry.cli import main
from registry.creation import probe
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


def test_the_probe_knows_its_own_writes(loras: Registry, proxy: FaultProxy) -> None:
    """An answer that was lost is no word of the server's."""
    proxy.chosen = [("PUT", "/twice", faults.CUT, 1), ("PUT", "/race", faults.CUT, 3)]
    assert probe(store_of(loras)).found == {"If-None-Match": "holds"}
    assert proxy.done[faults.CUT] == 4


def test_what_a_probe_could_not_find_out_is_not_remembered(
    proxy: FaultProxy, lora: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("registry.s3_client._ATTEMPTS", 2)
    loras = open_registry("s3://loras/nothing_known")
    for fault in (faults.BUSY, faults.LATE, faults.SPOIL_REQUEST):
        proxy.chosen = [("PUT", "/twice", fault, 2)]
        with pytest.raises(RegistryError, match="cannot write objects: the server"):
            loras.push("ink", lora)
        assert not list((tmp_path / "cache").rglob("creation.json"))
    proxy.late = []
    assert loras.push("ink", lora).version == 1
    assert loras.settings.creation == "If-None-Match"


def test_an_upload_is_not_forgotten_by_a_busy_server(
    loras: Registry, proxy: FaultProxy, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.s3_client._ATTEMPTS", 2)
    loras = open_registry(loras.location)
    proxy.chosen = [("PUT", "partNumber=3", faults.BUSY, 2)]
    with pytest.raises(RegistryError, match="SlowDown"):
        loras.push("ink", large)
    (record,) = (store_of(loras).cache.folder / "uploads").iterdir()
    begun = record.read_text()
    proxy.chosen = [("GET", "uploadId=", faults.BUSY, 2)]
    with pytest.raises(RegistryError, match="SlowDown"):
        loras.push("ink", large)
    assert record.read_text() == begun
    proxy.requests.clear()
    assert loras.push("ink", large).version == 1
    assert not record.exists()
    loras.check(loras.resolve("ink"))


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with servers.rclone(tmp_path_factory.mktemp("rclone")) as found:
        yield found


@pytest.fixture
def gateway(
    unconditional: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[FaultProxy]:
    """Before a server that ignores conditions."""
    with fault_proxy(unconditional.endpoint_url, faults={}) as found:
        values = {
            **unconditional.environment,
            "AWS_ENDPOINT_URL_S3": found.endpoint_url,
            "LORA_REGISTRY_CACHE": str(tmp_path / "cache"),
        }
        for key, value in values.items():
            monkeypatch.setenv(key, value)
        yield found


def test_a_write_that_comes_to_pass_later_overwrites_nobody(
    gateway: FaultProxy, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its claim stays until it is too old for that."""
    monkeypatch.setattr("registry.claims._HOLD_SECONDS", 1.0)
    monkeypatch.setattr("registry.claims.CLAIM_SECONDS", 4.0)
    loras = open_registry("s3://loras/late")
    loras.create()
    gateway.chosen = [("PUT", "late/models/ink/versions", faults.LATE, 1000)]
    with pytest.raises(RegistryError, match="may be written all the same, or still be"):
        loras.push("ink", lora, push_id="the late one")
    gateway.chosen = []
    (claim,) = store_of(loras).entries("claims/")
    assert claim.key.startswith("claims/models/ink/versions/00000001.json/")
    rival = open_registry("s3://loras/late")
    waited = []

    def land(parsed: dict[str, str], **_: object) -> None:
        """When the rival has seen the claim, and waits for it."""
        if "claims/" in parsed["Prefix"] and not waited:
            waited.append(1)
            gateway.land()

    store_of(rival)._connected.meta.events.register("after-call.s3.ListObjectsV2", land)
    assert rival.push("ink", lora).version == 2
    (first,) = rival.manifests([("ink", 1)], fresh=True)
    assert first.push_id == "the late one"


def test_a_write_that_was_refused_leaves_no_claim(
    gateway: FaultProxy, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one whose answer came at last."""
    loras = open_registry("s3://loras/refused")
    loras.create()
    gateway.chosen = [("PUT", "refused/models", faults.SKEW, 1)]
    with pytest.raises(RegistryError, match="clock is too far"):
        loras.push("ink", lora)
    assert list(store_of(loras).entries("claims/")) == []
    gateway.chosen = [
        ("PUT", "refused/models", fault, 1)
        for fault in (faults.LATE, faults.BUSY, faults.CUT, faults.SPOIL_REQUEST)
    ]
    assert loras.push("ink", lora).version == 1
    assert list(store_of(loras).entries("claims/")) == []


def test_a_server_that_cannot_encrypt(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    """It says what was asked and what to do, and leaves nothing."""
    monkeypatch.setattr("registry.s3_client._ATTEMPTS", 2)
    result = CliRunner().invoke(
        main, ["init", "--registry", "s3://loras/plain", "--encryption", "AES256"]
    )
    assert result.exit_code == 2
    assert "cannot write objects encrypted with AES256: the server fails" in result.stderr
    assert "set up the server's keys, or leave encryption out" in result.stderr
    assert "nothing was made" in result.stderr
    assert server.client().list_objects_v2(Bucket="loras", Prefix="plain/")["KeyCount"] == 0
    result = CliRunner().invoke(
        main,
        ["init", "--registry", "s3://loras/plain", "--lock", "GOVERNANCE", "--lock-days", "1"],
    )
    assert result.exit_code == 2
    assert "create the bucket with object lock" in result.stderr
    assert "nothing was made" in result.stderr
    assert server.client().list_objects_v2(Bucket="loras", Prefix="plain/")["KeyCount"] == 0
