"""A registry's objects in a bucket.

The one thing relied on is that a small object can be created unless it is there. Servers that do
not offer it get the protocol of registry.claims. Nothing is read from user metadata, ETags or
echoes, and no condition is put on anything but a single PUT: each fails on some server.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING

from registry.cache import Cache
from registry.chunks import CHUNK_BYTES, Chunk, chunks_of, missing
from registry.errors import RegistryError, os_errors
from registry.s3_client import THREADS, Place, content_md5, make_client
from registry.s3_errors import code_of, s3_errors, status_of
from registry.store import Entry, Progress, silent

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from registry.manifest import FileEntry

_ABSENT = ("NoSuchKey", "404", "NotFound")


class S3Store:
    """A Store under a prefix of a bucket; see registry.store.Store."""

    def __init__(self, place: Place, cache: Cache, client: S3Client | None = None):
        self.place = place
        self.cache = cache
        self._client = client or make_client(place)
        self._create: Callable[[str, bytes], bool] | None = None

    @property
    def location(self) -> str:
        return self.place.location

    def names(self, prefix: str) -> list[str]:
        folder = self._key(prefix.strip("/") + "/" if prefix else "")
        found = []
        with self._errors("list the bucket"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.place.bucket, Prefix=folder, Delimiter="/"
            )
            for page in pages:
                found += [item["Key"][len(folder) :] for item in page.get("Contents", ())]
                folders = page.get("CommonPrefixes", ())
                found += [item["Prefix"][len(folder) :].rstrip("/") for item in folders]
        return sorted(name for name in found if name)

    def entries(self, prefix: str) -> Iterator[Entry]:
        with self._errors("list the bucket"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.place.bucket, Prefix=self._key(prefix)
            )
            for page in pages:
                for item in page.get("Contents", ()):
                    key = item["Key"][len(self.place.prefix) :]
                    yield Entry(key, item["Size"], item["LastModified"])

    def read(self, key: str) -> bytes | None:
        from botocore.exceptions import ClientError

        with self._errors("read objects"):
            try:
                answer = self._client.get_object(Bucket=self.place.bucket, Key=self._key(key))
            except ClientError as error:
                if code_of(error) in _ABSENT:
                    return None
                raise
            with contextlib.closing(answer["Body"]) as body:
                return body.read()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if self._create is None:
            from registry.creation import creation

            self._create = creation(self)
        return self._create(key, data)

    def put_blob(
        self, key: str, source: Path, entry: FileEntry, progress: Progress = silent
    ) -> None:
        with self._errors("write objects"):
            if self._size(key) == entry.size:
                progress(entry.size)
                return
            if entry.size <= CHUNK_BYTES:
                with os_errors(f"read {source}"):
                    data = source.read_bytes()
                if hashlib.sha256(data).hexdigest() != entry.sha256:
                    raise _changed(source)
                self.put(key, data)
                progress(entry.size)
            else:
                self._put_parts(key, source, entry, progress)
            stored = self._size(key)
        if stored != entry.size:
            raise RegistryError(
                f"{self.place.words}: {key} has {stored} bytes after {entry.size} were sent, so the "
                "server damages what it gets; use another one"
            )

    def blob_file(
        self, key: str, entry: FileEntry, progress: Progress = silent
    ) -> Path | None:
        """See Store: from the cache, to which it is fetched if need be."""
        with self.cache.filling(entry.sha256) as (path, complete):
            if not complete:
                if self.cache.offline:
                    raise RegistryError(
                        f"{entry.path} of {self.location} is not in the cache {self.cache.folder}; "
                        "pull it once without --offline"
                    )
                if not self._fetch(key, entry, path, progress):
                    return None
        return self.cache.blob(entry.sha256)

    def delete(self, key: str) -> None:
        with self._errors("delete objects"):
            self._client.delete_object(Bucket=self.place.bucket, Key=self._key(key))

    def now(self) -> datetime:
        with self._errors("list the bucket"):
            answer = self._client.list_objects_v2(
                Bucket=self.place.bucket, Prefix=self._key("registry.json"), MaxKeys=1
            )
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])

    def put(self, key: str, data: bytes, **conditions: str) -> None:
        """Write a small object, whatever is there. Raises botocore's errors."""
        self._client.put_object(
            Bucket=self.place.bucket,
            Key=self._key(key),
            Body=data,
            ContentMD5=content_md5(data),
            **conditions,  # type: ignore[arg-type]
        )
