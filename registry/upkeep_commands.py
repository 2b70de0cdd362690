"""The commands of lora-registry that look after a registry."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from typing import Any

import click

from registry.command_line import human_size, open_named, print_json, registry_options, table


@click.command()
@click.argument("reference", metavar="[NAME[@VERSION]]", required=False)
@registry_options
@click.pass_context
def verify(ctx: click.Context, reference: str | None, location: str | None, as_json: bool) -> None:
    """Read every file back and compare it with its digest; exit code 1 if one is wrong.

    \b
    Example:
      lora-registry verify
      lora-registry verify emoji-ink@3
    """
    from registry.upkeep import verify as examine

    count = 0

    def told(manifest: Any) -> None:
        nonlocal count
        count += 1
        if not as_json:
            click.echo(f"\r{count} read, last {manifest.reference}", err=True, nl=False)

    found = examine(open_named(location), reference, told)
    if not as_json:
        click.echo("", err=True)
    if as_json:
        print_json([asdict(finding) for finding in found])
    for finding in () if as_json else found:
        click.echo(f"{finding.reference}: {finding.problem}")
    if not found and not as_json:
        click.echo(f"{count} versions are what was pushed")
    ctx.exit(1 if found else 0)


@click.command()
@click.argument("reference", metavar="NAME@VERSION")
@click.option("--reason", required=True, metavar="TEXT", help="Why; shown to who pulls it.")
@registry_options
def yank(reference: str, reason: str, location: str | None, as_json: bool) -> None:
    """Say that a version should not be used; pulls then need --force.

    \b
    Example:
      lora-registry yank emoji-ink@3 --reason "trained on the wrong set"
    """
    from registry import states

    _done(reference, "yanked", states.yank(open_named(location), reference, reason), as_json)


@click.command()
@click.argument("reference", metavar="NAME@VERSION")
@click.option("--reason", default="", metavar="TEXT", help="Why; kept in the log.")
@registry_options
def unyank(reference: str, reason: str, location: str | None, as_json: bool) -> None:
    """Take a yank back.

    \b
    Example:
      lora-registry unyank emoji-ink@3
    """
    from registry import states

    entry = states.unyank(open_named(location), reference, reason)
    _done(reference, "no longer yanked", entry, as_json)


@click.command()
@click.argument("reference", metavar="NAME@VERSION")
@click.option("--reason", default="", metavar="TEXT", help="Why; kept in the log.")
@click.option("--force", is_flag=True, help="Also if an alias means it.")
@registry_options
def rm(reference: str, reason: str, force: bool, location: str | None, as_json: bool) -> None:
    """Remove a version. Its number is not given again; its file goes with gc.

    \b
    Example:
      lora-registry rm emoji-ink@3 --reason "a test"
    """
    from registry import states

    entry = states.remove(open_named(location), reference, reason, force)
    _done(reference, "removed", entry, as_json)


@click.command()
@click.option("--apply", is_flag=True, help="Do it; without, it is only shown.")
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=24.0,
    show_default=True,
    metavar="HOURS",
    help="No push takes longer.",
)
@registry_options
def gc(apply: bool, grace: float, location: str | None, as_json: bool) -> None:
    """Remove files that no version needs: mark them, and after a time remove them.

    \b
    Example:
      lora-registry gc
      lora-registry gc --apply
    """
    from registry.upkeep import collect

    found = collect(open_named(location), dry_run=not apply, grace=timedelta(hours=grace))
    if as_json:
        print_json([asdict(garbage) for garbage in found])
        return
    for garbage in found:
        word = "remove" if garbage.due else "wait"
        click.echo(f"{word:6}  {human_size(garbage.size):>9}  {garbage.key}")
    due = [garbage for garbage in found if garbage.due]
    size = human_size(sum(garbage.size for garbage in due))
    verb = "removed" if apply else "would be removed with --apply"
    click.echo(
        f"{len(due)} files, {size}, {verb}; {len(found) - len(due)} wait until they have been "
        f"marked for {grace:g} hours",
        err=True,
    )


@click.command()
@click.argument("reference", metavar="NAME[@VERSION|@ALIAS]")
@click.argument("destination", metavar="DIR|s3://BUCKET/PREFIX")
@registry_options
def copy(reference: str, destination: str, location: str | None, as_json: bool) -> None:
    """Publish a version in another registry too, as its next version there.

    \b
    Example:
      lora-registry copy emoji-ink@prod s3://bucket/loras
    """
    from registry.api import open_registry
    from registry.upkeep import copy_version

    manifest = copy_version(open_named(location), reference, open_registry(destination))
    if as_json:
        print_json(manifest.model_dump(mode="json"))
    else:
        click.echo(f"{manifest.reference} in {destination}")


@click.command()
@registry_options
def init(location: str | None, as_json: bool) -> None:
    """Make a registry, and find out what its server can do. The first push does it too.

    \b
    Example:
      lora-registry init --registry s3://bucket/loras --endpoint-url https://obs.example.com
    """
    registry = open_named(location)
    registry.create()
    _report(registry, as_json)


@click.command()
@registry_options
def doctor(location: str | None, as_json: bool) -> None:
    """Try what the registry's server does with racing writes, and say what follows.

    \b
    Example:
      lora-registry doctor --registry s3://bucket/loras
    """
    _report(open_named(location), as_json)


def _report(registry: Any, as_json: bool) -> None:
    facts = registry.store.probe()
    if as_json:
        print_json({"registry": registry.location, **facts})
    else:
        click.echo(table([("registry", registry.location), *facts.items()]))


def _done(reference: str, words: str, entry: Any, as_json: bool) -> None:
    if as_json:
        print_json(entry.model_dump(mode="json"))
    else:
        click.echo(f"{reference} is {words}")
