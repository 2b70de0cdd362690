"""What an S3 server's refusal means, in one sentence with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from registry.errors import RegistryError

if TYPE_CHECKING:
    from botocore.exceptions import ClientError
    from mypy_boto3_s3 import S3Client

    from registry.s3_client import Place

_SENTENCES = {
    "NoSuchBucket": "there is no bucket {bucket}; create it, or correct its name",
    "InvalidAccessKeyId": "the server does not know the access key; see `aws configure list`, "
    "AWS_PROFILE and ~/.aws/credentials",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key; correct it in "
    "~/.aws/credentials or AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session's token has expired; sign in again",
    "InvalidToken": "the session's token is not valid; sign in again",
    "RequestTimeTooSkewed": "this machine's clock is too far from the server's; let NTP set it",
    "AccessDenied": "no permission to {action}; ask for it, see docs/registry-s3.md",
    "PermanentRedirect": "the bucket {bucket} is in another region; name it with AWS_REGION",
    "QuotaExceeded": "the bucket {bucket} is full; make room, or ask for more",
    "InsufficientStorage": "the server has no room left; make some",
}
_ALIASES = {
    "InvalidAccessKey": "InvalidAccessKeyId",
    "ExpiredTokenException": "ExpiredToken",
    "AuthorizationHeaderMalformed": "PermanentRedirect",
    "XMinioStorageFull": "InsufficientStorage",
    "403": "AccessDenied",
}


def code_of(error: ClientError) -> str:
    """`NoSuchKey`, `AccessDenied` or, for a HEAD, the bare status."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: ClientError) -> int:
    """The HTTP status."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@contextmanager
def s3_errors(client: S3Client, place: Place, action: str, remedy: str = "") -> Iterator[None]:
    """Turn what botocore raises in the block into a RegistryError.

    `action` completes the words "no permission to ..."; `remedy` is what helps where the server
    gives no reason.
    """
    from botocore import exceptions as raised

    try:
        yield
    except raised.ClientError as error:
        sentence = _sentence(client, place, action, remedy, error)
        raise RegistryError(f"{place.words}: {sentence}") from error
    except (raised.NoCredentialsError, raised.PartialCredentialsError) as error:
        raise RegistryError(
            f"{place.words}: no credentials were found; put them into ~/.aws/credentials "
            "(aws configure) or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    except raised.SSLError as error:
        raise RegistryError(
            f"{place.words}: the server's certificate is not trusted; name its CA with "
            "AWS_CA_BUNDLE=FILE"
        ) from error
    except (raised.HTTPClientError, raised.ConnectionError) as error:
        raise RegistryError(
            f"{place.words}: nobody answers there ({type(error).__name__}); see whether the server "
            "runs, --endpoint-url and the network"
        ) from error
    except raised.BotoCoreError as error:
        raise RegistryError(
            f"{place.words}: cannot {action}: {error}; see ~/.aws/config"
        ) from error


def _sentence(client: S3Client, place: Place, action: str, remedy: str, error: ClientError) -> str:
    from botocore.exceptions import ClientError

    code = code_of(error)
    if code in ("403", "404", "400"):  # the answer to a HEAD has no words: ask again for some
        try:
            client.list_objects_v2(Bucket=place.bucket, Prefix=place.prefix, MaxKeys=1)
        except ClientError as further:
            code = code_of(further)
    known = _SENTENCES.get(_ALIASES.get(code, code))
    if known:
        return known.format(bucket=place.bucket, action=action)
    message = str(error.response.get("Error", {}).get("Message") or "").strip().rstrip(".")
    status = status_of(error)
    if status >= 500 or code == "SlowDown":
        remedy = remedy or "try again later"
        return f"cannot {action}: the server fails ({code or status}); {remedy}"
    words = f" ({message})" if message else ""
    return f"cannot {action}: the server says {code or status}{words}{remedy and f'; {remedy}'}"
