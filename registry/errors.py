"""The one exception of the registry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class RegistryError(Exception):
    """What was expected, what was found and what to do, in one sentence."""


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
