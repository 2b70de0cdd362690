"""Ceph's object gateway, which Debian has: the policies of configs/registry, and races."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from registry.aliases import set_alias
from registry.api import Registry, RegistryError, open_registry
from tests.registry import servers
from tests.registry.servers import Server

pytestmark = pytest.mark.slow

PACKAGES = ("radosgw", "ceph-mon", "ceph-osd", "ceph-common")


@pytest.fixture(scope="module")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if shutil.which("radosgw") is None:
        command = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            pytest.skip(f"needs {', '.join(PACKAGES)}, and nobody here may install them")
        subprocess.run(command, check=True, capture_output=True)
    with servers.ceph(tmp_path_factory.mktemp("ceph")) as server:
        yield server


@pytest.fixture
def become(
    ceph: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], Registry]:
    """Open the registry as somebody."""

    def begin(user: str) -> Registry:
        cache = str(tmp_path / f"cache-{user}")
        values = {**ceph.environment, "AWS_ACCESS_KEY_ID": user, "LORA_REGISTRY_CACHE": cache}
        for key, value in values.items():
            monkeypatch.setenv(key, value)
        return open_registry("s3://loras/team")

    return begin


def statements(root: Path, name: str, placeholder: str, user: str) -> list[Any]:
    text = (root / "configs" / "registry" / name).read_text()
    for old, new in (("BUCKET", "loras"), ("PREFIX", "team")):
        text = text.replace(old, new)
    return list(json.loads(text.replace(placeholder, f"arn:aws:iam:::user/{user}"))["Statement"])


def test_the_policies_give_what_is_needed_and_no_more(
    ceph: Server,
    become: Callable[[str], Registry],
    lora: Path,
    tmp_path: Path,
    project_root: Path,
) -> None:
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            *statements(project_root, "reader-policy.json", "READER", "reader"),
            *statements(project_root, "publisher-policy.json", "PUBLISHER", "writer"),
        ],
    }
    ceph.client().put_bucket_policy(Bucket="loras", Policy=json.dumps(policy))
    loras = become("writer")
    assert loras.push("ink", lora).reference == "ink@1"
    assert loras.push("ink", lora).reference == "ink@2"
    set_alias(loras, "ink", "prod", 1)
    writer = ceph.client("writer")
    for key in ("registry.json", "models/ink/versions/00000001.json"):
        with pytest.raises(ClientError, match="AccessDenied"):
            writer.delete_object(Bucket="loras", Key=f"team/{key}")
    reader = become("reader")
    assert reader.pull("ink@prod", tmp_path / "out").read_bytes() == lora.read_bytes()
    with pytest.raises(RegistryError, match="no permission to write objects"):
        reader.push("ink", lora)
    with pytest.raises(ClientError, match="AccessDenied"):
        ceph.client("reader").put_object(Bucket="loras", Key="team/any", Body=b"")


@pytest.mark.parametrize("server", ["folder", "ceph"])
def test_races_with_faults_and_kills(server: str, ceph: Server, project_root: Path) -> None:
    words = ["--server", server, "--processes", "8", "--pushes", "8", "--faults"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.registry_race", *words, "--kill-every", "1"],
        capture_output=True,
        text=True,
        cwd=project_root,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "64 pushes reported" in done.stdout
