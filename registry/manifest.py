"""The manifest: everything the registry knows about one version."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    ValidationInfo,
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
    chunks: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = ()
    """SHA-256 of each 8 MiB, if there are several: what is damaged is fetched again alone."""


class Manifest(BaseModel):
    """One published version. It never changes once it can be read.

    ``push_id`` is random and tells a push that meets an existing manifest whether it is its own.
    The first of ``files`` is the LoRA, then come its card, pictures and report. ``metadata`` is
    the lineage given by the publisher: base model, data set, configuration, trainer version.
    """

    model_config = _STRICT

    format_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    version: Annotated[int, Field(ge=1)]
    created: AwareDatetime
    push_id: Annotated[str, Field(min_length=1)]
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1)]
    metrics: dict[str, FiniteFloat]
    intervals: dict[str, tuple[FiniteFloat, FiniteFloat]] = {}
    """Of metrics: lower and upper end of the interval that the true value lies in."""
    evaluation: dict[str, JsonValue] = {}
    """How the metrics were measured. Only what was measured alike is compared."""
    metadata: dict[str, JsonValue]
    header: dict[str, str] = {}
    """What the LoRA's own header says of its base, trigger words and training."""
    pushed_by: str = ""
    signature: str | None = None
    """By whom it is vouched for; see registry.signing."""

    @field_validator("metadata", "evaluation")
    @classmethod
    def _is_standard_json(cls, values: dict[str, Any]) -> dict[str, Any]:
        json.dumps(values, allow_nan=False)
        return values

    @field_validator("intervals")
    @classmethod
    def _are_of_metrics(
        cls, intervals: dict[str, tuple[float, float]], info: ValidationInfo
    ) -> dict[str, tuple[float, float]]:
        for key, (lower, upper) in intervals.items():
            value = info.data.get("metrics", {}).get(key)
            if value is not None and not lower <= value <= upper:
                raise ValueError(f"{key} is {value:g} and not within {lower:g} to {upper:g}")
        return intervals

    @property
    def reference(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"
