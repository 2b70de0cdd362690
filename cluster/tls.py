"""Certificates for MindSpore's cluster channel, so that no stranger registers at the scheduler.

MindSpore takes them from PKCS #12 files named in a JSON file, which `set_ps_context` is told of
before `init()`. What it checks at the start (2.10, mindspore/ccsrc/ps/core): the PKCS #12 file has
no chain, the issuer's name is the CA's, the authority key identifier is the CA's subject key
identifier, the CA says that it is one, and now is within both lifetimes.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cluster.errors import ClusterError

_BITS = 3072
_CIPHERS = "ECDHE-RSA-AES128-GCM-SHA256:ECDHE-RSA-AES256-GCM-SHA384:ECDHE-RSA-CHACHA20-POLY1305"
_USES = {
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
}


def make(folder: Path, now: datetime, days: int = 365) -> None:
    """Make the certificates of one run in a new folder, which only its owner can read.

    Its ps_context.json holds the arguments of `set_ps_context`, passwords and all. The CA's private
    key is kept nowhere, so nobody can add a certificate later. All machines of the run read the
    folder at the same path. Raises ClusterError if it exists or cannot be written.
    """
    authority_key = rsa.generate_private_key(65537, _BITS)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lora-launch run")])
    authority = _certificate(name, authority_key, name, authority_key, now, days, None)
    context: dict[str, object] = {
        "enable_ssl": True,
        "config_file_path": str(folder.absolute() / "config.json"),
    }
    files = {"ca.pem": authority.public_bytes(serialization.Encoding.PEM)}
    for role, use in _USES.items():
        key = rsa.generate_private_key(65537, _BITS)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"lora-launch {role}")])
        leaf = _certificate(subject, key, name, authority_key, now, days, use)
        password = secrets.token_hex(16)
        encryption = serialization.BestAvailableEncryption(password.encode())
        files[f"{role}.p12"] = pkcs12.serialize_key_and_certificates(
            role.encode(), key, leaf, None, encryption
        )
        context[f"{role}_password"] = password
    files["config.json"] = _json(
        {
            "ca_cert_path": str(folder.absolute() / "ca.pem"),
            "server_cert_path": str(folder.absolute() / "server.p12"),
            "client_cert_path": str(folder.absolute() / "client.p12"),
            "crl_path": "",
            "cipher_list": _CIPHERS,
            "cert_expire_warning_time_in_day": 7,
        }
    )
    files["ps_context.json"] = _json(context)
    _write(folder, files)


def _certificate(
    subject: x509.Name,
    key: rsa.RSAPrivateKey,
    issuer: x509.Name,
    issuer_key: rsa.RSAPrivateKey,
    now: datetime,
    days: int,
    use: x509.ObjectIdentifier | None,
) -> x509.Certificate:
    """A certificate of the CA itself if `use` is None."""
    is_authority = use is None
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # A machine whose clock is behind must not find it from the future.
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(is_authority, 0 if is_authority else None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False
        )
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_authority,
                key_encipherment=not is_authority,
                key_cert_sign=is_authority,
                crl_sign=is_authority,
                content_commitment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            True,
        )
    )
    if use is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), False)
    return builder.sign(issuer_key, hashes.SHA256())


def _json(values: dict[str, object]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """All files or none; 0600 from the first byte on."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(mode=0o700, parents=True)
        for name, content in files.items():
            handle = os.open(part / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        part.rename(folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise ClusterError(
            f"{folder}: expected to make the run's certificates here, found: {error.strerror}; "
            "name a new folder that can be written"
        ) from error
