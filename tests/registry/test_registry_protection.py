"""Encryption and object lock: asked for, they are there, or it is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from click.testing import CliRunner
from moto import mock_aws

from registry.api import Registry, RegistryError, open_registry
from registry.cli import main
from registry.s3 import S3Store
from registry.settings import Settings
from tests.registry import servers


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[boto3.client]:
    """S3 in this process."""
    for key, value in {
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "LORA_REGISTRY_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(key, value)
    with mock_aws():
        yield boto3.client("s3", region_name="us-east-1")


@pytest.mark.parametrize(
    ("encryption", "found"),
    [("AES256", "AES256"), ("aws:kms", "aws:kms"), ("aws:kms:k1", "aws:kms")],
)
def test_every_object_is_encrypted(
    aws: boto3.client, lora: Path, tmp_path: Path, encryption: str, found: str
) -> None:
    aws.create_bucket(Bucket="loras")
    loras = open_registry("s3://loras/x")
    loras.create(Settings(encryption=encryption))
    again = open_registry("s3://loras/x")  # another client learns of it from the registry
    again.push("ink", lora)
    objects = aws.list_objects_v2(Bucket="loras")["Contents"]
    assert len(objects) == 4
    for item in objects:
        head = aws.head_object(Bucket="loras", Key=item["Key"])
        assert head["ServerSideEncryption"] == found
        if encryption.endswith("k1"):
            assert head["SSEKMSKeyId"] == "k1"
    assert again.pull("ink", tmp_path / "out").read_bytes() == lora.read_bytes()


def test_every_object_is_locked(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with servers.seaweedfs(tmp_path) as server:
        values = {**server.environment, "LORA_REGISTRY_CACHE": str(tmp_path / "cache")}
        for key, value in values.items():
            monkeypatch.setenv(key, value)
        client = server.client()
        client.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)
        loras = open_registry("s3://locked/x")
        loras.create(Settings(lock="COMPLIANCE", lock_days=30))
        manifest = loras.push("ink", lora)
        found = client.list_objects_v2(Bucket="locked")["Contents"]
        assert len(found) == 4
        for item in found:
            lock = client.get_object_retention(Bucket="locked", Key=item["Key"])["Retention"]
            assert lock["Mode"] == "COMPLIANCE"
            days = (lock["RetainUntilDate"] - manifest.created).total_seconds() / 86400
            assert 29.9 < days < 30.1


def test_settings_are_made_once(aws: boto3.client) -> None:
    aws.create_bucket(Bucket="loras")
    run = CliRunner()
    where = ["--registry", "s3://loras/x"]
    assert run.invoke(main, ["init", *where, "--encryption", "AES256"]).exit_code == 0
    assert open_registry("s3://loras/x").settings.encryption == "AES256"
    again = run.invoke(main, ["init", *where, "--encryption", "aws:kms"])
    assert again.exit_code == 2
    assert "is there already, and its settings stay" in again.stderr
    wrong = run.invoke(main, ["init", *where, "--encryption", "rot13"])
    assert "--encryption: expected AES256, aws:kms or aws:kms:KEY, found 'rot13'" in wrong.stderr
    half = run.invoke(main, ["init", *where, "--lock", "GOVERNANCE"])
    assert "--lock and --lock-days go together" in half.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(encryption="AES256"), "was to be encrypted with AES256, and the server does"),
        (
            Settings(lock="GOVERNANCE", lock_days=1),
            "was to be locked .GOVERNANCE., and the server has not",
        ),
    ],
)
def test_a_server_that_does_it_not(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    settings: Settings,
    message: str,
) -> None:
    with servers.rclone(tmp_path) as server:
        values = {**server.environment, "LORA_REGISTRY_CACHE": str(tmp_path / "cache")}
        for key, value in values.items():
            monkeypatch.setenv(key, value)
        with pytest.raises(RegistryError, match=message):
            open_registry("s3://loras/x").create(settings)
        assert open_registry("s3://loras/x").create()  # nothing was left


def test_encryption_is_asked_of_the_object(aws: boto3.client) -> None:
    """The answer to a PUT, which here says what was asked for, is not believed."""
    aws.create_bucket(Bucket="loras")
    loras = open_registry("s3://loras/x")
    assert isinstance(loras.store, S3Store)
    events, header = loras.store._client.meta.events, "x-amz-server-side-encryption"

    def forget(params: dict[str, dict[str, str]], **_: object) -> None:
        params["headers"].pop(header, None)

    def lie(parsed: dict[str, str], **_: object) -> None:
        parsed["ServerSideEncryption"] = "AES256"

    events.register("before-call.s3.PutObject", forget)
    events.register("after-call.s3.PutObject", lie)
    with pytest.raises(RegistryError, match="encrypted with AES256, and the server does nothing"):
        loras.create(Settings(encryption="AES256"))
    assert not aws.list_objects_v2(Bucket="loras")["KeyCount"]


def test_a_folder_does_neither(loras: Registry, make_lora: Callable[..., Path]) -> None:
    with pytest.raises(RegistryError, match="a folder neither encrypts nor locks"):
        loras.create(Settings(encryption="AES256"))
