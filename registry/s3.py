"""A registry's objects in a bucket.

The one thing relied on is that a small object can be created unless it is there; how, is for
registry.creation to say. Nothing is read from user metadata, ETags or echoes, and no condition is
put on anything but a single PUT: each fails on some server.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from registry.cache import Cache
from registry.chunks import CHUNK_BYTES, Chunk, chunks_of, missing
from registry.errors import RegistryError, os_errors
from registry.s3_client import ONCE, THREADS, Place, content_md5, make_client
from registry.s3_errors import code_of, s3_errors, status_of
from registry.settings import Settings
from registry.store import AT_WORK, MAX_DOCUMENT_BYTES, Entry, FolderStore, Progress, silent

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef, HeadObjectOutputTypeDef

    from registry.manifest import FileEntry

T = TypeVar("T")
_ABSENT = ("NoSuchKey", "404", "NotFound")
_READS = 6
"""Tries to read what breaks off or is damaged on its way."""
_CHEAP_BYTES = 1 << 20
"""So much is sent sooner than it is asked whether it is there."""
_PROTECTED = ("blobs/", "models/", "registry.json")
"""What is encrypted and locked, if the registry is to be; the rest comes and goes."""


class S3Store:
    """A Store under a prefix of a bucket; see registry.store.Store."""

    verified = True

    def __init__(self, place: Place, cache: Cache, client: S3Client | None = None):
        self.cache = cache
        self._connected = client or make_client(place)
        self.place = replace(place, server=self._connected.meta.endpoint_url)
        self._variants: dict[str, S3Client] = {}
        self._create: Callable[[str, bytes], bool] | None = None
        self._settings = Settings()
        self._cached: Path | None = None
        """Where documents of this registry, and no other at its place, are kept."""

    @property
    def location(self) -> str:
        return self.place.location

    @property
    def address(self) -> str:
        return self.place.words

    @property
    def _client(self) -> S3Client:
        """What every request goes through. Raises RegistryError offline."""
        if self.cache.offline:
            raise RegistryError(
                f"this needs the server of {self.location}, which is not asked offline; leave "
                "--offline (LORA_REGISTRY_OFFLINE) out, or queue a push with push --later"
            )
        return self._connected

    def settle(self, settings: Settings) -> Settings:
        from registry.creation import probed

        return settings.model_copy(update={"creation": probed(self).way})

    def use(self, settings: Settings) -> None:
        if settings.creation != self._settings.creation:
            self._create = None
        self._settings = settings
        self._cached = self.cache.documents(self.place.words, settings.id)

    def known(self, prefix: str) -> list[str]:
        if self._cached is None:
            return []
        with contextlib.suppress(FileNotFoundError):
            found = os.listdir(self._cached / prefix)
            return sorted(name for name in found if not name.startswith("."))
        return []

    def names(self, prefix: str) -> list[str]:
        if self.cache.offline:
            return self.known(prefix)
        folder = self._key(prefix.strip("/") + "/" if prefix else "")
        found = []
        with self.errors("list the bucket"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.place.bucket, Prefix=folder, Delimiter="/"
            )
            for page in pages:
                found += [item["Key"][len(folder) :] for item in page.get("Contents", ())]
                folders = page.get("CommonPrefixes", ())
                found += [item["Prefix"][len(folder) :].rstrip("/") for item in folders]
        return sorted(name for name in found if name)

    def entries(self, prefix: str) -> Iterator[Entry]:
        if self.cache.offline:
            if self._cached is not None:
                yield from FolderStore(self._cached).entries(prefix)
            return
        with self.errors("list the bucket"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.place.bucket, Prefix=self._key(prefix)
            )
            for page in pages:
                for item in page.get("Contents", ()):
                    key = item["Key"][len(self.place.prefix) :]
                    yield Entry(key, item["Size"], item["LastModified"])

    def read(self, key: str, fresh: bool = False) -> bytes | None:
        """See Store. What is under models/ never changes, and is kept.

        Offline, what is not in the cache is an error, for nobody knows whether it is there.
        """
        path, lasting = self._kept_at(key), key != "registry.json" and not fresh
        if path is not None and (self.cache.offline or lasting):
            with os_errors("read the cache"), contextlib.suppress(FileNotFoundError):
                return path.read_bytes()
        if self.cache.offline:
            what = "anything" if key == "registry.json" else key
            raise RegistryError(
                f"the cache {self.cache.folder} does not have {what} of {self.place.words}; ask "
                "for it once without --offline"
            )
        data = self._get(key)
        if path is not None and data is not None:
            with os_errors(f"write to the cache {self.cache.folder}"):
                self.cache.keep(path, data)
        return data

    def _kept_at(self, key: str) -> Path | None:
        if key == "registry.json":
            return self.cache.documents(self.place.words) / key
        if self._cached is not None and key.startswith("models/"):
            return self._cached / key
        return None

    def _get(self, key: str) -> bytes | None:
        def all_of(answer: GetObjectOutputTypeDef) -> bytes:
            large = answer["ContentLength"] > MAX_DOCUMENT_BYTES
            return answer["Body"].read(MAX_DOCUMENT_BYTES + 1 if large else None)

        with self.errors("read objects"):
            return self._read_whole(key, all_of)

    def _read_whole(
        self, key: str, take: Callable[[GetObjectOutputTypeDef], T], **asked: Any
    ) -> T | None:
        """What `take` makes of an object, None if it is not there; once more if its body breaks
        off, which botocore leaves to its caller. Raises botocore's errors."""
        from botocore import exceptions as raised

        broken = (
            raised.ResponseStreamingError,
            raised.IncompleteReadError,
            raised.ReadTimeoutError,
        )
        for attempt in range(_READS):
            try:
                answer = self._client.get_object(
                    Bucket=self.place.bucket, Key=self._key(key), **asked
                )
                with contextlib.closing(answer["Body"]):
                    return take(answer)
            except raised.ClientError as error:
                if code_of(error) in _ABSENT:
                    return None
                raise
            except broken:
                if attempt == _READS - 1:
                    raise
                time.sleep(random.uniform(0, 0.1 * 2**attempt))
        raise AssertionError

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if self._create is None:
            from registry.creation import creation

            self._create = creation(self, self._settings.creation)
        return self._create(key, data)

    def put_blob(
        self,
        key: str,
        source: Path,
        entry: FileEntry,
        progress: Progress = silent,
    ) -> None:
        with self.errors("write objects"):
            if entry.size > _CHEAP_BYTES and self._is_whole(key, entry):
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
            stored = self.size(key)
        if stored != entry.size:
            raise RegistryError(
                f"{self.place.words}: {key} has {stored} bytes after {entry.size} were sent, so "
                "the server damages what it gets; use another one"
            )

    def _is_whole(self, key: str, entry: FileEntry) -> bool:
        """Is the file there? Its bytes are read back: a size says nothing of damage, and an ETag
        only what they once were. So a push again repairs, as it says where damage is met."""
        digests = entry.chunks or (entry.sha256,)

        def equal(chunk: Chunk) -> bool:
            data = self._range(key, chunk)
            return data is not None and hashlib.sha256(data).hexdigest() == digests[chunk.number]

        return self.size(key) == entry.size and all(
            _all_at_once(equal, list(chunks_of(entry.size)))
        )

    def blob_file(self, key: str, entry: FileEntry, progress: Progress = silent) -> Path | None:
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

    def digest(self, key: str) -> str | None:
        def of(answer: GetObjectOutputTypeDef) -> str:
            digest = hashlib.sha256()
            for block in answer["Body"].iter_chunks(1 << 20):
                digest.update(block)
            return digest.hexdigest()

        with self.errors("read objects"):
            return self._read_whole(key, of)

    def delete(self, key: str) -> None:
        with self.errors("delete objects"):
            self._client.delete_object(Bucket=self.place.bucket, Key=self._key(key))

    def now(self) -> datetime:
        with self.errors("list the bucket"):
            answer = self._client.list_objects_v2(
                Bucket=self.place.bucket, Prefix=self._key("registry.json"), MaxKeys=1
            )
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])

    def probe(self) -> dict[str, Any]:
        from registry.creation import probe_anew

        found = probe_anew(self)
        self._create = None
        way = {
            "claims": "claim, list, write: slower, and safe as long as a listing shows what was "
            "written",
        }.get(found.way, f"created by a PUT with {found.way}")
        return {"server": self.place.server, "versions": way, "tried": found.found}

    def leftovers(self, before: datetime, remove: bool) -> list[Entry]:
        """See Store: uploads that nobody goes on with, and keys of probes and claims."""
        before = min(before, self.now() - AT_WORK)
        found = [
            entry
            for folder in ("probe/", "claims/")
            for entry in self.entries(folder)
            if entry.modified < before
        ]
        for entry in found if remove else ():
            self.delete(entry.key)
        if remove:
            self.cache.tidy(before)
        return found + self._abandoned(before, remove)

    def _abandoned(self, before: datetime, remove: bool) -> list[Entry]:
        """The uploads in parts that were begun before a time. Those of a server that does not list
        them are for it to remove."""
        from botocore.exceptions import ClientError

        bucket, found = self.place.bucket, []
        with self.errors("list and abort uploads"):
            try:
                pages = self._client.get_paginator("list_multipart_uploads").paginate(
                    Bucket=bucket, Prefix=self._key("blobs/")
                )
                uploads = [upload for page in pages for upload in page.get("Uploads", ())]
            except ClientError as error:
                if status_of(error) not in (405, 501):
                    raise
                return []
            for upload in uploads:
                if upload["Initiated"] >= before:
                    continue
                key = upload["Key"][len(self.place.prefix) :]
                found.append(Entry(f"upload of {key}", 0, upload["Initiated"]))
                if remove:
                    self._client.abort_multipart_upload(
                        Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
        return found

    def put(self, key: str, data: bytes, **conditions: str) -> None:
        """Write a small object, whatever is there. Raises botocore's errors."""
        self._put(self._client, key, data, conditions)

    def put_with_header(self, key: str, data: bytes, header: str) -> None:
        """The same with the header set to true, and signed. Raises botocore's errors."""
        self._put(self._variant(header), key, data, {})

    def put_once(self, key: str, data: bytes, **conditions: str) -> None:
        """The same as `put`, tried once, so that it does not happen later. Raises botocore's
        errors."""
        self._put(self._variant(ONCE), key, data, conditions)

    def _put(self, client: S3Client, key: str, data: bytes, conditions: dict[str, str]) -> None:
        answer = client.put_object(
            Bucket=self.place.bucket,
            Key=self._key(key),
            Body=data,
            ContentMD5=content_md5(data),
            **conditions,  # type: ignore[arg-type]
            **self._protection(key),
        )
        self._check_protected(key, answer.get("ServerSideEncryption"))

    def _protection(self, key: str) -> dict[str, Any]:
        """What a PUT asks for: encryption and lock."""
        settings = self._settings
        asked: dict[str, Any] = {}
        if not key.startswith(_PROTECTED):
            return {}
        if settings.encryption:
            service, colon, kms_key = settings.encryption.partition("kms:")
            asked["ServerSideEncryption"] = f"{service}kms" if colon else settings.encryption
            if colon:
                asked["SSEKMSKeyId"] = kms_key
        if settings.lock:
            asked["ObjectLockMode"] = settings.lock
            until = datetime.now(timezone.utc) + timedelta(days=settings.lock_days or 1)
            asked["ObjectLockRetainUntilDate"] = until
        return asked

    def _variant(self, header: str) -> S3Client:
        """A client that does not try again, or one that sends a header with each PUT."""
        if header not in self._variants:
            self._variants[header] = make_client(self.place, header)
        return self._variants[header]

    def _put_parts(self, key: str, source: Path, entry: FileEntry, progress: Progress) -> None:
        """In parts, several at once; an upload that was cut off goes on with those it lacks."""
        upload_id, stored = self._begun(key)
        wanted = list(chunks_of(entry.size))

        def send(chunk: Chunk) -> tuple[int, str]:
            data = _read_chunk(source, chunk)
            if hashlib.sha256(data).hexdigest() != entry.chunks[chunk.number]:
                raise _changed(source)
            number, md5 = chunk.number + 1, hashlib.md5(data, usedforsecurity=False)
            etag = f'"{md5.hexdigest()}"'
            if stored.get(number) != etag:
                etag = self._client.upload_part(
                    Bucket=self.place.bucket,
                    Key=self._key(key),
                    UploadId=upload_id,
                    PartNumber=number,
                    Body=data,
                    ContentMD5=base64.b64encode(md5.digest()).decode(),
                )["ETag"]
            progress(chunk.size)
            return number, etag

        with os_errors(f"read {source}"):
            parts = _all_at_once(send, wanted)
        self._client.complete_multipart_upload(
            Bucket=self.place.bucket,
            Key=self._key(key),
            UploadId=upload_id,
            MultipartUpload={"Parts": [{"PartNumber": n, "ETag": etag} for n, etag in parts]},
        )
        self._check_protected(key)
        self.cache.note_upload(self._upload(key), None)

    def _upload(self, key: str) -> str:
        """What the cache knows an upload by."""
        return f"{self.place.words}/{key}"

    def _begun(self, key: str) -> tuple[str, dict[int, str]]:
        """An upload to go on with and the ETags of its parts, or a new one."""
        from botocore.exceptions import ClientError

        bucket, name = self.place.bucket, self._key(key)
        upload_id = self.cache.upload(self._upload(key))
        if upload_id is not None:
            try:
                pages = self._client.get_paginator("list_parts").paginate(
                    Bucket=bucket, Key=name, UploadId=upload_id
                )
                parts = [part for page in pages for part in page.get("Parts", ())]
                return upload_id, {part["PartNumber"]: part["ETag"] for part in parts}
            except ClientError as error:
                if status_of(error) != 404:  # it is perhaps there, and would be forgotten
                    raise
        answer = self._client.create_multipart_upload(
            Bucket=bucket, Key=name, **self._protection(key)
        )
        self.cache.note_upload(self._upload(key), answer["UploadId"])
        return answer["UploadId"], {}

    def _fetch(self, key: str, entry: FileEntry, path: Path, progress: Progress) -> bool:
        """Fill a file with a blob, in ranges, several at once; False if there is no such blob.

        Each range is compared with its digest, so what an earlier try has fetched is kept. What the
        cache loses with the power is found out when it is used, so nothing waits for the disk here.
        """
        digests = entry.chunks or (entry.sha256,)
        with os_errors(f"write to the cache {self.cache.folder}"):
            lacking = missing(path, entry.size, digests)
            progress(entry.size - sum(chunk.size for chunk in lacking))
            with path.open("r+b" if path.exists() else "w+b") as file:
                file.truncate(entry.size)

                def receive(chunk: Chunk) -> bool:
                    for _ in range(_READS):
                        data = self._range(key, chunk)
                        if data is None:
                            return False
                        if hashlib.sha256(data).hexdigest() == digests[chunk.number]:
                            os.pwrite(file.fileno(), data, chunk.start)
                            progress(chunk.size)
                            return True
                    raise RegistryError(
                        f"{entry.path}: what {self.place.words} gives for {key} is not what was "
                        f"pushed, from byte {chunk.start}; push the same file again to repair it"
                    )

                with self.errors("read objects"):
                    if not all(_all_at_once(receive, lacking)):
                        return False
        return True

    def _range(self, key: str, chunk: Chunk) -> bytes | None:
        asked = f"bytes={chunk.start}-{chunk.start + chunk.size - 1}"
        return self._read_whole(key, lambda answer: answer["Body"].read(), Range=asked)

    def size(self, key: str) -> int | None:
        """Bytes of an object, None if it is not there."""
        found = self._head(key)
        return None if found is None else found["ContentLength"]

    def _head(self, key: str) -> HeadObjectOutputTypeDef | None:
        from botocore.exceptions import ClientError

        with self.errors("read objects"):
            try:
                return self._client.head_object(Bucket=self.place.bucket, Key=self._key(key))
            except ClientError as error:
                if status_of(error) == 404:
                    return None
                raise

    def _check_protected(self, key: str, *answers: str | None) -> None:
        """Asked of the object and its lock too: of what was sent with a PUT, some servers say that
        they did it in the answer and others later, and do not."""
        from botocore.exceptions import ClientError

        asked = self._protection(key)
        encryption, lock = asked.get("ServerSideEncryption"), asked.get("ObjectLockMode")
        if encryption:
            head = self._head(key)
            for said in (*answers, head.get("ServerSideEncryption") if head else None):
                if said != encryption:
                    raise RegistryError(
                        f"{self.place.words}: {key} was to be encrypted with {encryption}, and the "
                        f"server does {said or 'nothing'}; set up its keys, or use another one"
                    )
        if lock:
            mode = None
            with contextlib.suppress(ClientError):
                found = self._client.get_object_retention(
                    Bucket=self.place.bucket, Key=self._key(key)
                )
                mode = found.get("Retention", {}).get("Mode")
            if mode != lock:
                raise RegistryError(
                    f"{self.place.words}: {key} was to be locked ({lock}), and the server has not; "
                    "create the bucket with object lock"
                )

    def _key(self, key: str) -> str:
        return f"{self.place.prefix}{key}"

    def errors(self, action: str) -> contextlib.AbstractContextManager[None]:
        encryption, lock = self._settings.encryption, self._settings.lock
        if action != "write objects" or not (encryption or lock):
            return s3_errors(self._client, self.place, action)
        asked, remedies = [], []
        if encryption:
            asked.append(f"encrypted with {encryption}")
            remedies.append("set up the server's keys, or leave encryption out")
        if lock:
            asked.append(f"locked ({lock})")
            remedies.append("create the bucket with object lock, or leave the lock out")
        words = f"{action} {' and '.join(asked)}"
        return s3_errors(self._client, self.place, words, "; ".join(remedies))


def _all_at_once(work: Callable[[Chunk], T], chunks: list[Chunk]) -> list[T]:
    """`work` on each chunk, a few at a time; the first error ends it."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(work, chunk) for chunk in chunks]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _read_chunk(source: Path, chunk: Chunk) -> bytes:
    with source.open("rb") as file:
        file.seek(chunk.start)
        return file.read(chunk.size)


def _changed(source: Path) -> RegistryError:
    return RegistryError(f"{source} changed while it was pushed; push it again")
