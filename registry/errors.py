"""The one exception of the registry, and what others raise in its words."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class RegistryError(Exception):
    """What was expected, what was found and what to do, in one sentence."""


class Damaged(RegistryError):
    """A document of the registry is there, and is not what was written."""


@contextmanager
def os_errors(action: str) -> Iterator[None]:
    """Turn an ``OSError`` raised in the block into a :class:`RegistryError`.

    ``action`` completes the words "cannot ...".
    """
    try:
        yield
    except OSError as error:
        # A full disk is reported by a descriptor, without a file name.
        where = f"{error.filename}: " if error.filename else ""
        raise RegistryError(
            f"cannot {action}: {where}{error.strerror}; "
            "check the path, its permissions and the free space"
        ) from error


def problems(error: ValidationError) -> str:
    """The findings of pydantic in one line: ``metrics.fid: Input should be ..., found 'x'``."""
    found = []
    for finding in error.errors(include_url=False):
        where = ".".join(map(str, finding["loc"])) or "whole document"
        if finding["type"] == "value_error":  # one of our own, which says all that there is to say
            found.append(f"{where}: {finding['ctx']['error']}")
        else:
            found.append(f"{where}: {finding['msg']}, found {reprlib.repr(finding['input'])}")
    return "; ".join(found)
