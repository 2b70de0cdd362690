"""The manifest: everything the registry knows about one version."""

from __future__ import annotations

import json
import reprlib
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    ValidationError,
    field_validator,
)

from registry.references import NAME_PATTERN

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(BaseModel):
    """A file of a version: the name it is pulled under, its SHA-256 in hex, its size in bytes."""

    model_config = _STRICT

    # A plain file name, so that a manifest cannot write outside the folder it is pulled into.
    path: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(gt=0)]


class Manifest(BaseModel):
    """One published version. It never changes once it can be read.

    ``push_id`` is random and tells a push that meets an existing manifest whether it is its own.
    The first of ``files`` is the LoRA. ``metadata`` is the lineage given by the publisher: base
    model, data set, configuration, trainer version.
    """

    model_config = _STRICT

    format_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    version: Annotated[int, Field(ge=1)]
    created: AwareDatetime
    push_id: Annotated[str, Field(min_length=1)]
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1)]
    metrics: dict[str, FiniteFloat]
    metadata: dict[str, JsonValue]

    @field_validator("metadata")
    @classmethod
    def _is_standard_json(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        json.dumps(metadata, allow_nan=False)
        return metadata

    @property
    def reference(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"


def problems(error: ValidationError) -> str:
    """The findings of pydantic in one line: ``metrics.fid: Input should be ..., found 'x'``."""
    return "; ".join(
        f"{'.'.join(map(str, finding['loc'])) or 'whole document'}: "
        f"{finding['msg']}, found {reprlib.repr(finding['input'])}"
        for finding in error.errors(include_url=False)
    )
