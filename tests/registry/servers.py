"""Real S3 servers for tests, each a process of its own on free ports of the loopback interface."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

START_SECONDS = 60
CEPH_ATTEMPTS = 4
OWN = "own"
"""A server that was there before, with credentials in the environment."""
ACCESS_KEY, SECRET_KEY = "publisher", "a-secret-of-the-tests"


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    name: str
    endpoint_url: str
    bucket: str = "loras"

    @property
    def environment(self) -> dict[str, str]:
        """What makes any client in this process, or one that it starts, use it."""
        if self.name == OWN:
            return {"AWS_ENDPOINT_URL_S3": self.endpoint_url}
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY):  # type: ignore[no-untyped-def]
        """A plain client, apart from the registry's."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            region_name="us-east-1",
            config=Config(
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                retries={"total_max_attempts": 1},
                connect_timeout=2,
                read_timeout=10,
            ),
        )


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at; those 10,000 above are free too, which SeaweedFS also takes."""
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < count:
            port = held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            if port > 55000:
                continue
            try:
                held.enter_context(socket.create_server(("127.0.0.1", port + 10000)))
            except OSError:
                continue
            found.append(port)
    return found


@contextmanager
def seaweedfs(folder: Path) -> Iterator[Server]:
    """A real server that honours conditions, with users and their rights."""
    users = {
        "publisher": ["Admin"],
        "reader": ["Read:loras", "List:loras"],
        "writer": ["Write:loras"],
    }
    identities = [
        {
            "name": name,
            "credentials": [{"accessKey": name, "secretKey": SECRET_KEY}],
            "actions": actions,
        }
        for name, actions in users.items()
    ]
    config = folder / "identities.json"
    config.write_text(json.dumps({"identities": identities}))
    s3, master, volume, filer = free_ports(4)
    (folder / "data").mkdir()
    command = [
        *(_program("weed"), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1"),
        *("-ip.bind=127.0.0.1", "-s3", f"-s3.port={s3}", f"-s3.config={config}"),
        *("-s3.autoCreateBucket=false", "-master.volumeSizeLimitMB=64", "-volume.max=400"),
        *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
    ]
    with _running("SeaweedFS", command, folder, s3) as server:
        yield server


@contextmanager
def rclone(folder: Path) -> Iterator[Server]:
    """A server that answers 200 to a condition that is not met, and drops user metadata."""
    (folder / "data").mkdir()
    (port,) = free_ports(1)
    command = [
        *(_program("rclone"), "serve", "s3", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"),
        *("--addr", f"127.0.0.1:{port}", "--vfs-cache-mode", "off", str(folder / "data")),
    ]
    with _running("rclone", command, folder, port) as server:
        yield server


@contextmanager
def nanio(folder: Path) -> Iterator[Server]:
    """Another one that ignores conditions; over TLS it also stores boto3's own uploads damaged."""
    (folder / "data").mkdir()
    (port,) = free_ports(1)
    command = [
        *(_program("nanio"), "serve", "--data-dir", str(folder / "data"), "--host", "127.0.0.1"),
        *("--port", str(port), "--no-access-log", "--log-level", "error"),
    ]
    users = {"NANIO_ACCESS_KEY": ACCESS_KEY, "NANIO_SECRET_KEY": SECRET_KEY}
    with _running("nanio", command, folder, port, users) as server:
        yield server


@contextmanager
def ceph(folder: Path) -> Iterator[Server]:
    """Ceph's object gateway, with a monitor and a store in memory, of the Debian packages
    radosgw, ceph-mon and ceph-osd. Its parts do not always find each other: then once more."""
    for attempt in range(CEPH_ATTEMPTS):
        own = folder / f"ceph{attempt}"
        own.mkdir()
        with ExitStack() as stack:
            try:
                server = stack.enter_context(_ceph(own))
            except subprocess.TimeoutExpired:
                continue
            yield server
            return
    pytest.fail(f"Ceph does not start; see {folder}")


@contextmanager
def _ceph(folder: Path) -> Iterator[Server]:
    gateway, monitor = free_ports(2)
    (folder / "run").mkdir()
    environment = {"CEPH_CONF": str(folder / "ceph.conf"), "CEPH_ARGS": ""}
    (folder / "ceph.conf").write_text(
        f"""[global]
fsid = 11111111-2222-3333-4444-555555555555
auth cluster required = none
auth service required = none
auth client required = none
keyring = /dev/null
mon host = v1:127.0.0.1:{monitor}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr2 = false
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 4294967296
paxos propose interval = 0.05
paxos min wait = 0.01
run dir = {folder}/run
admin socket = {folder}/run/$cluster-$name.asok
pid file = {folder}/run/$name.pid
log file = {folder}/run/$name.log
mon data = {folder}/mon
osd data = {folder}/osd
osd journal = {folder}/osd/journal
rgw frontends = beast endpoint=127.0.0.1:{gateway}
rgw gc obj min wait = 5
rgw gc processor period = 5
rgw dynamic resharding = false
[mon.a]
mon addr = 127.0.0.1:{monitor}
"""
    )
    uuid = "99999999-8888-7777-6666-555555555555"
    (folder / "osd").mkdir()

    def run(*command: str) -> None:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=15
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-2000:]}"

    with ExitStack() as started:

        def begin(*command: str) -> None:
            log = started.enter_context((folder / f"{command[0]}.log").open("wb"))
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **environment}
            )
            started.callback(process.wait)
            started.callback(process.kill)

        fsid = "11111111-2222-3333-4444-555555555555"
        run(
            *("monmaptool", "--create", "--fsid", fsid, "--addv", "a"),
            *(f"[v1:127.0.0.1:{monitor}]", str(folder / "monmap")),
        )
        run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(folder / "monmap"))
        begin("ceph-mon", "-f", "-i", "a")
        run("ceph", "osd", "new", uuid, "0")
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", uuid)
        run("ceph", "osd", "crush", "add", "osd.0", "1.0", "host=localhost", "root=default")
        begin("ceph-osd", "-f", "-i", "0")
        for user in (ACCESS_KEY, "reader", "writer"):
            run(
                *("radosgw-admin", "user", "create", f"--uid={user}", f"--display-name={user}"),
                *(f"--access-key={user}", f"--secret-key={SECRET_KEY}"),
            )
        command = ["radosgw", "-f", "-n", "client.rgw"]
        with _running("Ceph", command, folder, gateway, environment) as server:
            yield server


@contextmanager
def _running(
    name: str, command: list[str], folder: Path, port: int, environment: Mapping[str, str] = {}
) -> Iterator[Server]:
    server = Server(name, f"http://127.0.0.1:{port}")
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env={**os.environ, **environment}
        )
    try:
        client, deadline = server.client(), time.monotonic() + START_SECONDS
        while True:
            try:
                client.create_bucket(Bucket="loras")
                client.put_object(Bucket="loras", Key="ready", Body=b"")
                client.delete_object(Bucket="loras", Key="ready")
                break
            except (BotoCoreError, ClientError) as error:
                assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
                assert time.monotonic() < deadline, f"{name} does not answer: {error}"
                time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()


def _program(name: str) -> str:
    path = Path(sys.executable).parent / name
    if not path.exists():
        pytest.fail(f"{name} is not installed beside {sys.executable}; see the extra `test`")
    return str(path)
