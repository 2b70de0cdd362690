"""The registry in a bucket of real servers: one that honours conditions, one that ignores them."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from registry.api import Registry, RegistryError, blob_key, open_registry
from registry.creation import probe
from registry.documents import sealed
from registry.s3 import S3Store
from registry.s3_client import make_client, parse_place
from registry.settings import Settings
from tests.registry import servers
from tests.registry.conftest import save_lora
from tests.registry.fault_proxy import fault_proxy
from tests.registry.servers import Server

RUN = uuid.uuid4().hex[:8]
"""So that what an earlier run has left is not met again."""


@pytest.fixture(scope="module")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with servers.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="module")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with servers.rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="module")
def nanio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if sys.version_info < (3, 11):
        pytest.skip("nanio needs Python 3.11")
    with servers.nanio(tmp_path_factory.mktemp("nanio")) as server:
        yield server


@pytest.fixture(scope="module")
def own() -> Server:
    """The server that `make test-s3` names."""
    endpoint_url = os.environ.get("LORA_TEST_S3_ENDPOINT")
    if not endpoint_url:
        pytest.skip("no server is named; see `make test-s3`")
    return Server(servers.OWN, endpoint_url, os.environ["LORA_TEST_S3_BUCKET"])


@pytest.fixture(
    params=[
        "seaweedfs",
        "rclone",
        pytest.param("nanio", marks=pytest.mark.slow),
        pytest.param("own", marks=pytest.mark.slow),
    ]
)
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Registry]:
    """Open a registry at a server, with a cache of the test's own."""

    def begin(server: Server, prefix: str | None = None, **environment: str) -> Registry:
        values = {**server.environment, "LORA_REGISTRY_CACHE": str(tmp_path / "cache")}
        for key, value in {**values, **environment}.items():
            monkeypatch.setenv(key, value)
        own = "".join(c for c in tmp_path.name if c.isalnum() or c == "_")
        folder = "lora-registry-test/" if server.name == servers.OWN else ""
        return open_registry(f"s3://{server.bucket}/{folder}{prefix or own}-{RUN}")

    return begin


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


def test_push_and_pull(
    server: Server, use: Callable[..., Registry], lora: Path, tmp_path: Path
) -> None:
    loras = use(server)
    assert loras.push("ink", lora, metrics={"fid": 3.5}).reference == "ink@1"
    assert loras.push("ink", lora).version == 2
    assert loras.names() == ["ink"]
    assert loras.versions("ink") == [1, 2]
    assert loras.resolve("ink@1").metrics == {"fid": 3.5}
    pulled = loras.pull("ink@1", tmp_path / "out")
    assert pulled.read_bytes() == lora.read_bytes()


def test_large_files_go_in_parts_and_come_in_ranges(
    server: Server, use: Callable[..., Registry], large: Path, tmp_path: Path
) -> None:
    loras, sent, received = use(server), [], []
    manifest = loras.push("ink", large, progress=sent.append)
    assert len(manifest.files[0].chunks) == 3
    assert sum(sent) == sum(file.size for file in manifest.files)
    pulled = loras.pull("ink", tmp_path / "out", progress=received.append)
    assert pulled.read_bytes() == large.read_bytes()
    assert sum(received) == large.stat().st_size


def test_what_was_fetched_is_not_fetched_again(
    seaweedfs: Server, use: Callable[..., Registry], large: Path, tmp_path: Path
) -> None:
    loras = use(seaweedfs)
    entry = loras.push("ink", large).files[0]
    cache = store_of(loras).cache
    part = cache.blob(entry.sha256).with_suffix(".part")
    part.parent.mkdir(parents=True)
    damaged = bytearray(large.read_bytes())
    damaged[9 << 20] ^= 1  # in the second of three
    part.write_bytes(damaged)
    asked = []
    store_of(loras)._client.meta.events.register(
        "before-send.s3.GetObject", lambda request, **_: asked.append(request.headers.get("Range"))
    )
    assert loras.fetch("ink")[0].read_bytes() == large.read_bytes()
    assert [str(range_, "ascii") for range_ in asked if range_] == [
        f"bytes={8 << 20}-{(16 << 20) - 1}"
    ]
    asked.clear()
    assert loras.fetch("ink")[0].read_bytes() == large.read_bytes()
    assert not any(asked)


