"""Pushes that wait, reading without a server, and LoRAs of other tools."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from moto import mock_aws
from PIL import Image
from safetensors.numpy import load_file, save_file

from registry import queue
from registry.api import Registry, RegistryError, open_registry
from registry.cli import main

Invoke = Callable[..., Result]


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
    content = lora.read_bytes()
    lora.unlink()  # a copy waits
    another = CliRunner().invoke(main, ["sync", "--registry", str(folder.parent / "another")])
    assert "nothing waits for" in another.stderr
    assert invoke("sync").stdout == "ink@1\n"
    manifest = open_registry(str(folder)).resolve("ink@1")
    assert manifest.metadata == {"trigger_words": ["brush"]}
    assert open_registry(str(folder)).fetch("ink")[0].read_bytes() == content
    assert "nothing waits for" in invoke("sync").stderr
    assert not any((cache / "queue").iterdir())


def test_a_sync_that_was_cut_off_publishes_once(
    invoke: Invoke, lora: Path, folder: Path, loras: Registry
) -> None:
    assert invoke("push", lora, "ink", "--later").exit_code == 0
    assert invoke("push", lora, "ink", "--later").exit_code == 0
    first, _ = queue.waiting(str(folder))
    assert queue.send(loras, first).reference == "ink@1"  # and ended before it was taken away
    assert json.loads(invoke("sync", "--json").stdout) == ["ink@1", "ink@2"]
    assert loras.versions("ink") == [1, 2]


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
    with pytest.raises(RegistryError, match="cannot be written offline"):
        away.push("ink", lora)
    with pytest.raises(RegistryError, match="is not in the cache"):
        away.file(away.resolve("oil"), away.resolve("oil").files[1])
    with pytest.raises(RegistryError, match="there is no registry at s3://loras/y"):
        open_registry("s3://loras/y", offline=True).names()


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
    assert loras.pull("style", tmp_path / "out").read_bytes() == kohya.read_bytes()


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
