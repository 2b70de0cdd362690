"""The commands of lora-registry that look after a registry."""

from __future__ import annotations

import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import click

from registry.command_line import open_named, print_json, registry_options, table
from registry.errors import RegistryError
from registry.words import human_size


@click.command()
@click.argument("reference", metavar="[NAME[@VERSION]]", required=False)
@click.option(
    "--require-signature",
    is_flag=True,
    help="Also that it is signed, by whom the policy (LORA_REGISTRY_POLICY) names if there is one.",
)
@registry_options
@click.pass_context
def verify(
    ctx: click.Context,
    reference: str | None,
    require_signature: bool,
    location: str | None,
    as_json: bool,
) -> None:
    """Read everything back and compare it with its digest; exit code 1 if something is wrong.

    \b
    Example:
      lora-registry verify
      lora-registry verify emoji-ink@3
    """
    from registry.upkeep import verify as examine

    count, watched = 0, sys.stderr.isatty() and not as_json

    def told(manifest: Any) -> None:
        nonlocal count
        count += 1
        if watched:
            click.echo(f"\r{count} read, last {manifest.reference}", err=True, nl=False)

    found = examine(open_named(location), reference, told, require_signature)
    if watched:
        click.echo("", err=True)
    if as_json:
        print_json([asdict(finding) for finding in found])
    for finding in () if as_json else found:
        click.echo(f"{finding.reference}: {finding.problem}")
    if not found and not as_json:
        click.echo("1 version is" if count == 1 else f"{count} versions are", nl=False)
        click.echo(" what was pushed")
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
@click.argument("pattern", metavar="[PATTERN]", default="*")
@click.option("--apply", is_flag=True, help="Do it; without, it is only shown.")
@click.option(
    "--keep-last",
    type=click.IntRange(min=1),
    metavar="N",
    help="First remove versions of the models that fit PATTERN, but for the last N of each.",
)
@click.option(
    "--keep-best",
    metavar="lowest:METRIC|highest:METRIC",
    help="The same, but for the best of each; versions that an alias means always stay.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=24.0,
    show_default=True,
    metavar="HOURS",
    help="No push takes longer; less than 1 needs --force.",
)
@click.option("--force", is_flag=True, help="Also with so little grace that it can hurt a push.")
@registry_options
@click.pass_context
def gc(
    ctx: click.Context,
    pattern: str,
    apply: bool,
    keep_last: int | None,
    keep_best: str | None,
    grace: float,
    force: bool,
    location: str | None,
    as_json: bool,
) -> None:
    """Remove files that no version needs: mark them, and after a time remove them.

    \b
    Examples:
      lora-registry gc
      lora-registry gc --apply
      lora-registry gc 'emoji-*' --keep-last 5 --keep-best lowest:validation_loss --apply
    """
    from registry.garbage import SHORTEST_GRACE
    from registry.upkeep import collect, retire, superfluous

    time = timedelta(hours=grace)
    if apply and time < SHORTEST_GRACE and not force:
        raise RegistryError(
            f"--grace {grace:g} can take a file from under a push that takes longer; give 1 hour "
            "or more, or --force if nobody pushes"
        )
    registry = open_named(location)
    old = superfluous(registry, pattern, keep_last, keep_best)
    rules = {"--keep-last": keep_last, "--keep-best": keep_best}
    reason = " ".join(["gc", *(f"{rule} {value}" for rule, value in rules.items() if value)])
    kept = retire(registry, old, reason) if apply else []
    old = [reference for reference in old if reference not in {k.reference for k in kept}]
    found = collect(registry, dry_run=not apply, grace=time)
    for finding in kept:
        click.echo(f"warning: {finding.reference} is not removed: {finding.problem}", err=True)
    if as_json:
        print_json({"versions": old, "files": [asdict(garbage) for garbage in found]})
        ctx.exit(1 if kept else 0)
    for reference in old:
        click.echo(f"{'removed' if apply else 'remove'}  {reference}")
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
    ctx.exit(1 if kept else 0)


