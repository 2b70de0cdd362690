"""The S3 client, with the settings that all servers need, and its errors in one sentence each."""

from __future__ import annotations

import base64
import hashlib
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from registry.errors import RegistryError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_VIRTUAL_HOSTS = (".aliyuncs.com", ".myhuaweicloud.com", ".myqcloud.com")
"""Services besides AWS that want the bucket in the host name; botocore puts it into the path."""

THREADS = 4
_ATTEMPTS = 8
ONCE = ""
"""The variant of a client that does not try again."""
_ONCE_CONNECT, _ONCE_READ = 3, 7
ONCE_SECONDS = _ONCE_CONNECT + _ONCE_READ
"""So long that client waits for one request."""
DAMAGED = (
    *("BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"),
    *("RequestTimeout", "OperationAborted"),
)
"""What a server says of a request that was damaged on its way, and that it has not followed."""


@dataclass(frozen=True)
class Place:
    """A bucket and the prefix in it under which a registry lives."""

    bucket: str
    prefix: str
    """Empty, or with a slash at its end."""
    endpoint_url: str | None
    """Of the server, None for what boto3's own settings say."""
    server: str = ""
    """What its client found to be the server's URL."""

    @property
    def location(self) -> str:
        """`s3://bucket/prefix`."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def words(self) -> str:
        """With the server: for messages, and to tell equal locations at two servers apart."""
        where = (self.server or self.endpoint_url or "").partition("://")[2].rstrip("/")
        return f"{self.location} at {where}" if where else self.location


def parse_place(location: str, endpoint_url: str | None) -> Place:
    """`s3://bucket/prefix` taken apart. Raises RegistryError if it is none, or one of the two holds
    credentials."""
    _refuse_credentials("a registry's location", location)
    _refuse_credentials("an endpoint URL", endpoint_url or "")
    scheme, _, path = location.partition("://")
    bucket, *segments = path.rstrip("/").split("/")
    plain = all(
        segment not in ("", ".", "..")
        and all(c.isascii() and (c.isalnum() or c in "._-") for c in segment)
        for segment in (bucket.replace(":", "_"), *segments)  # Ceph's TENANT:BUCKET
    )
    if scheme != "s3" or not plain:
        raise RegistryError(
            f"{location!r} is no place for a registry: expected s3://BUCKET/PREFIX with letters, "
            "digits, '.', '_' and '-', or a folder"
        )
    return Place(bucket, "".join(f"{segment}/" for segment in segments), endpoint_url)


def _refuse_credentials(words: str, url: str) -> None:
    if "@" in url:
        raise RegistryError(
            f"{words} holds no credentials, and no '@'; put them into ~/.aws/credentials or the "
            "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )


def without_credentials(url: str) -> str:
    """The same without what stands before an '@', which can be a secret with any signs in it."""
    return re.sub(r"://.*@", "://", url, flags=re.DOTALL)


def make_client(place: Place, variant: str | None = None) -> S3Client:
    """A client with AWS's own chain of credentials, profiles and regions.

    boto3's default checksums fail or store damaged data on several servers over TLS, so they are
    sent only where a server demands them. ONCE as the variant does not try again; a header's name
    sends that header, as true, with each PUT. Raises RegistryError if the settings are unusable.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    once = variant == ONCE
    settings: dict[str, Any] = {
        "signature_version": "s3v4",
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "retries": {"mode": "standard", "total_max_attempts": 1 if once else _ATTEMPTS},
        "connect_timeout": _ONCE_CONNECT if once else 10,
        "read_timeout": _ONCE_READ if once else 60,
        "max_pool_connections": 4 * THREADS,
    }

    def connected() -> S3Client:
        return session.client(
            "s3",
            endpoint_url=place.endpoint_url,
            region_name=session.region_name or "us-east-1",
            config=Config(**settings),
        )

    try:
        session = boto3.Session()
        client = connected()
        chosen: dict[str, Any] = getattr(client.meta.config, "s3", None) or {}
        host = urlsplit(client.meta.endpoint_url).hostname or ""
        if host.endswith(_VIRTUAL_HOSTS) and "addressing_style" not in chosen:
            settings["s3"] = {**chosen, "addressing_style": "virtual"}
            client = connected()
    except (BotoCoreError, ValueError) as error:
        raise RegistryError(
            f"{place.words}: the S3 settings are unusable ({without_credentials(str(error))}); see "
            "~/.aws/config, AWS_* in the environment and --endpoint-url"
        ) from error
    _refuse_credentials("an endpoint URL", client.meta.endpoint_url)
    if not once:
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
    return random.uniform(0, 0.1 * 2**attempts) if code in DAMAGED else None


def content_md5(data: bytes) -> str:
    """The one integrity header that most servers check."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
