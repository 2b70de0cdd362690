"""Documents of a registry: small JSON files that say their own digest and never change.

The last key of a document, `sha256`, is that of all bytes before it, so that a changed byte is
seen, wherever it is. The key before it, `signature`, is there if the writer has signed all bytes
before that one.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from registry import signing
from registry.errors import Damaged, RegistryError, problems
from registry.store import MAX_DOCUMENT_BYTES, Store

Document = TypeVar("Document", bound=BaseModel)

_SIGNED = re.compile(rb',\n  "signature": "([A-Za-z0-9:+/=]+)"\Z')
_SEAL = re.compile(rb',\n  "sha256": "([0-9a-f]{64})"\n}\n\Z')


def sealed(document: BaseModel, key: signing.Key | None = None) -> bytes:
    """The bytes of a document, signed if there is a key. Raises RegistryError if they are too
    many."""
    body = document.model_dump_json(indent=2, exclude={"signature"}).encode().removesuffix(b"\n}")
    if key is not None:
        body += b',\n  "signature": "' + key.sign(body).encode() + b'"'
    digest = hashlib.sha256(body).hexdigest().encode()
    data = body + b',\n  "sha256": "' + digest + b'"\n}\n'
    if len(data) > MAX_DOCUMENT_BYTES:
        raise RegistryError(
            f"what the registry is to keep of this has {len(data):,} bytes, and "
            f"{MAX_DOCUMENT_BYTES:,} are the most; shorten the metadata"
        )
    return data


def opened(data: bytes, kind: type[Document]) -> Document:
    """The document of these bytes. Raises ValueError, with the reason, if they are none."""
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"it has more than {MAX_DOCUMENT_BYTES:,} bytes")
    seal = _SEAL.search(data)
    if seal is None:
        _check_version(data)
        raise ValueError("it does not end with its sha256")
    body = data[: seal.start()]
    if hashlib.sha256(body).hexdigest().encode() != seal[1]:
        raise ValueError("it is damaged: its bytes are not those of its sha256")
    _check_version(body + b"\n}")
    try:
        document = kind.model_validate_json(body + b"\n}")
    except ValidationError as error:
        raise ValueError(problems(error)) from error
    signature = getattr(document, "signature", None)
    if signature is not None:
        signed = _SIGNED.search(body)
        if signed is None or not signing.is_of(signature, body[: signed.start()]):
            raise ValueError("its signature is not that of its bytes")
    return document


def _check_version(data: bytes) -> None:
    """Raise ValueError if it is JSON that says it is of another format."""
    try:
        values = json.loads(data)
    except ValueError:
        return
    version = values.get("format_version", 1) if isinstance(values, dict) else 1
    if version != 1:
        raise ValueError(f"it has format version {version}, and this program knows 1")


def read(
    store: Store,
    key: str,
    kind: type[Document],
    words: str,
    fresh: bool = False,
    remedy: str = "restore it",
) -> Document:
    """The document under a key; with `fresh` not from a cache.

    `words` says what it should be. Raises RegistryError, with the remedy, if it is not there,
    Damaged if it is not that.
    """
    reason = ""
    for asked in (True, True, True) if fresh else (False, True, True):
        data = store.read(key, fresh=asked)
        if data is None:
            raise RegistryError(f"{key} vanished from the registry {store.location}; try again")
        try:
            return opened(data, kind)
        except ValueError as error:
            reason = str(error)
    raise Damaged(
        f"{key} in the registry {store.location} is not {words} that this program can read "
        f"({reason}); {remedy}, or use a newer lora-registry"
    )