@click.command()
@click.argument("reference", metavar="NAME[@VERSION|@ALIAS]")
@click.argument("destination", metavar="DIR|s3://BUCKET/PREFIX")
@click.option(
    "--to-endpoint-url",
    metavar="URL",
    help="The S3 server of the other registry. Default: that of this one.",
)
@click.option("--force", is_flag=True, help="Also if the version is yanked.")
@registry_options
def copy(
    reference: str,
    destination: str,
    to_endpoint_url: str | None,
    force: bool,
    location: str | None,
    as_json: bool,
) -> None:
    """Publish a version in another registry too, as its next version there, unless it is there.

    \b
    Example:
      lora-registry copy emoji-ink@prod s3://bucket/loras
      lora-registry copy emoji-ink@prod s3://loras --to-endpoint-url https://other.example.com
    """
    from registry.api import open_registry
    from registry.upkeep import copy_version

    other = open_registry(destination, endpoint_url=to_endpoint_url)
    manifest, new = copy_version(open_named(location), reference, other, yanked=force)
    if as_json:
        print_json(manifest.model_dump(mode="json"))
    else:
        there = "" if new else " already"
        click.echo(f"{manifest.reference} in {destination}{there}")


@click.command()
@click.option(
    "--encryption",
    metavar="AES256|aws:kms[:KEY]",
    help="What the server is to encrypt every object with.",
)
@click.option(
    "--lock",
    type=click.Choice(["GOVERNANCE", "COMPLIANCE"]),
    help="Object lock on every object; the bucket must have been made with it.",
)
@click.option("--lock-days", type=click.IntRange(1, 36500), help="For how long.")
@registry_options
def init(
    encryption: str | None,
    lock: Literal["GOVERNANCE", "COMPLIANCE"] | None,
    lock_days: int | None,
    location: str | None,
    as_json: bool,
) -> None:
    """Make a registry, and find out what its server can do. The first push does it too.

    What is asked of the server, and it does not do, is an error.

    \b
    Example:
      lora-registry init --registry s3://bucket/loras --endpoint-url https://obs.example.com
      lora-registry init --registry s3://bucket/loras --encryption AES256
    """
    from pydantic import ValidationError

    from registry.settings import Settings

    if (lock is None) != (lock_days is None):
        raise click.UsageError("--lock and --lock-days go together.")
    try:
        settings = Settings(encryption=encryption, lock=lock, lock_days=lock_days)
    except ValidationError as error:
        raise RegistryError(
            f"--encryption: expected AES256, aws:kms or aws:kms:KEY, found {encryption!r}"
        ) from error
    registry = open_named(location)
    try:
        made = registry.create(settings)
    except RegistryError as error:
        raise RegistryError(f"{error}; nothing was made") from error
    if not made and (encryption or lock):
        raise RegistryError(
            f"{registry.location} is there already, and its settings stay; copy its versions into "
            "a new one"
        )
    _report(registry, as_json)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@registry_options
def key(file: Path, location: str | None, as_json: bool) -> None:
    """Make a key that signs what you publish, in FILE, or read it, and print its public half.

    \b
    Example:
      lora-registry key ~/.config/lora-registry/key.pem
      export LORA_REGISTRY_KEY=~/.config/lora-registry/key.pem
    """
    from registry import signing

    found = signing.read_key(file) if file.exists() else signing.new_key(file)
    if as_json:
        print_json({"key": str(file), "public": found.public})
    else:
        click.echo(found.public)


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
    facts = {"registry": registry.location, **registry.store.probe()}
    if as_json:
        print_json(facts)
        return
    tried = facts.pop("tried", {})
    rows = [*facts.items(), *((f"tried {way}", verdict) for way, verdict in tried.items())]
    click.echo(table(rows))


def _done(reference: str, words: str, entry: Any, as_json: bool) -> None:
    if as_json:
        print_json(entry.model_dump(mode="json"))
    else:
        click.echo(f"{reference} is {words}")
