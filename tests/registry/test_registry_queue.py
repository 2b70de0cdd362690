"""Pushes that wait, reading without a server, and LoRAs of other tools."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from moto import mock_aws
from PIL import Image
from safetensors.numpy import load_file, save_file

from registry import queue
from registry.api import Manifest, Registry, RegistryError, open_registry
from registry.cache import Cache
from registry.cli import main
from registry.s3 import S3Store
from registry.upkeep import collect

Invoke = Callable[..., Result]
OFFLINE = {"LORA_REGISTRY_OFFLINE": "1"}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("LORA_REGISTRY_CACHE", str(path))
    return path


@pytest.fixture
def invoke(folder: Path) -> Invoke:
    def run(*words: object) -> Result:
        return CliRunner().invoke(main, [*map(str, words), "--registry", str(folder)])

    return run


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A registry's place in S3 in this process."""
    import boto3

    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        boto3.client("s3").create_bucket(Bucket="loras")
        yield "s3://loras/x"


def test_a_push_waits_and_is_sent(invoke: Invoke, lora: Path, folder: Path, cache: Path) -> None:
    result = invoke("push", lora, "ink", "--later", "--trigger", "brush")
    assert result.exit_code == 0, result.stderr
    assert "send it with: lora-registry sync" in result.stderr
    assert not folder.exists()
    tensors = load_file(lora)
    lora.unlink()  # a copy waits
    another = CliRunner().invoke(main, ["sync", "--registry", str(folder.parent / "another")])
    assert "nothing waits for" in another.stderr
    assert invoke("sync").stdout == "ink@1\n"
    manifest = open_registry(str(folder)).resolve("ink@1")
    assert manifest.metadata == {"trigger_words": ["brush"]}
    sent = load_file(open_registry(str(folder)).fetch("ink")[0])
    assert all(np.array_equal(sent[key], value) for key, value in tensors.items())
    assert "nothing waits for" in invoke("sync").stderr
    assert not any((cache / "queue").iterdir())


def test_a_sync_that_was_cut_off_publishes_once(
    invoke: Invoke, lora: Path, folder: Path, loras: Registry
) -> None:
    assert invoke("push", lora, "ink", "--later").exit_code == 0
    assert invoke("push", lora, "ink", "--later").exit_code == 0
    (first, _), _ = queue.waiting(loras)
    assert queue.send(loras, first).reference == "ink@1"  # and ended before it was taken away
    assert json.loads(invoke("sync", "--json").stdout) == ["ink@1", "ink@2"]
    assert loras.versions("ink") == [1, 2]


SYNC_WHEN_TOLD = """
import sys
from registry.cache import Cache
from registry.cli import main
from weights import files  # the slow import comes before the start
print("ready", flush=True)
sys.stdin.readline()
main(["sync", "--registry", sys.argv[1]])
"""


def test_two_syncs_at_once_publish_once(
    invoke: Invoke,
    make_lora: Callable[..., Path],
    folder: Path,
    loras: Registry,
    spawn: Callable[..., subprocess.Popen[str]],
) -> None:
    for seed in range(6):
        assert invoke("push", make_lora(seed=seed), "ink", "--later").exit_code == 0
    syncs = [spawn(SYNC_WHEN_TOLD, folder) for _ in range(3)]
    for process in syncs:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in syncs:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said: list[str] = []
    for process in syncs:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        said += output.split()
    expected = [f"ink@{number}" for number in range(1, 7)]
    assert sorted(said) == expected
    assert len({m.push_id for m in loras.manifests([("ink", n) for n in range(1, 7)])}) == 6
    assert loras.versions("ink") == [1, 2, 3, 4, 5, 6]


def test_one_push_is_sent_by_one_at_a_time(invoke: Invoke, lora: Path, loras: Registry) -> None:
    """The second waits, and finds what the first has published."""
    assert invoke("push", lora, "ink", "--later").exit_code == 0
    ((waits, _),) = queue.waiting(loras)
    second: list[Future[Manifest]] = []
    with ThreadPoolExecutor(1) as pool:

        def begin(_: int) -> None:
            if not second:
                second.append(pool.submit(queue.send, open_registry(loras.location), waits))

        assert queue.send(loras, waits, begin).reference == "ink@1"
        assert second[0].result().reference == "ink@1"
    assert loras.versions("ink") == [1]


