"""Where a gallery is written: a folder, or a prefix in a bucket; only what changed, whole files.

`site.json` says which files are the gallery's, with their digests. A file that is about to be
written is noted there without one first, so that a run that was cut off is made good by the next.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.errors import RegistryError, os_errors
from registry.files import written_beside
from registry.models import in_parallel
from registry.references import NAME_PATTERN
from registry.site_content import Advance, Seen

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from registry.s3_client import Place

RECORD = "site.json"
_NAME = NAME_PATTERN.strip("^$")
# What a record names can be removed, so it names nothing else.
_PATH = rf"^(index\.html|style\.css|icon\.svg|loras/{_NAME}\.html|pictures/[0-9a-f]{{64}}\.png)$"
_DIGEST = r"^[0-9a-f]{64}$"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".json": "application/json",
}


class Record(BaseModel):
    """Which files a gallery consists of."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format_version: Literal[1] = 1
    files: dict[
        Annotated[str, Field(pattern=_PATH)], Annotated[str, Field(pattern=_DIGEST)] | None
    ] = {}
    pictures: dict[Annotated[str, Field(pattern=_DIGEST)], Seen] = {}
    """What the pictures say, so that they need not be read again."""


class Target(Protocol):
    """Files under names with slashes. Each method raises RegistryError if that fails."""

    words: str
    """How the user names it."""

    def sizes(self) -> dict[str, int]:
        """The files that are there, with their sizes in bytes."""

    def read(self, path: str) -> bytes | None:
        """A file, None if it is not there."""

    def write(self, path: str, data: bytes) -> None:
        """Make or replace a file, whole or not at all."""

    def delete(self, path: str) -> None:
        """Remove a file, if it is there."""


def target(out: str) -> Target:
    """Where `out`, a folder or s3://BUCKET/PREFIX, says. Raises RegistryError if it is neither."""
    if "://" not in out:
        return FolderTarget(Path(out).expanduser())
    if not out.startswith("s3://"):
        raise RegistryError(f"a site goes to a folder or s3://BUCKET/PREFIX, and {out} is neither")
    from registry.s3_client import make_client, parse_place

    if os.environ.get("LORA_REGISTRY_OFFLINE"):
        raise RegistryError(
            f"{out} cannot be written offline; name a folder, or leave --offline out"
        )
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    place = parse_place(out, endpoint)
    return BucketTarget(place, make_client(place))


