"""The commands `lora-launch status` and `lora-launch logs`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import click

_POLL_SECONDS = 0.5
_BLOCK = 1 << 20


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN_DIR")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(run: Path, as_json: bool) -> int:
    """Say how a run stands: its state, step, losses, speed, ranks and warnings.

    RUN_DIR may be of a run that is at work, here or on another machine, or has ended; reading it
    does not disturb the run. How long ago a rank was heard of can only be told on its own machine.

    \b
    Example:
      lora-launch status runs/emoji-ink-20260101-120000
      watch lora-launch status runs/emoji-ink-20260101-120000
      lora-launch status --json runs/emoji-ink-20260101-120000
    """
    import json

    from launcher.errors import LaunchError
    from launcher.status import read_status, status_text

    try:
        found = read_status(run)
    except LaunchError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    else:
        click.echo(status_text(found, time.time()))
    return 0


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN_DIR")
@click.option(
    "--rank",
    type=click.IntRange(min=0),
    metavar="N",
    help="Only this rank's. Default: those of msrun, its scheduler and all ranks.",
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is added, until the run ends.")
def logs(run: Path, rank: int | None, follow: bool) -> int:
    """Print what the processes of a run's newest attempt have written.

    A line `==> worker_0.log <==` says where what follows is from. With -f a restart is followed
    into its new attempt; Ctrl-C ends the reading and not the run.

    \b
    Example:
      lora-launch logs runs/emoji-ink-20260101-120000
      lora-launch logs --rank 3 -f runs/emoji-ink-20260101-120000
    """
    from launcher.errors import LaunchError

    try:
        _print_logs(run, rank, follow, sys.stdout.buffer)
    except LaunchError as error:
        raise click.ClickException(str(error)) from error
    except BrokenPipeError:  # nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


def _print_logs(run: Path, rank: int | None, follow: bool, out: BinaryIO) -> None:
    """Raises LaunchError."""
    from launcher.errors import LaunchError
    from launcher.status import is_at_work, paths_of_attempts

    offsets: dict[Path, int] = {}
    shown: Path | None = None
    while True:
        # Asked first, so that everything written before the end is seen below.
        attempt = paths_of_attempts(run)[-1]
        at_work = follow and is_at_work(run, attempt, time.time())
        folder = attempt / "logs"
        paths = _logs(folder, rank)
        if not paths and not at_work:
            there = ", ".join(
                path.stem.removeprefix("worker_") for path in _logs(folder, None, "worker_*")
            )
            wanted = "logs" if rank is None else f"a log of rank {rank}"
            found = f"those of rank {there}" if there else "none"
            raise LaunchError(
                f"{folder}: expected {wanted}, found {found}; name another run or rank"
            )
        for path in paths:
            for block in _added(path, offsets):
                if path != shown and (rank is None or shown is not None):
                    gap = "\n" if shown is not None else ""
                    place = (
                        path.name if attempt.name == "attempt_1" else f"{attempt.name}/{path.name}"
                    )
                    out.write(f"{gap}==> {place} <==\n".encode())
                shown = path
                out.write(block)
        out.flush()
        if not at_work:
            return
        time.sleep(_POLL_SECONDS)


def _logs(folder: Path, rank: int | None, pattern: str = "*.log") -> list[Path]:
    """Logs in the order of their beginnings: msrun, scheduler, ranks by number."""
    if rank is not None:
        pattern = f"worker_{rank}.log"
    order = {"msrun": 0, "scheduler": 1, "worker": 2}

    def key(path: Path) -> tuple[int, int, str]:
        kind, _, number = path.stem.partition("_")
        return order.get(kind, 3), int(number) if number.isdigit() else 0, path.name

    return sorted(folder.glob(pattern), key=key)


def _added(path: Path, offsets: dict[Path, int]) -> Iterator[bytes]:
    """What a file has more than it had the last time."""
    try:
        with path.open("rb") as file:
            file.seek(offsets.get(path, 0))
            while block := file.read(_BLOCK):
                yield block
            offsets[path] = file.tell()
    except FileNotFoundError:
        return
