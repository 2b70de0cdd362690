"""Draws the pictures of a plan into their files; what is there already stays."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sampler.errors import SampleError
from sampler.picture import Picture, Setup, from_record, read_record, record, write
from sampler.plan import batches_of

Task = tuple[Picture, Path]
"""A picture and the file it goes to."""
Tell = Callable[[Path, bool], None]
"""Is told of each file: whether the picture is there, or came out as NaN and is not."""


@dataclass(frozen=True)
class Job:
    """Pictures to draw, and with what."""

    setup: Setup
    loras: Mapping[str, str]
    """Files by their sha256."""
    ignore_unknown: bool
    batches: tuple[tuple[Task, ...], ...]

    @property
    def count(self) -> int:
        return sum(map(len, self.batches))


def passes(tasks: Sequence[Task]) -> list[list[Task]]:
    """Which pictures are drawn in one pass, each with its row in it: that follows from the whole
    plan, and not from what is there already."""
    numbers = batches_of([picture for picture, _ in tasks], _tokens())
    return [
        [(replace(tasks[n][0], row=row), tasks[n][1]) for row, n in enumerate(batch)]
        for batch in numbers
    ]


def make_job(
    batches: Sequence[Sequence[Task]],
    setup: Setup,
    loras: Mapping[str, str],
    *,
    ignore_unknown: bool = False,
    overwrite: bool = False,
) -> Job:
    """What of the pictures is still to be drawn.

    Raises SampleError if a file is there that is another picture, unless it may be overwritten.
    """
    left = [
        tuple(task for task in batch if not _is_there(*task, setup, overwrite)) for batch in batches
    ]
    return Job(setup, loras, ignore_unknown, tuple(batch for batch in left if batch))


def _tokens() -> Callable[[Picture], int]:
    """How many tokens of text a picture is drawn with."""
    from diffusion.prompts import chunks
    from diffusion.tokenizer import Tokenizer, clip_vocabulary

    tokenizer = Tokenizer(clip_vocabulary())
    lengths: dict[str, int] = {}

    def length(text: str) -> int:
        if text not in lengths:
            lengths[text] = len(chunks(tokenizer, text))
        return lengths[text]

    return lambda picture: max(length(picture.prompt), length(picture.negative))


def _is_there(picture: Picture, path: Path, setup: Setup, overwrite: bool) -> bool:
    if not path.exists():
        return False
    wanted = json.loads(json.dumps(record(picture, setup)))
    try:
        found = read_record(path)
    except SampleError:
        found = None
    if found == wanted:
        return True
    if not overwrite:
        other = [key for key in wanted if (found or {}).get(key) != wanted[key]]
        what = f" with another {' and '.join(other[:3])}" if found else ""
        raise SampleError(
            f"{path}: there is another picture{what}; choose another --out or add --overwrite"
        )
    return False


def use_device(device_target: str) -> None:
    """Let MindSpore compile graphs, for this kind of device; to be said once in a process."""
    os.environ.setdefault("GLOG_v", "3")
    import mindspore as ms

    from diffusion.models import compile_graphs

    compile_graphs()
    try:
        ms.set_device(device_target)
    except RuntimeError:  # kernels have run in this process, which is as well on the same device
        if ms.get_context("device_target") != device_target:
            raise


def draw(job: Job, tell: Tell, share: slice = slice(None)) -> None:
    """Draw the batches of `share` in this process, on the device that it uses, and write each
    picture as soon as it is there.

    Raises WeightsError or ModelConfigError.
    """
    if not job.batches[share]:
        return
    from diffusion.config import load_model_config
    from sampler.artist import Artist
    from sampler.loras import Lora, read_adapters
    from weights.base import open_base

    setup = job.setup
    base = open_base(setup.base)
    adapters = {
        digest: read_adapters(Lora(file, Path(file), digest, {}), base, job.ignore_unknown)
        for digest, file in job.loras.items()
    }
    artist = Artist(
        load_model_config(setup.model),
        base,
        adapters,
        apart=setup.apart,
        precision=setup.precision,
    )
    for batch in job.batches[share]:
        found = artist.draw([picture for picture, _ in batch])
        for (picture, path), pixels in zip(batch, found, strict=True):
            if pixels is not None:
                write(path, pixels, picture, setup)
            tell(path, pixels is not None)


def as_json(job: Job) -> str:
    """For a process that draws a part of it."""
    batches = [
        [{"picture": asdict(picture), "file": str(path)} for picture, path in batch]
        for batch in job.batches
    ]
    return json.dumps({**asdict(replace(job, batches=())), "batches": batches})


def from_json(text: str) -> Job:
    """The opposite of `as_json`."""
    values: dict[str, Any] = json.loads(text)
    setup = values["setup"]
    batches = tuple(
        tuple(
            (from_record({**task["picture"], **setup}, "the job")[0], Path(task["file"]))
            for task in batch
        )
        for batch in values["batches"]
    )
    return Job(Setup(**setup), values["loras"], values["ignore_unknown"], batches)