def test_a_push_waits_for_the_folder_that_was_meant(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = CliRunner()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run.invoke(main, ["push", str(lora), "ink", "--later", "--registry", "r"]).exit_code == 0
    monkeypatch.chdir(tmp_path / "there")
    assert (
        "; 1 wait for others, see sync --list"
        in run.invoke(main, ["sync", "--registry", "r"]).stderr
    )
    found = json.loads(run.invoke(main, ["sync", "--list", "--json"]).stdout)
    assert [row["to"] for row in found] == [str(tmp_path / "here" / "r")]
    monkeypatch.chdir(tmp_path)
    assert run.invoke(main, ["sync", "--registry", "./here/r"]).stdout == "ink@1\n"
    assert not (tmp_path / "there" / "r").exists()


def test_a_push_waits_for_the_server_that_was_meant(
    lora: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """Nobody is asked: neither server is there."""
    run, push = CliRunner(), ["push", str(lora), "ink", "--later", "--registry", "s3://loras/x"]
    for word in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(word, "any")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://one.invalid")
    assert run.invoke(main, push).exit_code == 0
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://two.invalid")
    result = run.invoke(main, ["sync", "--registry", "s3://loras/x"])
    assert "nothing waits for s3://loras/x at two.invalid; 1 wait for others" in result.stderr


def test_a_push_that_is_not_taken_does_not_keep_the_others(
    invoke: Invoke, lora: Path, cache: Path
) -> None:
    for name in ("ink", "oil", "pen", "dry"):
        assert invoke("push", lora, name, "--later").exit_code == 0
    bad, gone, _, dry = sorted((cache / "queue").iterdir())
    (bad / "push.json").write_text("{}")
    (gone / lora.name).unlink()
    result = invoke("sync")
    assert result.stdout == "pen@1\ndry@1\n"
    assert f"{bad.name}: {bad} holds no push of this program" in result.stderr
    assert f"{gone.name}: there is no file" in result.stderr
    assert "2 of 4 pushes wait on" in result.stderr
    assert result.exit_code == 2
    assert [line.split()[0] for line in invoke("sync", "--list").stdout.splitlines()] == [
        bad.name,
        gone.name,
    ]
    assert f"no push {dry.name} waits" in invoke("sync", "--drop", dry.name).stderr
    assert "nothing waits" in invoke("sync", "--drop", bad.name, "--drop", gone.name).stderr
    assert not any((cache / "queue").iterdir())


def test_what_could_never_be_pushed_does_not_wait(invoke: Invoke, tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_text("no weights")
    assert invoke("push", bad, "ink", "--later").exit_code == 2
    assert "nothing waits for" in invoke("sync").stderr


def test_a_push_that_cannot_be_sent_goes_on_waiting(
    invoke: Invoke, lora: Path, folder: Path
) -> None:
    assert invoke("push", lora, "ink", "--later").exit_code == 0
    folder.mkdir()
    (folder / "stray").write_text("")
    assert "is not a registry" in invoke("sync").stderr
    (folder / "stray").unlink()
    assert invoke("sync").stdout == "ink@1\n"


def test_offline_gives_what_was_seen(bucket: str, lora: Path, tmp_path: Path) -> None:
    loras = open_registry(bucket)
    loras.push("ink", lora)
    loras.push("oil", lora)
    loras.pull("ink", tmp_path / "out")
    loras.models()
    away = open_registry(bucket, offline=True)
    assert away.names() == ["ink", "oil"]
    assert away.pull("ink@1", tmp_path / "again").read_bytes() == lora.read_bytes()
    with pytest.raises(RegistryError, match="is not asked offline; leave --offline"):
        away.push("ink", lora)
    with pytest.raises(RegistryError, match="is not in the cache"):
        away.file(away.resolve("oil"), away.resolve("oil").files[1])
    with pytest.raises(RegistryError, match="does not have anything of s3://loras/y at"):
        open_registry("s3://loras/y", offline=True).names()


def test_offline_no_request_is_made(bucket: str, lora: Path, cache: Path) -> None:
    """Of what tells something, nothing is made up either: the probe would."""
    open_registry(bucket).push("ink", lora)
    away = open_registry(bucket, offline=True)
    probes = sorted(cache.rglob("creation.json"))
    manifest, store = away.resolve("ink"), away.store
    assert isinstance(store, S3Store)
    asked: list[object] = []
    store._connected.meta.events.register("before-send.s3", lambda **_: asked.append(1))
    acts: list[Callable[[], object]] = [
        *(store.probe, store.now),
        *(lambda: store.digest("registry.json"), lambda: store.size("registry.json")),
        *(lambda: store.delete("registry.json"), lambda: store.put_if_absent("models/x", b"")),
        *(lambda: away.check(manifest), lambda: away.push("oil", lora)),
        *(lambda: collect(away), lambda: store.leftovers(manifest.created, True)),
    ]
    for act in acts:
        with pytest.raises(RegistryError, match=f"needs the server of {bucket}, which is not"):
            act()
    for command in ("doctor", "gc"):
        result = CliRunner().invoke(main, [command, "--registry", bucket], env=OFFLINE)
        assert result.exit_code == 2
        assert "which is not asked offline" in result.stderr
    assert not asked
    assert sorted(cache.rglob("creation.json")) == probes


def test_list_offline_says_that_nothing_is_in_the_cache(bucket: str, cache: Path) -> None:
    result = CliRunner().invoke(main, ["list", "--registry", bucket], env=OFFLINE)
    assert result.exit_code == 2
    assert f"the cache {cache} does not have anything of {bucket} at " in result.stderr
    assert "ask for it once without --offline" in result.stderr


def test_documents_are_read_once(bucket: str, lora: Path) -> None:
    loras = open_registry(bucket)
    for _ in range(3):
        loras.push("ink", lora)
    asked: list[str] = []

    def count(again: Registry) -> Registry:
        events = again.store._client.meta.events  # type: ignore[attr-defined]
        events.register("before-send.s3", lambda request, **_: asked.append(request.method))
        return again

    assert count(open_registry(bucket)).resolve("ink@2").version == 2
    assert asked == ["GET", "GET", "GET"]  # the settings twice, one listing, no manifest


def test_doctor_tells_what_it_tried(bucket: str) -> None:
    result = CliRunner().invoke(main, ["doctor", "--registry", bucket, "--json"])
    found = json.loads(result.stdout)
    assert found["tried"] == {"If-None-Match": "holds"}
    assert found["server"].startswith("https://s3.")
    words = CliRunner().invoke(main, ["doctor", "--registry", bucket]).stdout
    assert "tried If-None-Match  holds" in words


@pytest.mark.parametrize("limit", ["nan", "inf", "-1", "much"])
def test_a_limit_of_the_cache_that_is_none(
    monkeypatch: pytest.MonkeyPatch, bucket: str, limit: str
) -> None:
    monkeypatch.setenv("LORA_REGISTRY_CACHE_GB", limit)
    result = CliRunner().invoke(main, ["list", "--registry", bucket])
    assert f"LORA_REGISTRY_CACHE_GB: expected a number of GB, found '{limit}'" in result.stderr


def test_the_cache_counts_what_is_there_in_part(cache: Path) -> None:
    """And removes it, unless somebody fetches it right now."""
    store = Cache(cache, limit=250)
    digests = [hashlib.sha256(bytes([number]) * 100).hexdigest() for number in range(4)]
    for number, digest in enumerate(digests[:2]):
        part = store.blob(digest).with_suffix(".part")
        part.parent.mkdir(parents=True)
        part.write_bytes(bytes(100))
        os.utime(part, (number, number))
    with store.filling(digests[0]) as (busy, _), store.filling(digests[2]) as (third, _):
        third.write_bytes(bytes([2]) * 100)
        assert busy.exists()
    assert store.blob(digests[0]).exists()  # it was busy
    assert not store.blob(digests[1]).with_suffix(".part").exists()
    assert sorted(path.name for path in cache.rglob("*") if path.is_file()) == sorted(
        [".lock", ".lock", ".lock", digests[0], digests[2]]
    )


def test_a_cache_that_cannot_note_an_upload(cache: Path) -> None:
    cache.mkdir()
    (cache / "uploads").write_text("no folder")
    with pytest.raises(RegistryError, match="cannot write to the cache"):
        Cache(cache, limit=1).note_upload("any", "id")


def test_a_registry_made_anew_is_another(
    bucket: str, lora: Path, make_lora: Callable[..., Path]
) -> None:
    import boto3

    open_registry(bucket).push("ink", lora)
    client = boto3.client("s3")
    for item in client.list_objects_v2(Bucket="loras")["Contents"]:
        client.delete_object(Bucket="loras", Key=item["Key"])
    second = open_registry(bucket).push("ink", make_lora("other.safetensors", seed=9))
    assert second.version == 1
    assert open_registry(bucket).resolve("ink@1") == second


def test_a_spoilt_cache_is_read_past(bucket: str, lora: Path, cache: Path) -> None:
    manifest = open_registry(bucket).push("ink", lora)
    (document,) = cache.glob("documents/*/*/models/ink/versions/00000001.json")
    document.write_bytes(document.read_bytes()[:-40])
    assert open_registry(bucket).resolve("ink") == manifest


def test_import_takes_loras_of_other_tools(
    invoke: Invoke, folder: Path, tmp_path: Path, loras: Registry
) -> None:
    down = np.random.default_rng(0).standard_normal((4, 320)).astype(np.float32)
    up = np.random.default_rng(1).standard_normal((320, 4)).astype(np.float32)
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    peft = tmp_path / "Final v3 (really).safetensors"
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, peft)
    Image.new("RGB", (8, 8)).save(peft.with_suffix(".preview.png"))
    kohya = tmp_path / "style.safetensors"
    flat = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file(
        {
            f"{flat}.lora_down.weight": down,
            f"{flat}.lora_up.weight": up,
            f"{flat}.alpha": np.array(4.0, np.float32),
        },
        kohya,
    )
    result = invoke("import", peft, kohya, "--licence", "mit")
    assert result.stdout == "final-v3-really@1\nstyle@1\n", result.stderr
    again = invoke("import", peft, kohya)
    assert again.stdout.splitlines() == [
        f"final-v3-really@1 is {peft} already",
        f"style@1 is {kohya} already",
    ]
    manifest = loras.resolve("final-v3-really")
    origin = manifest.metadata["imported_from"]
    assert isinstance(origin, dict)
    assert origin["file"] == peft.name
    assert len(manifest.files) == 3
    tensors = load_file(loras.pull("final-v3-really", tmp_path / "out"))
    assert np.array_equal(tensors[f"{flat}.lora_down.weight"], down)
    style = load_file(loras.pull("style", tmp_path / "out"))
    assert all(np.array_equal(style[key], value) for key, value in load_file(kohya).items())


def test_import_goes_on_after_a_file_that_is_none(
    invoke: Invoke, make_lora: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "text.safetensors").write_text("no weights")
    named, good = make_lora("名.safetensors"), make_lora("good.safetensors", seed=1)
    result = invoke("import", tmp_path / "text.safetensors", named, good)
    assert (result.exit_code, result.stdout) == (2, "good@1\n")
    assert "名.safetensors has no letters for a model name; give one with --name" in result.stderr
    assert "2 of 3 files were not taken; see above" in result.stderr
    assert invoke("import", named, "--name", "mei").stdout == "mei@1\n"


def test_import_under_one_name_goes_by_age(invoke: Invoke, tmp_path: Path, loras: Registry) -> None:
    flat = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    files = []
    for number, age in enumerate((100, 300, 200)):
        path = tmp_path / f"v{number}.safetensors"
        pair = {"down": np.full((4, 320), number, np.float32), "up": np.zeros((320, 4), np.float32)}
        save_file({f"{flat}.lora_{k}.weight": v for k, v in pair.items()}, path)
        os.utime(path, (1e9 - age, 1e9 - age))
        files.append(path)
    result = invoke("import", *files, "--name", "comic", "--json")
    assert [row["file"] for row in json.loads(result.stdout)] == [str(files[k]) for k in (1, 2, 0)]
    assert loras.versions("comic") == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no file"), (b"text", "safetensors"), ("base", "is no LoRA")],
)
def test_import_of_something_else(
    invoke: Invoke, tmp_path: Path, content: bytes | str | None, message: str
) -> None:
    path = tmp_path / "some.safetensors"
    if content == "base":
        save_file({"conv_in.weight": np.zeros((4, 4), np.float32)}, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    result = invoke("import", path)
    assert result.exit_code == 2
    assert message in result.stderr
