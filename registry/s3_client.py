"""The S3 client, with the settings that all servers need, and its errors in one sentence each."""

from __future__ import annotations

import base64
import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from registry.errors import RegistryError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_VIRTUAL_HOSTS = (".amazonaws.com", ".aliyuncs.com", ".myhuaweicloud.com", ".myqcloud.com")
"""Services that want the bucket in the host name; servers of one's own want it in the path."""

THREADS = 4
_ATTEMPTS = 8
_DAMAGED = (
    *("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"),
    *("RequestTimeout", "OperationAborted"),
)


@dataclass(frozen=True)
class Place:
    """A bucket and the prefix in it under which a registry lives."""

    bucket: str
    prefix: str
    """Empty, or with a slash at its end."""
    endpoint_url: str | None

    @property
    def location(self) -> str:
        """`s3://bucket/prefix`."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def words(self) -> str:
        """With the server, for messages; never with credentials."""
        where = urlsplit(self.endpoint_url).netloc.rpartition("@")[2] if self.endpoint_url else ""
        return f"{self.location} at {where}" if where else self.location


def parse_place(location: str, endpoint_url: str | None) -> Place:
    """`s3://bucket/prefix` taken apart. Raises RegistryError if it is none."""
    parts = urlsplit(location)
    prefix = parts.path.strip("/")
    segments = prefix.split("/") if prefix else []
    plain = all(
        segment not in ("", ".", "..")
        and all(c.isascii() and (c.isalnum() or c in "._-") for c in segment)
        for segment in segments
    )
    if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment or not plain:
        raise RegistryError(
            f"{location!r} is no place for a registry: expected s3://BUCKET/PREFIX with letters, "
            "digits, '.', '_' and '-', or a folder"
        )
    if "@" in parts.netloc:
        raise RegistryError(
            "a registry's location holds no credentials; put them into ~/.aws/credentials or the "
            "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )
    return Place(parts.netloc, f"{prefix}/" if prefix else "", endpoint_url)


def make_client(place: Place, variant: str | None = None) -> S3Client:
    """A client with AWS's own chain of credentials, profiles and regions.

    boto3's default checksums fail or store damaged data on several servers over TLS, so they are
    sent only where a server demands them. With "" as the variant it does not try again; with a
    header's name it sends that header, as true, with each PUT. Raises RegistryError if the settings
    are unusable.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    settings: dict[str, Any] = {
        "signature_version": "s3v4",
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "retries": {"mode": "standard", "total_max_attempts": 1 if variant == "" else _ATTEMPTS},
        "connect_timeout": 10,
        "read_timeout": 10 if variant == "" else 60,
        "max_pool_connections": 4 * THREADS,
    }
    if place.endpoint_url:
        host = urlsplit(place.endpoint_url).hostname or ""
        style = "virtual" if host.endswith(_VIRTUAL_HOSTS) else "path"
        settings["s3"] = {"addressing_style": style}
    try:
        session = boto3.Session()
        client: S3Client = session.client(
            "s3",
            endpoint_url=place.endpoint_url,
            region_name=session.region_name or "us-east-1",
            config=Config(**settings),
        )
    except (BotoCoreError, ValueError) as error:
        raise RegistryError(
            f"{place.words}: the S3 settings are unusable ({error}); see ~/.aws/config, AWS_* in "
            "the environment and --endpoint-url"
        ) from error
    if variant != "":
        hook: Any = _once_more
        client.meta.events.register("needs-retry.s3", hook)
    if variant:

        def add(request: Any, **_: Any) -> None:
            request.headers[variant] = "true"

        client.meta.events.register("before-sign.s3.PutObject", add)
    return client


def _once_more(response: Any, attempts: int, **_: Any) -> float | None:
    """How long to wait before a request is made again that was damaged on its way, None if it was
    not: botocore makes again what was lost or refused for now, and not these."""
    if response is None or attempts >= _ATTEMPTS:
        return None
    code = response[1].get("Error", {}).get("Code") if isinstance(response[1], dict) else None
    return random.uniform(0, 0.1 * 2**attempts) if code in _DAMAGED else None


def content_md5(data: bytes) -> str:
    """The one integrity header that most servers check."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