class FolderTarget:
    """A folder, made if need be. Names that begin with a dot are not the gallery's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.words = str(folder)
        if folder.exists() and not folder.is_dir():
            raise RegistryError(
                f"{folder} is a file, and a site goes to a folder; name another one"
            )

    def sizes(self) -> dict[str, int]:
        found = {}
        with os_errors(f"read {self.folder}"):
            for path in self.folder.rglob("*"):
                name = path.relative_to(self.folder).as_posix()
                if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
                    found[name] = path.stat().st_size
        return found

    def read(self, path: str) -> bytes | None:
        with os_errors(f"read {self.folder}"):
            try:
                return (self.folder / path).read_bytes()
            except FileNotFoundError:
                return None

    def write(self, path: str, data: bytes) -> None:
        destination = self.folder / path
        with (
            os_errors(f"write {path} into {self.folder}"),
            written_beside(destination, lambda file: file.write(data)) as temporary,
        ):
            os.replace(temporary, destination)

    def delete(self, path: str) -> None:
        with os_errors(f"remove {path} from {self.folder}"):
            (self.folder / path).unlink(missing_ok=True)


class BucketTarget:
    """A prefix in a bucket; each file says what it is, so that a browser can show it."""

    def __init__(self, place: Place, client: S3Client) -> None:
        self.place = place
        self.words = place.location
        self._client = client

    def sizes(self) -> dict[str, int]:
        found = {}
        with self._errors("list the bucket"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.place.bucket, Prefix=self.place.prefix
            )
            for page in pages:
                for item in page.get("Contents", ()):
                    found[item["Key"][len(self.place.prefix) :]] = item["Size"]
        found.pop("", None)  # what some programs make for a folder
        return found

    def read(self, path: str) -> bytes | None:
        from botocore.exceptions import ClientError

        from registry.s3_errors import code_of

        with self._errors("read objects"):
            try:
                answer = self._client.get_object(Bucket=self.place.bucket, Key=self._key(path))
            except ClientError as error:
                if code_of(error) in ("NoSuchKey", "404", "NotFound"):
                    return None
                raise
            return answer["Body"].read()

    def write(self, path: str, data: bytes) -> None:
        from registry.s3_client import content_md5

        lasting = path.startswith("pictures/")
        with self._errors("write objects"):
            self._client.put_object(
                Bucket=self.place.bucket,
                Key=self._key(path),
                Body=data,
                ContentType=_TYPES[path[path.rindex(".") :]],
                CacheControl="public, max-age=31536000, immutable" if lasting else "no-cache",
                ContentMD5=content_md5(data),
            )

    def delete(self, path: str) -> None:
        with self._errors("delete objects"):
            self._client.delete_object(Bucket=self.place.bucket, Key=self._key(path))

    def _key(self, path: str) -> str:
        return f"{self.place.prefix}{path}"

    def _errors(self, action: str):  # type: ignore[no-untyped-def]
        from registry.s3_errors import s3_errors

        return s3_errors(self._client, self.place, action)


@dataclass
class Output:
    """A gallery as it is, and as it becomes."""

    target: Target
    record: Record
    sizes: dict[str, int]
    written: list[str] = field(default_factory=list)
    unchanged: int = 0
    removed: list[str] = field(default_factory=list)

    def has(self, path: str, size: int, sha256: str) -> bool:
        """Is this file there, as far as its record and size tell?"""
        return self.record.files.get(path) == sha256 and self.sizes.get(path) == size

    def announce(self, paths: list[str]) -> None:
        """Note that files are about to be written."""
        if paths:
            self.record.files.update(dict.fromkeys(paths))
            self._note()

    def put(self, path: str, data: bytes) -> None:
        """Write a file that was announced."""
        self.target.write(path, data)
        self.record.files[path] = hashlib.sha256(data).hexdigest()
        self.written.append(path)

    def put_changed(self, files: Mapping[str, bytes], begin: Callable[[int], Advance]) -> None:
        """Write those files that are not there yet, the last only after all others."""
        changed = [
            path
            for path, data in files.items()
            if not self.has(path, len(data), hashlib.sha256(data).hexdigest())
        ]
        self.unchanged += len(files) - len(changed)
        self.announce(changed)
        advance = begin(len(changed))

        def put(path: str) -> None:
            self.put(path, files[path])
            advance(1)

        last = list(files)[-1]
        in_parallel(put, [path for path in changed if path != last])
        in_parallel(put, [path for path in changed if path == last])

    def finish(self, wanted: set[str], pictures: dict[str, Seen]) -> None:
        """Remove the gallery's files that are not wanted any more, and write its record."""
        gone = sorted(set(self.record.files) - wanted)
        self.removed = [path for path in gone if path in self.sizes]
        in_parallel(self.target.delete, gone)
        self.record.files = {path: self.record.files[path] for path in sorted(wanted)}
        self.record.pictures = {digest: pictures[digest] for digest in sorted(pictures)}
        self.written.sort()
        self._note()

    def _note(self) -> None:
        data = self.record.model_dump_json(indent=1, exclude_defaults=False).encode() + b"\n"
        if self.target.read(RECORD) != data:
            self.target.write(RECORD, data)


def output(out: str) -> Output:
    """What is there now. Raises RegistryError if it is something else than a gallery."""
    place = target(out)
    sizes, data = place.sizes(), place.read(RECORD)
    if data is None:
        if sizes:
            raise RegistryError(
                f"{place.words} is not empty and has no {RECORD}, so it is not a site of "
                "lora-registry; name an empty or a new place"
            )
        return Output(place, Record(), {})
    try:
        record = Record.model_validate_json(data)
    except ValidationError as error:
        raise RegistryError(
            f"{RECORD} in {place.words} is no record of a site that this program can read; remove "
            "that site, or name another place"
        ) from error
    return Output(place, record, sizes)
