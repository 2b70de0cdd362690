"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from cluster.errors import ClusterError


def write_whole(path: Path, text: str) -> None:
    """Write a file that others may be waiting for; what was there before is replaced.

    Raises ClusterError if it cannot be written; then nothing has changed.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # the other nodes may run as another user
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ClusterError(
            f"{path}: cannot write it: {error.strerror}; check the folder, its permissions and "
            "the free space"
        ) from error