def test_an_upload_that_was_cut_off_goes_on(
    seaweedfs: Server, use: Callable[..., Registry], large: Path
) -> None:
    loras = use(seaweedfs)
    events = store_of(loras)._client.meta.events
    begun = []

    def fail(params: dict[str, int], **_: object) -> None:
        begun.append(params["PartNumber"])
        if params["PartNumber"] == 3:
            raise KeyboardInterrupt

    events.register("provide-client-params.s3.UploadPart", fail)
    with pytest.raises(KeyboardInterrupt):
        loras.push("ink", large)
    assert loras.names() == []
    events.unregister("provide-client-params.s3.UploadPart", fail)
    sent = []
    events.register(
        "provide-client-params.s3.UploadPart", lambda params, **_: sent.append(params["PartNumber"])
    )
    assert loras.push("ink", large).version == 1
    assert sent == [3]
    assert loras.fetch("ink")[0].read_bytes() == large.read_bytes()


def test_what_the_probe_sees(
    seaweedfs: Server, rclone: Server, use: Callable[..., Registry]
) -> None:
    found = probe(store_of(use(seaweedfs, "probe")))
    assert (found.way, found.found) == ("If-None-Match", {"If-None-Match": "holds"})
    found = probe(store_of(use(rclone, "probe")))
    assert found.way == "claims"
    assert found.found["If-None-Match"] == "ignored"
    assert list(store_of(use(rclone, "probe")).entries("")) == []


def profiles(path: Path, **endpoints: str) -> Path:
    """A config file as of `aws configure`, with a profile for each server."""
    keys = f"aws_access_key_id={servers.ACCESS_KEY}\naws_secret_access_key={servers.SECRET_KEY}"
    sections = (f"[profile {name}]\n{keys}\n{more}\n" for name, more in endpoints.items())
    path.write_text("\n".join(sections))
    return path


