"""``lora-registry``: publish LoRAs under a version, list them, look at them, get them back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.command_line import (
    OneSentenceGroup,
    human_size,
    open_named,
    plain,
    registry_options,
    section,
    table,
    transfer,
)
from registry.errors import RegistryError, os_errors
from registry.life_commands import alias, compare, history, log, promote
from registry.upkeep_commands import copy, doctor, gc, init, rm, unyank, verify, yank
from registry.weight_commands import export, extract, inspect, merge, resize

if TYPE_CHECKING:
    from registry.api import Manifest


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
    registry = open_named(location)
    metrics = _read_metrics(metrics_file) if metrics_file else {}
    with transfer("pushing", file.stat().st_size if file.is_file() else 0) as progress:
        manifest = registry.push(
            name,
            file,
            metrics=metrics,
            metadata=_parse_settings(settings),
            progress=progress,
        )
    size = human_size(manifest.files[0].size)
    click.echo(f"pushed {file} ({size}) to {registry.location}", err=True)
    click.echo(_as_json(manifest) if as_json else manifest.reference)


@main.command()
@click.argument("reference", metavar="NAME[@VERSION|@ALIAS|@sha256:…]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    required=True,
    help="Folder to write into; made if need be.",
)
@click.option("--overwrite", is_flag=True, help="Replace another file of the same name.")
@click.option("--force", is_flag=True, help="Also if the version is yanked.")
@registry_options
def pull(
    reference: str,
    out: Path,
    overwrite: bool,
    force: bool,
    location: str | None,
    as_json: bool,
) -> None:
    """Copy a verified version into a folder and print its path.

    \b
    Example:
      lora-registry pull emoji-ink@1 --out models/ --registry ~/loras
    """
    registry = open_named(location)
    manifest = registry.resolve(reference)
    entry = manifest.files[0]
    with transfer("pulling", entry.size) as progress:
        path = registry.pull(
            manifest.reference, out, overwrite=overwrite, yanked=force, progress=progress
        )
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
    registry = open_named(location)
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
        click.echo(table([header, *(_row(manifest, count) for manifest, count in newest)]))
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
    manifest = open_named(location).resolve(reference)
    if as_json:
        click.echo(_as_json(manifest))
        return
    click.echo(manifest.reference)
    click.echo(f"created {manifest.created:%Y-%m-%d %H:%M:%S} UTC")
    section("files", [(file.path, human_size(file.size), file.sha256) for file in manifest.files])
    section("metrics", [(key, f"{value:g}") for key, value in manifest.metrics.items()])
    section("metadata", [(key, plain(value)) for key, value in manifest.metadata.items()])


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
        human_size(manifest.files[0].size),
        " ".join(f"{key}={value:.4g}" for key, value in manifest.metrics.items()),
    )


for command in (
    *(alias, promote, compare, history, log),
    *(verify, yank, unyank, rm, gc, copy, init, doctor),
    *(inspect, export, merge, resize, extract),
):
    main.add_command(command)


if __name__ == "__main__":
    main()
