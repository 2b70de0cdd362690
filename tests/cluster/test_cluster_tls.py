"""Certificates for the workers' channel, and that nobody without them gets in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import pkcs12

import launcher.job
import trainer.distributed
from cluster import tls
from cluster.errors import ClusterError
from cluster.host import is_private
from cluster.ports import choose_port

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tls"
    tls.make(folder, NOW)
    return folder


def test_only_the_owner_can_read(made: Path) -> None:
    assert made.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in made.iterdir()} == {0o600}
    assert sorted(path.name for path in made.iterdir()) == [
        *("ca.pem", "client.p12", "config.json", "ps_context.json", "server.p12")
    ]


@pytest.mark.parametrize("role", ["server", "client"])
def test_what_mindspore_asks_of_a_certificate(made: Path, role: str) -> None:
    context = json.loads((made / "ps_context.json").read_text())
    config = json.loads(Path(context["config_file_path"]).read_text())
    authority = x509.load_pem_x509_certificate(Path(config["ca_cert_path"]).read_bytes())
    data = Path(config[f"{role}_cert_path"]).read_bytes()
    password = context[f"{role}_password"].encode()
    key, leaf, chain = pkcs12.load_key_and_certificates(data, password)
    assert (leaf is None, chain) == (False, [])
    assert leaf is not None and key is not None
    leaf.verify_directly_issued_by(authority)
    own = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    named = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert named.key_identifier == own.digest
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert leaf.not_valid_before_utc <= NOW <= leaf.not_valid_after_utc - timedelta(days=300)
    with pytest.raises(ValueError, match="password"):
        pkcs12.load_key_and_certificates(data, b"")


def test_folder_that_is_there_is_left_alone(made: Path) -> None:
    before = {path: path.read_bytes() for path in made.iterdir()}
    with pytest.raises(ClusterError, match="expected to make the run's certificates here"):
        tls.make(made, NOW)
    assert {path: path.read_bytes() for path in made.iterdir()} == before
    assert [path.name for path in made.parent.iterdir()] == ["tls"]


def test_both_sides_name_the_same_variable() -> None:
    assert launcher.job.PS_CONTEXT == trainer.distributed.PS_CONTEXT


@pytest.mark.parametrize(
    ("host", "private"),
    [("127.0.0.1", True), ("10.1.2.3", True), ("fd00::1", True), ("8.8.8.8", False)],
)
def test_private_addresses(host: str, private: bool) -> None:
    assert is_private(host) == private


MEMBER = """
import sys
from trainer.distributed import Group
import numpy as np
group = Group("CPU")
assert group.sum(np.ones(3))[0] == 2
print("met")
"""


@pytest.mark.slow
def test_a_stranger_does_not_get_in(tmp_path: Path) -> None:
    """Of two workers of a run with certificates one has none: they do not meet."""
    folder = tmp_path / "tls"
    tls.make(folder, datetime.now(timezone.utc))
    (tmp_path / "member.py").write_text(MEMBER)
    common = {
        **os.environ,
        "PYTHONPATH": str(Path(tls.__file__).parents[1]),
        "MS_SCHED_HOST": "127.0.0.1",
        "MS_SCHED_PORT": str(choose_port("127.0.0.1")),
        "MS_WORKER_NUM": "2",
        "MS_TOPO_TIMEOUT": "15",
        "MS_RECEIVE_MSG_TIMEOUT": "15",
    }
    inside = {trainer.distributed.PS_CONTEXT: str(folder / "ps_context.json")}
    roles = [
        {"MS_ROLE": "MS_SCHED", **inside},
        {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": "0", **inside},
        {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": "1"},
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "member.py"],
            cwd=tmp_path,
            env={**common, **role},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for role in roles
    ]
    try:
        for process in processes[1:]:
            out, _ = process.communicate(timeout=200)
            assert process.returncode != 0
            assert "met" not in out.splitlines()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