def test_servers_of_profiles_are_told_apart(
    seaweedfs: Server,
    rclone: Server,
    use: Callable[..., Registry],
    tmp_path: Path,
    lora: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One location at two servers, which only ~/.aws/config names, and one cache."""
    location, found = use(seaweedfs).location, {}
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    config = profiles(
        tmp_path / "config",
        one=f"endpoint_url={seaweedfs.endpoint_url}",
        two=f"endpoint_url={rclone.endpoint_url}",
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    for profile, server in (("one", seaweedfs), ("two", rclone)):
        monkeypatch.setenv("AWS_PROFILE", profile)
        loras = open_registry(location)
        assert loras.push("ink", lora).version == 1
        found[profile] = loras.settings.creation
        assert store_of(loras).probe()["server"] == server.endpoint_url
        with pytest.raises(RegistryError, match=f"s3://absent/x at {server.endpoint_url[7:]}"):
            store_of(open_registry("s3://absent/x")).now()
    assert found == {"one": "If-None-Match", "two": "claims"}


@pytest.mark.parametrize(
    ("settings", "host"),
    [
        ("", "s3.example.com/loras/"),
        ("s3 =\n  addressing_style = virtual", "loras.s3.example.com/"),
        ("", "loras.oss.aliyuncs.com/"),
        ("s3 =\n  addressing_style = path", "oss.aliyuncs.com/loras/"),
    ],
)
def test_how_a_bucket_is_addressed_can_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, host: str
) -> None:
    config = profiles(tmp_path / "config", own=settings)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "own")
    server = "oss.aliyuncs.com" if "aliyuncs" in host else "s3.example.com"
    client = make_client(parse_place("s3://loras/x", f"http://{server}"))
    url = client.generate_presigned_url("get_object", Params={"Bucket": "loras", "Key": "k"})
    assert url.startswith(f"http://{host}k?")


def test_all_who_write_do_it_in_one_way(
    seaweedfs: Server, rclone: Server, use: Callable[..., Registry], lora: Path, tmp_path: Path
) -> None:
    """That of the registry, if it holds here; or nobody writes."""
    claims = use(seaweedfs, "agreed")
    store_of(claims).put("registry.json", sealed(Settings(creation="claims")))
    asked: list[str] = []
    events = store_of(claims)._connected.meta.events
    events.register(
        "provide-client-params.s3.PutObject", lambda params, **_: asked.append(params["Key"])
    )
    assert claims.push("ink", lora).version == 1
    assert any("/claims/models/ink/versions/" in key for key in asked)
    moved = use(rclone, "agreed")
    store_of(moved).put("registry.json", sealed(Settings(creation="If-None-Match")))
    with pytest.raises(
        RegistryError, match=r"made where If-None-Match keeps .* here it does not \(ignored\)"
    ):
        moved.push("ink", lora)


@pytest.mark.parametrize("header", ["x-obs-forbid-overwrite", "x-oss-forbid-overwrite"])
def test_a_server_with_a_condition_of_its_own(
    seaweedfs: Server, use: Callable[..., Registry], make_lora: Callable[..., Path], header: str
) -> None:
    """As Huawei OBS and Alibaba OSS are said to be: no If-None-Match, but a header that is signed.
    A proxy speaks so, and lets a real server decide."""
    with fault_proxy(seaweedfs.endpoint_url, faults={}) as proxy:
        proxy.own_condition = header
        loras = use(seaweedfs, AWS_ENDPOINT_URL_S3=proxy.endpoint_url)
        found = probe(store_of(loras))
        assert found.way == header
        assert found.found["If-None-Match"].startswith("refused: NotImplemented")
        others = [use(seaweedfs, AWS_ENDPOINT_URL_S3=proxy.endpoint_url) for _ in range(3)]
        files = [make_lora(f"{number}.safetensors", number) for number in range(3)]
        with ThreadPoolExecutor(3) as pool:
            pushed = list(pool.map(lambda other, file: other.push("ink", file), others, files))
        assert sorted(manifest.version for manifest in pushed) == [1, 2, 3]
        assert store_of(loras).put_if_absent("models/ink/versions/00000001.json", b"{}") is False


@pytest.mark.parametrize("size", ["small", "large"])
def test_a_damaged_blob_is_refused(
    seaweedfs: Server,
    use: Callable[..., Registry],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    size: str,
) -> None:
    path: Path = request.getfixturevalue("large" if size == "large" else "lora")
    loras = use(seaweedfs)
    manifest = loras.push("ink", path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    store_of(loras).put(blob_key(manifest.files[0]), bytes(content))
    with pytest.raises(RegistryError, match="push the same file again to repair it"):
        loras.pull("ink", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    loras.push("ink", path)
    assert loras.pull("ink@1", tmp_path / "out").read_bytes() == path.read_bytes()
    loras.check(manifest)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "the secret key does not belong to the access key"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "the server does not know the access key"),
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, "nobody answers there"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials were found"),
        ({"AWS_PROFILE": "absent"}, "the S3 settings are unusable"),
    ],
)
def test_what_keeps_from_the_server(
    seaweedfs: Server,
    use: Callable[..., Registry],
    lora: Path,
    environment: dict[str, str],
    message: str,
) -> None:
    for act in (lambda r: r.push("ink", lora), lambda r: r.versions("ink")):
        with pytest.raises(RegistryError, match=message) as caught:
            act(use(seaweedfs, **environment))
        assert servers.SECRET_KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("location", "endpoint_url"),
    [
        ("https://AKIA:s3c/r3t@host/bucket", None),
        ("s3://AKIA:s3cr3t@bucket/a b", None),
        ("s3://AKIA:s3c/r3t@bucket/a", None),
        ("s3://bucket/a", "http://user:s3cr3t@bad host:99"),
        ("s3://bucket/a", "http://user:s3c/r3t@host:99"),
    ],
)
def test_what_was_given_in_the_wrong_place_is_not_repeated(
    location: str, endpoint_url: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(RegistryError) as caught:
        open_registry(location, endpoint_url=endpoint_url)
    assert not any(word in str(caught.value) for word in ("s3c", "r3t", "AKIA", "user"))
    if endpoint_url:
        config = profiles(tmp_path / "config", own=f"endpoint_url={endpoint_url}")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        monkeypatch.setenv("AWS_PROFILE", "own")
        with pytest.raises(RegistryError) as caught:
            open_registry(location)
        assert not any(word in str(caught.value) for word in ("s3c", "r3t", "user"))


def test_what_killed_writers_leave_is_removed(
    seaweedfs: Server,
    use: Callable[..., Registry],
    large: Path,
    lora: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loras = use(seaweedfs)
    loras.push("ink", lora)
    store = store_of(loras)

    def fail(**_: object) -> None:
        raise KeyboardInterrupt

    store._client.meta.events.register("provide-client-params.s3.UploadPart", fail)
    with pytest.raises(KeyboardInterrupt):
        loras.push("ink", large)
    store._client.meta.events.unregister("provide-client-params.s3.UploadPart", fail)
    for key in ("probe/1/twice", "claims/registry.json/1"):
        store.put(key, b"")
    half = store.cache.blob("ab" * 32).with_suffix(".part")
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    after = store.now() + timedelta(seconds=2)
    assert store.leftovers(after, True) == []  # somebody may be at work
    monkeypatch.setattr("registry.s3.AT_WORK", timedelta(seconds=-2))
    left = [entry.key for entry in store.leftovers(after, False)]
    assert left[:2] == ["probe/1/twice", "claims/registry.json/1"]
    assert left[2].startswith("upload of blobs/sha256/")
    assert len(left) == 3
    assert len(store.leftovers(after, True)) == 3
    assert store.leftovers(after, True) == []
    assert not half.exists()
    assert not any((store.cache.folder / "uploads").iterdir())
    assert loras.push("ink", large).version == 2
    loras.check(loras.resolve("ink"))


def test_no_bucket(
    seaweedfs: Server, use: Callable[..., Registry], lora: Path, tmp_path: Path
) -> None:
    use(seaweedfs)
    absent = open_registry("s3://absent/loras")
    for act in (lambda: absent.push("ink", lora), absent.names, lambda: absent.check_push("ink")):
        with pytest.raises(RegistryError, match="there is no bucket absent; create it"):
            act()


def test_who_may_only_read(
    seaweedfs: Server, use: Callable[..., Registry], lora: Path, tmp_path: Path
) -> None:
    use(seaweedfs).push("ink", lora)
    reader = use(seaweedfs, AWS_ACCESS_KEY_ID="reader")
    assert reader.pull("ink", tmp_path / "out").read_bytes() == lora.read_bytes()
    with pytest.raises(RegistryError, match="no permission to write objects"):
        reader.push("ink", lora)


PUSH_WHEN_TOLD = """
import sys
from registry import claims
from registry.api import open_registry
claims.CLAIM_SECONDS = 20.0  # nobody here is slow, and the one that is killed is waited for
from weights import files  # the slow import comes before the start
location, lora, writer, turns = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
for turn in range(int(turns)):
    manifest = open_registry(location).push("ink", lora, metadata={"writer": writer, "turn": turn})
    print(manifest.version, flush=True)
"""


@pytest.mark.parametrize(
    "killed",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["undisturbed", "one is killed"],
)
def test_racing_pushes_get_different_versions(
    server: Server,
    use: Callable[..., Registry],
    make_lora: Callable[..., Path],
    spawn: Callable[..., subprocess.Popen[str]],
    killed: bool,
) -> None:
    loras, turns = use(server), 3
    writers = [
        spawn(PUSH_WHEN_TOLD, loras.location, make_lora(f"{k // 2}.safetensors", k // 2), k, turns)
        for k in range(5)
    ]
    for process in writers:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
    for process in writers:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    if killed:
        victim = writers.pop()
        assert victim.stdout is not None
        victim.stdout.readline()
        victim.kill()
        victim.wait()
    owners: dict[int, tuple[str, int]] = {}
    for writer, process in enumerate(writers):
        output, errors = process.communicate(timeout=250)
        assert process.returncode == 0, errors
        for turn, version in enumerate(map(int, output.split())):
            assert version not in owners
            owners[version] = (str(writer), turn)
    found = loras.versions("ink")
    assert found == list(range(1, len(found) + 1))
    assert set(owners) <= set(found)
    assert len(found) - len(owners) <= (turns if killed else 0)
    for version, (writer_id, turn) in owners.items():
        manifest = loras.resolve(f"ink@{version}")
        assert manifest.metadata == {"writer": writer_id, "turn": turn}
        loras.check(manifest)
