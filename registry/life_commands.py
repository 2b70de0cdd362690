"""The commands of lora-registry about what becomes of versions: aliases, gates, comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from registry.command_line import (
    OneSentenceGroup,
    open_named,
    plain,
    print_json,
    registry_options,
    section,
    table,
)
from registry.errors import RegistryError

if TYPE_CHECKING:
    from registry.manifest import Manifest

_REASON = click.option("--reason", default="", metavar="TEXT", help="Why; kept in the history.")


@click.group(cls=OneSentenceGroup)
def alias() -> None:
    """Let a word such as prod mean a version, with its history.

    \b
    Example:
      lora-registry alias set emoji-ink@3 prod
      lora-registry alias rollback emoji-ink prod
    """


@alias.command("set")
@click.argument("reference", metavar="NAME@VERSION")
@click.argument("word", metavar="ALIAS")
@_REASON
@registry_options
def set_(reference: str, word: str, reason: str, location: str | None, as_json: bool) -> None:
    """Let ALIAS mean a version.

    \b
    Example:
      lora-registry alias set emoji-ink@3 prod --reason "darker ink"
    """
    from registry.aliases import SET, assign

    registry = open_named(location)
    model, manifest = registry.located(reference)
    fields = {"action": SET, "version": manifest.version, "reason": reason}
    entry = assign(registry, model, word, manifest.version, lambda _: fields)
    _changed(model.name, word, entry, as_json)


@alias.command("rm")
@click.argument("name")
@click.argument("word", metavar="ALIAS")
@_REASON
@registry_options
def remove(name: str, word: str, reason: str, location: str | None, as_json: bool) -> None:
    """Let ALIAS mean nothing; its history stays.

    \b
    Example:
      lora-registry alias rm emoji-ink beta
    """
    from registry.aliases import remove_alias

    _changed(name, word, remove_alias(open_named(location), name, word, reason=reason), as_json)


@alias.command()
@click.argument("name")
@click.argument("word", metavar="ALIAS")
@_REASON
@registry_options
def rollback(name: str, word: str, reason: str, location: str | None, as_json: bool) -> None:
    """Let ALIAS mean what it meant before.

    \b
    Example:
      lora-registry alias rollback emoji-ink prod --reason "washed out"
    """
    from registry import aliases

    entry = aliases.rollback(open_named(location), name, word, reason=reason)
    _changed(name, word, entry, as_json)


@alias.command("list")
@click.argument("name")
@registry_options
def list_(name: str, location: str | None, as_json: bool) -> None:
    """List the aliases of a model.

    \b
    Example:
      lora-registry alias list emoji-ink
    """
    from registry.aliases import aliases

    found = aliases(open_named(location), name)
    if as_json:
        print_json({word: entry.version for word, entry in found.items()})
    elif found:
        rows = [
            (word, f"{name}@{e.version}", f"{e.at:%Y-%m-%d %H:%M}", plain(e.by))
            for word, e in found.items()
        ]
        click.echo(table([("alias", "means", "since (UTC)", "by"), *rows]))
    else:
        click.echo(f"{name} has no aliases yet", err=True)


@alias.command("history")
@click.argument("name")
@click.argument("word", metavar="ALIAS")
@registry_options
def alias_history(name: str, word: str, location: str | None, as_json: bool) -> None:
    """Show what ALIAS has meant, and who changed it.

    \b
    Example:
      lora-registry alias history emoji-ink prod
    """
    from registry import aliases

    found = aliases.history(open_named(location), name, word)
    if as_json:
        print_json([entry.model_dump(mode="json") for entry in found])
        return
    rows = [
        (
            f"{entry.at:%Y-%m-%d %H:%M}",
            entry.action,
            "nothing" if entry.version is None else f"{name}@{entry.version}",
            plain(entry.by),
            plain(entry.reason),
        )
        for entry in found
    ]
    click.echo(table([("when (UTC)", "what", "meant then", "by", "reason"), *rows]))


@click.command()
@click.argument("reference", metavar="NAME@VERSION")
@click.argument("word", metavar="ALIAS")
@click.option("--gate", metavar="EXPR", help="What must hold, such as 'kid < prod.kid'.")
@click.option("--force", is_flag=True, help="Also if the gate refuses; recorded.")
@_REASON
@registry_options
def promote(
    reference: str,
    word: str,
    gate: str | None,
    force: bool,
    reason: str,
    location: str | None,
    as_json: bool,
) -> None:
    """Let ALIAS mean a version, if it is good enough.

    A gate compares metrics: kid, its interval kid.lower and kid.upper, base.kid without the LoRA,
    prod.kid of the version that prod means now; with < <= > >= == != and or not + - * /. Names with
    other characters go in backquotes: `prod-eu`.kid.

    \b
    Example:
      lora-registry promote emoji-ink@4 prod \\
          --gate 'validation_loss < base.validation_loss and validation_loss < prod.validation_loss'
    """
    from registry import gates

    registry = open_named(location)
    entry, verdict = gates.promote(registry, reference, word, gate, force=force, reason=reason)
    for comparison in verdict.comparisons if verdict else ():
        click.echo(plain(comparison, 1000), err=True)
    _changed(reference.partition("@")[0], word, entry, as_json)


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@registry_options
def compare(first: str, second: str, location: str | None, as_json: bool) -> None:
    """Show in what two versions differ: scores, base, data, every key of the config.

    \b
    Example:
      lora-registry compare emoji-ink@3 emoji-ink@4
    """
    from registry.evaluation import difference, flat, unsaid

    registry = open_named(location)
    one, two = registry.resolve(first), registry.resolve(second)
    metrics = {
        key: [one.metrics.get(key), two.metrics.get(key)] for key in {**one.metrics, **two.metrics}
    }
    apart = {
        key: different
        for key, values in metrics.items()
        if None not in values and (different := difference(one, two, key))
    }
    silent = [
        key for key, values in metrics.items() if None not in values and unsaid(one, two, key)
    ]
    facts = [flat(manifest.metadata) for manifest in (one, two)]
    differing = {
        key: [facts[0].get(key), facts[1].get(key)]
        for key in sorted({*facts[0], *facts[1]})
        if facts[0].get(key) != facts[1].get(key)
    }
    if as_json:
        print_json(
            {
                "versions": [one.reference, two.reference],
                "metrics": metrics,
                "measured_differently": apart,
                "measuring_unsaid": silent,
                "differing": differing,
            }
        )
        return
    click.echo(f"{one.reference} and {two.reference}")
    rows = [
        (plain(key), _number(a), _number(b), "" if key in apart else _change(a, b))
        for key, (a, b) in metrics.items()
    ]
    section("metrics", rows)
    for reason in dict.fromkeys(apart.values()):
        names = ", ".join(plain(key) for key, found in apart.items() if found == reason)
        click.echo(f"\nwarning: {names} cannot be compared: {reason}", err=True)
    if silent:
        names = ", ".join(map(plain, silent))
        click.echo(f"\nwarning: nothing says how {names} was measured, of neither", err=True)
    section(
        "differing", [(plain(key), plain(a, 40), plain(b, 40)) for key, (a, b) in differing.items()]
    )


@click.command()
@click.argument("name")
@click.argument("metric")
@registry_options
def history(name: str, metric: str, location: str | None, as_json: bool) -> None:
    """Show a metric over all versions of a model.

    \b
    Example:
      lora-registry history emoji-ink validation_loss
    """
    registry = open_named(location)
    versions = [(name, version) for version in registry.versions(name)]
    manifests = list(filter(_allowed, registry.readable(versions)))
    values = {m.version: m.metrics[metric] for m in manifests if metric in m.metrics}
    if not values:
        known = ", ".join(sorted({key for m in manifests for key in m.metrics})) or "none"
        raise RegistryError(f"no version of {name} has the metric {metric!r}; they have {known}")
    if as_json:
        print_json(values)
        return
    low, high = min(values.values()), max(values.values())
    rows = []
    for version, value in values.items():
        height = 0.5 if high == low else (value - low) / (high - low)
        rows.append((f"{name}@{version}", f"{value:g}", "█" * round(1 + 29 * height)))
    click.echo(table([("version", plain(metric), f"{low:g} to {high:g}"), *rows]))


def _allowed(manifest: Manifest) -> bool:
    """Does the policy let a version count?"""
    from registry import signing

    try:
        signing.judge(manifest.reference, manifest.name, manifest.signature)
    except RegistryError as error:
        click.echo(f"warning: {error}", err=True)
        return False
    return True


@click.command()
@click.argument("name")
@registry_options
def log(name: str, location: str | None, as_json: bool) -> None:
    """Show who did what to a model, and when.

    \b
    Example:
      lora-registry log emoji-ink
    """
    from registry.states import log as events

    found = events(open_named(location), name)
    if as_json:
        print_json(
            [
                {"at": e.at.isoformat(), "by": e.by, "what": e.text, "reason": e.reason}
                for e in found
            ]
        )
        return
    rows = [(f"{e.at:%Y-%m-%d %H:%M}", plain(e.by), plain(e.text), plain(e.reason)) for e in found]
    click.echo(table([("when (UTC)", "by", "what", "reason"), *rows]))


def _changed(name: str, word: str, entry: Any, as_json: bool) -> None:
    if as_json:
        print_json(entry.model_dump(mode="json"))
    else:
        means = "nothing" if entry.version is None else f"{name}@{entry.version}"
        click.echo(f"{name}@{word} means {means}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def _change(one: float | None, two: float | None) -> str:
    if one is None or two is None or not one:
        return ""
    return f"{100 * (two - one) / abs(one):+.1f} %"
