"""The commands of lora-registry that look at what is published."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.command_line import (
    open_named,
    plain,
    print_json,
    read_text,
    registry_options,
    section,
    table,
)
from registry.words import human_size

if TYPE_CHECKING:
    from registry.api import Manifest, Model, Registry


@click.command("list")
@click.argument("pattern", metavar="[PATTERN]", default="*")
@click.option("--versions", is_flag=True, help="Every version, not the newest alone.")
@click.option("--base", metavar="TEXT", help="Whose base has this in its name or digest.")
@click.option("--trigger", metavar="TEXT", help="Whose trigger words have this in them.")
@click.option("--tag", metavar="WORD", help="That have this tag.")
@registry_options
def list_(
    pattern: str,
    versions: bool,
    base: str | None,
    trigger: str | None,
    tag: str | None,
    location: str | None,
    as_json: bool,
) -> None:
    """List the models whose names fit PATTERN, each with its newest version.

    \b
    Examples:
      lora-registry list --registry ~/loras
      lora-registry list 'emoji-*' --versions --trigger ink
    """
    registry = open_named(location)
    rows = []
    for model, manifest in _listed(registry, pattern, versions):
        if _fits(manifest, base, trigger, tag):
            rows.append((model, manifest))
    if as_json:
        print_json([_listing(model, manifest) for model, manifest in rows])
    elif rows:
        header = ("name", "version", "of", "means", "created (UTC)", "size", "metrics")
        click.echo(table([header, *(_row(model, manifest) for model, manifest in rows)]))
    elif pattern == "*" and not (base or trigger or tag):
        click.echo(f"the registry {registry.location} has no models yet", err=True)
    else:
        click.echo("nothing there fits", err=True)


def _listed(registry: Registry, pattern: str, every: bool) -> list[tuple[Model, Manifest]]:
    """The newest version of each model, or all."""
    found = [model for model in registry.models() if fnmatch.fnmatchcase(model.name, pattern)]
    places = [
        (model, version)
        for model in found
        for version in (model.versions if every else [model.newest or model.versions[-1]])
    ]
    named = {model.name: model for model in found}
    manifests = registry.readable([(model.name, version) for model, version in places])
    return [(named[manifest.name], manifest) for manifest in manifests]


def _fits(manifest: Manifest, base: str | None, trigger: str | None, tag: str | None) -> bool:
    from registry import facts

    bases = f"{facts.base_name(manifest)}\n{facts.base_digest(manifest)}".lower()
    words = "\n".join(facts.words(manifest, "trigger_words")).lower()
    return (
        (base is None or base.lower() in bases)
        and (trigger is None or trigger.lower() in words)
        and (tag is None or tag in facts.words(manifest, "tags"))
    )


@click.command()
@click.argument("reference", metavar="NAME[@VERSION|@ALIAS]")
@click.option("--all", "everything", is_flag=True, help="All of its metadata too.")
@registry_options
def show(reference: str, everything: bool, location: str | None, as_json: bool) -> None:
    """Show whether a version can be used, for what, and where it comes from.

    \b
    Example:
      lora-registry show emoji-ink@1 --registry ~/loras
      lora-registry show emoji-ink@1 --all
    """
    from registry import facts, signing
    from registry.evaluation import measured

    registry = open_named(location)
    model, manifest = registry.located(reference)
    yanked = model.yanked.get(manifest.version)
    meaning = model.meaning(manifest.version)
    policy = signing.policy()
    signer = signing.signer(manifest.signature)
    if as_json:
        state = {"aliases": meaning, "yanked": yanked, "versions": list(model.versions)}
        print_json({**manifest.model_dump(mode="json"), **state})
        return
    click.echo(manifest.reference + "".join(f", {alias}" for alias in meaning))
    if yanked is not None:
        click.echo(f"DO NOT USE: {plain(yanked)}")
    by = f" by {plain(manifest.pushed_by)}" if manifest.pushed_by else ""
    click.echo(f"created {manifest.created:%Y-%m-%d %H:%M:%S} UTC{by}")
    if signer:
        click.echo(
            f"signed by {policy.name_of(manifest.signature) or signer if policy else signer}"
        )
    newest = f"; {model.newest} is the newest" if model.newest != manifest.version else ""
    click.echo(f"{len(model.versions)} versions{newest}")
    section("facts", [(title, plain(text)) for title, text in facts.rows(manifest)])
    rows = [
        (plain(score[0]), *score[1:3], f"base {score[3]}" if score[3] else "")
        for score in facts.scores(manifest)
    ]
    section("metrics", rows)
    section("measured with", [(plain(text, 1000),) for text in measured(manifest)])
    section("files", [(file.path, human_size(file.size), file.sha256) for file in manifest.files])
    if everything:
        section("metadata", [(plain(k), plain(value)) for k, value in manifest.metadata.items()])
    triggers = facts.words(manifest, "trigger_words")
    prompt = f"{triggers[0]}, a lighthouse" if triggers else "a lighthouse"
    section("use", [(f'lora-sample --lora {manifest.reference} --prompt "{plain(prompt)}"',)])


@click.command()
@click.argument("reference", metavar="NAME[@VERSION|@ALIAS]")
@click.option(
    "--set",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE.md",
    help="Replace it; what it was before is kept.",
)
@registry_options
def card(reference: str, file: Path | None, location: str | None, as_json: bool) -> None:
    """Print the page of a version, or replace it.

    \b
    Example:
      lora-registry card emoji-ink@3 > card.md
      lora-registry card emoji-ink@3 --set card.md
    """
    from registry import pages

    registry = open_named(location)
    manifest = registry.resolve(reference)
    if file is not None:
        pages.edit(registry, manifest, read_text(file))
    text = pages.page(registry, manifest)
    if as_json:
        print_json({"reference": manifest.reference, "card": text})
    else:
        click.echo(text, nl=False)


def _listing(model: Model, manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "version": manifest.version,
        "latest": model.newest,
        "versions": len(model.versions),
        "aliases": model.meaning(manifest.version),
        "yanked": model.yanked.get(manifest.version),
        "created": manifest.model_dump(mode="json")["created"],
        "size": manifest.files[0].size,
        "metrics": manifest.metrics,
    }


def _row(model: Model, manifest: Manifest) -> tuple[str, ...]:
    means = [*model.meaning(manifest.version)]
    if manifest.version in model.yanked:
        means.append("yanked")
    metrics = [(k, v) for k, v in manifest.metrics.items() if not k.endswith("_base")]
    return (
        manifest.name,
        str(manifest.version),
        str(len(model.versions)),
        " ".join(means),
        f"{manifest.created:%Y-%m-%d %H:%M}",
        human_size(manifest.files[0].size),
        " ".join(f"{plain(key)}={value:.4g}" for key, value in metrics),
    )
