"""``lora-registry``: publish LoRAs under a version, list them, look at them, get them back."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
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


def file_options(command: Command) -> Command:
    """The options of every command that writes a weight file."""
    for option in (
        click.option("--overwrite", is_flag=True, help="Replace what is there under that name."),
        click.option("--allow-nan", is_flag=True, help="Go on if weights are NaN or infinite."),
        click.option(
            "--ignore-unknown", is_flag=True, help="Leave out keys of a LoRA that fit nothing."
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float16", "float32"]),
            help="Of the tensors written; default: float32 for a LoRA, as it is for a base.",
        ),
        click.option(
            "--out",
            type=click.Path(path_type=Path),
            metavar="PATH",
            required=True,
            help="File (or folder, for diffusers bases) to write.",
        ),
    ):
        command = option(command)
    return command


@main.command()
@click.argument("source", metavar="PATH|NAME[@VERSION]")
@registry_options
def inspect(source: str, location: str | None, as_json: bool) -> None:
    """Say what a weight file or base model folder is, and whether it is complete.

    \b
    Example:
      lora-registry inspect v1-5-pruned-emaonly.safetensors
    """
    from registry import weight_tools as tools

    operand = tools.resolve(source, location)
    found = tools.describe(operand)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    click.echo(f"{operand.name}: {found['kind']}, {found['form']}")
    click.echo("\n".join(f"  {line}" for line in _table(_inspected(found)).splitlines()))
    _section("header", [(k, _plain(v)) for k, v in sorted(found.get("metadata", {}).items())])


@main.command()
@click.argument("source", metavar="PATH|NAME[@VERSION]")
@click.option(
    "--format",
    required=True,
    metavar="FORMAT",
    help="Of a LoRA: kohya, diffusers or mindone; of a base: diffusers, original or mindone.",
)
@click.option("--ema", is_flag=True, help="Of a base that holds both: the EMA copy of the UNet.")
@file_options
@registry_options
def export(
    source: str,
    format: str,
    ema: bool,
    out: Path,
    dtype: str | None,
    ignore_unknown: bool,
    allow_nan: bool,
    overwrite: bool,
    location: str | None,
    as_json: bool,
) -> None:
    """Write a LoRA, or a base model, in another tool's format.

    \b
    Examples:
      lora-registry export emoji-ink@1 --format diffusers --out ink.safetensors
      lora-registry export sd_v1.5-d0ab7146.ckpt --format original --out sd15.safetensors
    """
    from registry import weight_tools as tools

    tools.check_new(out, overwrite)
    operand = tools.resolve(source, location)
    tools.export(operand, out, format, dtype, ema, ignore_unknown, allow_nan)
    _written(out, format, as_json)


@main.command()
@click.argument("loras", metavar="LORA[:WEIGHT]...", nargs=-1, required=True)
@click.option("--rank", type=click.IntRange(1), help="Cut the result to this rank (by SVD).")
@click.option("--base", metavar="PATH", help="Add them into this base model's weights instead.")
@click.option("--format", metavar="FORMAT", help="Of a base: diffusers, original or mindone.")
@file_options
@registry_options
def merge(
    loras: Sequence[str],
    rank: int | None,
    base: str | None,
    format: str | None,
    out: Path,
    dtype: str | None,
    ignore_unknown: bool,
    allow_nan: bool,
    overwrite: bool,
    location: str | None,
    as_json: bool,
) -> None:
    """Merge LoRAs, each with a weight, into one LoRA or into a base model.

    Into one LoRA it is exact, with the ranks side by side, unless --rank cuts it.

    \b
    Examples:
      lora-registry merge style@3:0.7 hero.safetensors:0.5 --out both.safetensors
      lora-registry merge style@3 --base sd15.safetensors --out sd15-style.safetensors
    """
    from registry import weight_tools as tools

    if base and rank:
        raise click.UsageError("--rank is for one LoRA as the result; leave it out with --base.")
    if format and not base:
        raise click.UsageError("--format is for --base; the result of a merge is a kohya file.")
    tools.check_new(out, overwrite)
    pairs = [tools.weighted(text) for text in loras]
    operands = [(tools.resolve(text, location), weight) for text, weight in pairs]
    common = (ignore_unknown, allow_nan, dtype)
    if base:
        words = tools.merge_into_base(base, operands, out, format, *common)
    else:
        words = tools.merge(operands, out, rank, *common)
    _written(out, words, as_json)


@main.command()
@click.argument("source", metavar="PATH|NAME[@VERSION]")
@click.option("--rank", type=click.IntRange(1), required=True, help="The new rank.")
@file_options
@registry_options
def resize(
    source: str,
    rank: int,
    out: Path,
    dtype: str | None,
    ignore_unknown: bool,
    allow_nan: bool,
    overwrite: bool,
    location: str | None,
    as_json: bool,
) -> None:
    """Cut a LoRA to a smaller rank, keeping as much of it as that rank can hold.

    \b
    Example:
      lora-registry resize style@3 --rank 4 --out style-4.safetensors
    """
    from registry import weight_tools as tools

    tools.check_new(out, overwrite)
    operand = tools.resolve(source, location)
    words = tools.resize(operand, out, rank, ignore_unknown, allow_nan, dtype)
    _written(out, words, as_json)


@main.command()
@click.option("--base", required=True, metavar="PATH", help="What was fine-tuned.")
@click.option("--tuned", required=True, metavar="PATH", help="What came out.")
@click.option("--rank", type=click.IntRange(1), required=True, help="Of the LoRA.")
@click.option(
    "--targets",
    type=click.Choice(["attention", "transformer"]),
    default="transformer",
    show_default=True,
    help="Which layers of the UNet; the text encoder's are always looked at.",
)
@click.option("--dtype", type=click.Choice(["float16", "float32"]), help="Default: float32.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", required=True, help="File to write."
)
@click.option("--overwrite", is_flag=True, help="Replace what is there under that name.")
@registry_options
def extract(
    base: str,
    tuned: str,
    rank: int,
    targets: str,
    dtype: str | None,
    out: Path,
    overwrite: bool,
    location: str | None,
    as_json: bool,
) -> None:
    """Turn the difference between a base and its fine-tuned copy into a LoRA.

    \b
    Example:
      lora-registry extract --base sd15.safetensors --tuned comic.safetensors --rank 32 \\
          --out comic-lora.safetensors
    """
    from registry import weight_tools as tools

    tools.check_new(out, overwrite)
    with click.progressbar(length=1000, label="extracting", file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.update(1000 * done // total - bar.pos)

        words = tools.extract(base, tuned, out, rank, targets, dtype, progress)
    _written(out, words, as_json)


def _written(out: Path, words: str, as_json: bool) -> None:
    """The result on stdout, what it is on stderr."""
    if as_json:
        click.echo(json.dumps({"path": str(out), "result": words}, ensure_ascii=False))
    else:
        click.echo(f"wrote {out}: {words}", err=True)
        click.echo(out)


def _inspected(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `inspect` found, a fact a row."""
    tensors = found["tensors"]
    counts = f"{tensors['read']} read, 0 missing, {tensors['left_over']} left over"
    if tensors.get("not_needed"):
        counts += f", {tensors['not_needed']} not needed"
    rows = [("model", found["model"] or "not known from its shapes")]
    if "prediction_type_said_by" in found:
        said = found["prediction_type"]
        by = f"{said}, by {found['prediction_type_said_by']}" if said else "nothing says it"
        rows.append(("prediction", by))
    if "ranks" in found:
        rows.append(("rank", ", ".join(map(str, found["ranks"]))))
        rows.append(("alpha", ", ".join(f"{alpha:g}" for alpha in found["alphas"])))
    rows.append(("dtype", ", ".join(found["dtypes"])))
    rows.append(("tensors", counts))
    rows += [("left over", _plain(key)) for key in found["left_over"][:20]]
    for network, parts in found["networks"].items():
        of = "modules" if "modules" in parts else "tensors"
        rows.append((network, f"{parts[of]} {of}, {parts['parameters']:,} parameters"))
    if found.get("not_finite"):
        rows.append(("not finite", f"{found['not_finite']} values are NaN or infinite"))
    return rows


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


def _plain(value: Any, most: int = 200) -> str:
    """Text as it is, unless it would disturb the terminal; everything else as JSON; cut to fit."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if not text.isprintable():
        text = json.dumps(text, ensure_ascii=False)
    return text if len(text) <= most else f"{text[:most]}…"


def _human_size(size: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


if __name__ == "__main__":
    main()
