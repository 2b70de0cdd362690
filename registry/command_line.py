"""What the commands of lora-registry have in common."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from registry.errors import RegistryError, os_errors
from registry.words import human_size

if TYPE_CHECKING:
    from registry.api import Registry

Command = TypeVar("Command", bound=Callable[..., Any])
_SHOWN_BYTES = 4 << 20
"""Less than this is there before a bar is."""


class OneSentenceErrors(click.Command):
    """A command whose every failure is ``error: ...`` on stderr and exit code 2."""

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            result = super().main(*args, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            message = error.format_message()
            if isinstance(error, click.UsageError) and error.ctx is not None:
                message += f" See '{error.ctx.command_path} --help'."
            click.echo(f"error: {message}", err=True)
            sys.exit(2)
        except click.Abort:
            click.echo("error: interrupted", err=True)
            sys.exit(130)
        sys.exit(result if isinstance(result, int) else 0)


class OneSentenceGroup(OneSentenceErrors, click.Group):
    """The same for a group, and for what the registry raises in its commands."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except _input_errors() as error:
            if ctx.meta.get("debug"):
                traceback.print_exc()
            raise click.ClickException(str(error)) from error


def _input_errors() -> tuple[type[Exception], ...]:
    """What bad input raises; `weights`, which needs numpy, only if a command has loaded it."""
    module: Any = sys.modules.get("weights.files")
    return (RegistryError, module.WeightsError) if module else (RegistryError,)


def _set_debug(ctx: click.Context, _: click.Parameter, debug: bool) -> None:
    ctx.meta["debug"] = debug


def _set_endpoint(ctx: click.Context, _: click.Parameter, url: str | None) -> None:
    if url is not None:
        os.environ["AWS_ENDPOINT_URL_S3"] = url


def _set_offline(ctx: click.Context, _: click.Parameter, offline: bool) -> None:
    if offline:
        os.environ["LORA_REGISTRY_OFFLINE"] = "1"


def registry_options(command: Command) -> Command:
    """The options of every command: which registry, the form of the output, tracebacks."""
    for option in (
        click.option(
            "--debug",
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_set_debug,
            help="Show the traceback of an error.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option(
            "--registry",
            "location",
            metavar="DIR|s3://BUCKET/PREFIX",
            envvar="LORA_REGISTRY",
            show_envvar=True,
            help="Where the registry is.",
        ),
        click.option(
            "--endpoint-url",
            metavar="URL",
            expose_value=False,
            callback=_set_endpoint,
            help="An S3 server that is not AWS's. Default: AWS_ENDPOINT_URL_S3.",
        ),
        click.option(
            "--offline",
            is_flag=True,
            expose_value=False,
            callback=_set_offline,
            help="Ask no server; take what the cache has.",
        ),
    ):
        command = option(command)
    return command


def open_named(location: str | None) -> Registry:
    """The registry that an option or the environment names. Raises RegistryError if none does."""
    # Only here, so that --help does not wait for pydantic.
    from registry.api import open_registry

    if not location:
        raise RegistryError("no registry is named; give --registry DIR or set LORA_REGISTRY")
    return open_registry(location)


def read_text(path: Path) -> str:
    """Of a file that the user names. Raises RegistryError if it cannot be read."""
    try:
        with os_errors(f"read {path.name}"):
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RegistryError(f"{path} is not UTF-8 text; save it as that") from error


def print_json(value: Any) -> None:
    """To stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def transfer(label: str, length: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, with rate and time left; what it yields is told the bytes that came."""
    lock, begun, done = threading.Lock(), time.monotonic(), 0

    def rate(_: Any) -> str:
        return f"{human_size(int(done / max(1e-3, time.monotonic() - begun)))}/s"

    if length < _SHOWN_BYTES:
        yield lambda _: None
        return
    with click.progressbar(
        length=length, label=label, file=sys.stderr, show_eta=True, item_show_func=rate
    ) as bar:

        def advance(size: int) -> None:
            nonlocal done
            with lock:  # parts come from several threads
                done += size
                bar.update(size)

        yield advance


def section(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a title, nothing if there are none."""
    if rows:
        click.echo(f"\n{title}")
        click.echo("\n".join(f"  {line}" for line in table(rows).splitlines()))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def plain(value: Any, most: int = 200) -> str:
    """Text as it is, unless it would disturb the terminal; everything else as JSON; cut to fit."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if not text.isprintable():
        text = json.dumps(text, ensure_ascii=False)
    return text if len(text) <= most else f"{text[:most]}…"
