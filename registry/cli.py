"""``lora-registry``: publish LoRAs under a version, list them, look at them, get them back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.command_line import (
    OneSentenceGroup,
    open_named,
    print_json,
    read_text,
    registry_options,
    table,
    transfer,
)
from registry.errors import RegistryError, os_errors
from registry.life_commands import alias, compare, history, log, promote
from registry.look_commands import card, list_, show
from registry.site_command import site
from registry.upkeep_commands import copy, doctor, gc, init, key, rm, unyank, verify, yank
from registry.weight_commands import export, extract, import_, inspect, merge, resize
from registry.words import human_size

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
    help="Scores: a JSON object of numbers, or of value, lower and upper.",
)
@click.option(
    "--evaluation",
    "evaluation_file",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="How they were measured: a JSON object. Gates compare only what agrees in it.",
)
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Lineage, kept as text; may be repeated.",
)
@click.option("--trigger", "triggers", metavar="WORDS", multiple=True, help="To be in the prompt.")
@click.option("--licence", metavar="NAME", help="Under which it may be used, such as apache-2.0.")
@click.option("--tag", "tags", metavar="WORD", multiple=True, help="For `list --tag`.")
@click.option(
    "--sample",
    "samples",
    type=click.Path(path_type=Path),
    metavar="PNG",
    multiple=True,
    help="A picture that it drew; may be repeated.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="A page about its training, as lora-launch report writes it.",
)
@click.option(
    "--card",
    "card_file",
    type=click.Path(path_type=Path),
    metavar="FILE.md",
    help="Its page; default: written from the facts.",
)
@click.option(
    "--verify",
    type=click.Choice(["size", "full"]),
    default="size",
    show_default=True,
    help="full reads every byte back.",
)
@click.option("--later", is_flag=True, help="Keep it on this machine until `lora-registry sync`.")
@registry_options
def push(
    file: Path,
    name: str,
    metrics_file: Path | None,
    evaluation_file: Path | None,
    settings: Sequence[str],
    triggers: Sequence[str],
    licence: str | None,
    tags: Sequence[str],
    samples: Sequence[Path],
    report: Path | None,
    card_file: Path | None,
    verify: str,
    later: bool,
    location: str | None,
    as_json: bool,
) -> None:
    """Publish FILE as the next version of NAME and print NAME@VERSION.

    \b
    Example:
      lora-registry push out/lora.safetensors emoji-ink --registry ~/loras \\
          --metrics out/scores.json --trigger "ink drawing" --licence apache-2.0 \\
          --sample out/penguin.png --set base=sd15 --set dataset=emoji-200
    """
    registry = open_named(location)
    metadata = _parse_settings(settings)
    given = {"trigger_words": [*triggers], "licence": licence, "tags": [*tags]}
    facts: dict[str, Any] = {
        "metrics": _read_object(metrics_file, 'numbers such as {"fid": 41.5}'),
        "evaluation": _read_object(evaluation_file, 'facts such as {"images": 500}'),
        "metadata": {**metadata, **{word: value for word, value in given.items() if value}},
        "samples": samples,
        "report": report,
        "card": read_text(card_file) if card_file else None,
    }
    if later:
        from registry import queue

        folder = queue.add(registry, name, file, **facts)
        click.echo(f"{file} waits; send it with: lora-registry sync", err=True)
        click.echo(json.dumps({"queued": str(folder)}) if as_json else folder)
        return
    with transfer("pushing", _size(file)) as progress:
        manifest = registry.push(name, file, **facts, progress=progress)
    if verify == "full":
        try:
            registry.check(manifest)
        except RegistryError as error:
            raise RegistryError(f"{manifest.reference} is published, and {error}") from error
    size = human_size(manifest.files[0].size)
    click.echo(f"pushed {file} ({size}) to {registry.location}", err=True)
    click.echo(_as_json(manifest) if as_json else manifest.reference)


@main.command()
@click.option("--list", "listing", is_flag=True, help="Show what waits, for any registry.")
@click.option(
    "--drop", "dropped", metavar="PUSH", multiple=True, help="Forget a push, as --list names it."
)
@registry_options
def sync(listing: bool, dropped: Sequence[str], location: str | None, as_json: bool) -> None:
    """Send the pushes that wait on this machine (push --later), and print what they became.

    One that is not taken waits on, and does not keep the others.

    \b
    Example:
      lora-registry sync --registry s3://bucket/loras
      lora-registry sync --list
    """
    from registry import queue

    if listing or dropped:
        _tend(dropped, as_json)
        return
    registry = open_named(location)
    jobs, sent, failed = queue.waiting(registry), [], 0
    for folder, push in jobs:
        try:
            push = push or queue.read(folder)
            with transfer(f"pushing {push.name}", _size(folder / push.file)) as progress:
                manifest = queue.deliver(registry, folder, progress)
        except RegistryError as error:
            failed += 1
            click.echo(f"{folder.name}: {error}", err=True)
            continue
        if manifest is not None:  # or another process has sent it
            sent.append(manifest.reference)
            if not as_json:
                click.echo(manifest.reference)
    if as_json:
        print_json(sent)
    if failed:
        raise RegistryError(
            f"{failed} of {len(jobs)} pushes wait on; correct what is said above, or forget one "
            "with sync --drop"
        )
    if not jobs and not as_json:
        others = len(queue.waiting())
        more = f"; {others} wait for others, see sync --list" if others else ""
        click.echo(f"nothing waits for {registry.store.address}{more}", err=True)


def _tend(dropped: Sequence[str], as_json: bool) -> None:
    """Forget pushes, and show those that wait then."""
    from registry import queue

    there = {folder.name: (folder, push) for folder, push in queue.waiting()}
    for name in dropped:
        if name not in there:
            raise RegistryError(f"no push {name} waits; see sync --list")
    for name in set(dropped):
        queue.drop(there.pop(name)[0])
    rows = [
        (name, *((push.name, push.file, push.address) if push else ("cannot be read", "", "")))
        for name, (_, push) in there.items()
    ]
    if as_json:
        print_json([dict(zip(("push", "name", "file", "to"), row, strict=True)) for row in rows])
    elif rows:
        click.echo(table(rows))
    else:
        click.echo("nothing waits", err=True)


@main.command()
@click.argument("reference", metavar="NAME[@VERSION|@ALIAS|@sha256:…]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    required=True,
    help="Folder to write into; made if need be.",
)
@click.option("--all", "everything", is_flag=True, help="Its card and pictures too.")
@click.option("--overwrite", is_flag=True, help="Replace another file of the same name.")
@click.option("--force", is_flag=True, help="Also if the version is yanked.")
@registry_options
def pull(
    reference: str,
    out: Path,
    everything: bool,
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
    model, manifest = registry.located(reference)
    wanted = manifest.files if everything else manifest.files[:1]
    with transfer("pulling", sum(entry.size for entry in wanted)) as progress:
        path = registry.pull_version(
            model,
            manifest,
            out,
            overwrite=overwrite,
            everything=everything,
            yanked=force,
            progress=progress,
        )
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
        print_json(result)
    else:
        click.echo(path)


def _size(file: Path) -> int:
    """For a bar; that it is not there is for others to say."""
    return file.stat().st_size if file.is_file() else 0


def _read_object(path: Path | None, words: str) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        with os_errors(f"read {path.name}"):
            found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RegistryError(f"{path} is not JSON ({error}); correct it") from error
    if not isinstance(found, dict):
        raise RegistryError(f"{path} should hold a JSON object of {words}")
    return found


def _parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
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


for command in (
    *(list_, show, card, site),
    *(alias, promote, compare, history, log),
    *(verify, yank, unyank, rm, gc, copy, init, doctor, key),
    *(inspect, export, import_, merge, resize, extract),
):
    main.add_command(command)


if __name__ == "__main__":
    main()
