"""registry.json: what holds for a whole registry."""

from __future__ import annotations

import uuid
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT_VERSION = 1

Way = Literal["If-None-Match", "x-obs-forbid-overwrite", "x-oss-forbid-overwrite", "claims"]
"""How an object in a bucket is created unless it is there; see registry.creation."""


class Settings(BaseModel):
    """Written when the registry is made, and never again."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format_version: Literal[1] = 1
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] = Field(
        default_factory=lambda: uuid.uuid4().hex
    )
    """Random, so that what is cached of one registry is not taken for another at its place."""
    encryption: Annotated[str, Field(pattern=r"^(AES256|aws:kms(:[A-Za-z0-9:/_-]+)?)$")] | None = (
        None
    )
    """What the server is to encrypt every object with: AES256, aws:kms or aws:kms:KEY."""
    lock: Literal["GOVERNANCE", "COMPLIANCE"] | None = None
    """Mode of the object lock on every object."""
    lock_days: Annotated[int, Field(ge=1, le=36500)] | None = None
    creation: Way | None = None
    """How the server at which it was made creates what is not there; None in a folder. Whoever
    writes does so in this way: two ways beside each other do not keep each other off."""
