"""``lora-registry``: publish LoRAs under a version, list them, look at them, get them back."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from registry.errors import RegistryError, os_errors

if TYPE_CHECKING:
    from registry.api import Manifest, Registry

Command = TypeVar("Command", bound=Callable[..., Any])


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
        except RegistryError as error:
            if ctx.meta.get("debug"):
                traceback.print_exc()
            raise click.ClickException(str(error)) from error


def _set_debug(ctx: click.Context, _: click.Parameter, debug: bool) -> None:
    ctx.meta["debug"] = debug


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
            metavar="DIR",
            envvar="LORA_REGISTRY",
            show_envvar=True,
            help="Folder of the registry.",
        ),
    ):
        command = option(command)
    return command


@click.group(cls=OneSentenceGroup, invoke_without_command=True)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Keep LoRAs under NAME@VERSION with their scores and lineage.

    A version is a number, counts from 1 and never changes. NAME alone is its newest version.

    \b
    Example:
      export LORA_REGISTRY=~/loras
      lora-registry push out/lora.safetensors emoji-ink
      lora-registry pull emoji-ink@1 --out models/
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("name")
@click.option(
    "--metrics",
    "metrics_file",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Scores: a JSON object of numbers.",
)
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Lineage, kept as text; may be repeated.",
)
@registry_options
def push(
    file: Path,
    name: str,
    metrics_file: Path | None,
    settings: Sequence[str],
    location: str | None,
    as_json: bool,
) -> None:
    """Publish FILE as the next version of NAME and print NAME@VERSION.

    \b
    Example:
      lora-registry push out/lora.safetensors emoji-ink --registry ~/loras \\
          --metrics out/scores.json --set base=sd15 --set dataset=emoji-200
    """
    registry = _open(location)
    metrics = _read_metrics(metrics_file) if metrics_file else {}
    manifest = registry.push(name, file, metrics=metrics, metadata=_parse_settings(settings))
    size = _human_size(manifest.files[0].size)
    click.echo(f"pushed {file} ({size}) to {registry.location}", err=True)
    click.echo(_as_json(manifest) if as_json else manifest.reference)


@main.command()
@click.argument("reference", metavar="NAME[@VERSION]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    required=True,
    help="Folder to write into; made if need be.",
)
@click.option("--overwrite", is_flag=True, help="Replace another file of the same name.")
@registry_options
def pull(reference: str, out: Path, overwrite: bool, location: str | None, as_json: bool) -> None:
    """Copy a verified version into a folder and print its path.

    \b
    Example:
      lora-registry pull emoji-ink@1 --out models/ --registry ~/loras
    """
    registry = _open(location)
    manifest = registry.resolve(reference)
    path = registry.pull(manifest.reference, out, overwrite=overwrite)
    entry = manifest.files[0]
    click.echo(f"{manifest.reference} verified, sha256 {entry.sha256}", err=True)
    if as_json:
        result = {
            "name": manifest.name,
            "version": manifest.version,
            "path": str(path),
            "sha256": entry.sha256,
            "size": entry.size,
        }
        click.echo(json.dumps(result, indent=2))
    else:
        click.echo(path)


@main.command("list")
@registry_options
def list_(location: str | None, as_json: bool) -> None:
    """List the models, each with its newest version.

    \b
    Example:
      lora-registry list --registry ~/loras
    """
    registry = _open(location)
    newest = [(registry.resolve(name), len(registry.versions(name))) for name in registry.names()]
    if as_json:
        rows = [
            {
                "name": manifest.name,
                "latest": manifest.version,
                "versions": count,
                "created": manifest.model_dump(mode="json")["created"],
                "size": manifest.files[0].size,
                "metrics": manifest.metrics,
            }
            for manifest, count in newest
        ]
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    elif newest:
        header = ("name", "latest", "versions", "created (UTC)", "size", "metrics")
        click.echo(_table([header, *(_row(manifest, count) for manifest, count in newest)]))
    else:
        click.echo(f"the registry {registry.location} has no models yet", err=True)


@main.command()
@click.argument("reference", metavar="NAME[@VERSION]")
@registry_options
def show(reference: str, location: str | None, as_json: bool) -> None:
    """Show the files, digests, scores and lineage of a version.

    \b
    Example:
      lora-registry show emoji-ink@1 --registry ~/loras
    """
    manifest = _open(location).resolve(reference)
    if as_json:
        click.echo(_as_json(manifest))
        return
    click.echo(manifest.reference)
    click.echo(f"created {manifest.created:%Y-%m-%d %H:%M:%S} UTC")
    _section("files", [(file.path, _human_size(file.size), file.sha256) for file in manifest.files])
    _section("metrics", [(key, f"{value:g}") for key, value in manifest.metrics.items()])
    _section("metadata", [(key, _plain(value)) for key, value in manifest.metadata.items()])


def _open(location: str | None) -> Registry:
    # Only here, so that --help does not wait for pydantic.
    from registry.api import open_registry

    if not location:
        raise RegistryError("no registry is named; give --registry DIR or set LORA_REGISTRY")
    return open_registry(location)


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        with os_errors("read the metrics"):
            metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RegistryError(f"{path} is not JSON ({error}); correct it") from error
    if not isinstance(metrics, dict):
        raise RegistryError(f'{path} should hold a JSON object of numbers such as {{"fid": 41.5}}')
    return metrics


def _parse_settings(settings: Sequence[str]) -> dict[str, str]:
    metadata: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise RegistryError(f"--set {setting!r} should be KEY=VALUE, such as base=sd15")
        if key in metadata:
            raise RegistryError(f"--set gives {key!r} twice; give it once")
        metadata[key] = value
    return metadata


def _as_json(manifest: Manifest) -> str:
    return manifest.model_dump_json(indent=2)


def _row(manifest: Manifest, count: int) -> tuple[str, ...]:
    return (
        manifest.name,
        str(manifest.version),
        str(count),
        f"{manifest.created:%Y-%m-%d %H:%M}",
        _human_size(manifest.files[0].size),
        " ".join(f"{key}={value:.4g}" for key, value in manifest.metrics.items()),
    )


def _section(title: str, rows: Sequence[Sequence[str]]) -> None:
    if rows:
        click.echo(f"\n{title}")
        click.echo("\n".join(f"  {line}" for line in _table(rows).splitlines()))


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _plain(value: Any) -> str:
    """Text as it is, unless it would disturb the terminal; everything else as JSON."""
    if isinstance(value, str) and value.isprintable():
        return value
    return json.dumps(value, ensure_ascii=False)


def _human_size(size: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


if __name__ == "__main__":
    main()
