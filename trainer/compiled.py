"""The compiled step on disk, so that the second start of a run does not compile it again.

MindSpore's own cache looks at the source files and at the order in which graphs are compiled, not
at what a graph was made of: it would give a run the graph of another one. So a step has a folder of
its own here, named after the digest of everything that it follows from. The folder cannot be
changed in a process that has used one; that is why only the first shape's step is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mindspore as ms

_ROOMS = ("diffusion", "trainer", "weights")


class CompiledStep:
    """The step's graphs in a folder; None keeps none.

    `facts` is whatever they follow from beside the source code, MindSpore's version and CANN's.
    """

    def __init__(self, folder: Path | None, facts: Mapping[str, Any]):
        self.folder = folder
        self.facts = [ms.__version__, _cann(), _source_digest(), facts]

    @contextmanager
    def used(self, shape: tuple[int, ...]) -> Iterator[None]:
        """Take what is compiled inside from the folder, or put it there, whole or not at all.

        Only the first call in a process does; `shape` is that of the step's latents.
        """
        if self.folder is None:
            yield
            return
        key = hashlib.sha256(json.dumps([self.facts, shape]).encode()).hexdigest()
        path = self.folder / key
        used = path if path.is_dir() else self.folder / f".{key}.{os.getpid()}"
        self.folder = None
        ms.set_context(enable_compile_cache=True, compile_cache_path=str(used))
        try:
            yield
            if used != path and used.is_dir() and not path.is_dir():
                used.rename(path)
        finally:
            ms.set_context(enable_compile_cache=False)
            if used != path:
                shutil.rmtree(used, ignore_errors=True)


def _cann() -> str | None:
    """Where CANN is, with links followed: the folder is named after its version."""
    home = os.environ.get("ASCEND_HOME_PATH")
    return os.path.realpath(home) if home else None


def _source_digest() -> str:
    """sha256 over the source code that graphs are compiled from."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for room in _ROOMS:
        for path in sorted((root / room).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
