"""The commands of lora-registry that read and write weight files."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from registry.command_line import (
    Command,
    open_named,
    plain,
    print_json,
    registry_options,
    section,
    table,
)
from registry.errors import RegistryError


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


@click.command()
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
    click.echo("\n".join(f"  {line}" for line in table(_inspected(found)).splitlines()))
    section("header", [(k, plain(v)) for k, v in sorted(found.get("metadata", {}).items())])


@click.command()
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


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="For all, as versions one after the other by age.")
@click.option("--licence", metavar="NAME", help="Under which they may be used.")
@click.option("--tag", "tags", metavar="WORD", multiple=True, help="For `list --tag`.")
@click.option("--ignore-unknown", is_flag=True, help="Leave out keys that fit nothing.")
@registry_options
def import_(
    files: Sequence[Path],
    name: str | None,
    licence: str | None,
    tags: Sequence[str],
    ignore_unknown: bool,
    location: str | None,
    as_json: bool,
) -> None:
    """Publish LoRA files of any tool, each under its own name; one that is there is left alone.

    What is not a kohya file is converted into one. A picture beside it (NAME.preview.png or
    NAME.png) comes with it.

    \b
    Examples:
      lora-registry import ~/loras/*.safetensors
      lora-registry import final_v1.safetensors final_v3_really.safetensors --name comic
    """
    from registry import importing
    from weights.files import WeightsError

    registry = open_named(location)
    given: dict[str, Any] = {"licence": licence, "tags": [*tags]}
    metadata = {key: value for key, value in given.items() if value}
    found, failed = [], 0
    for file in importing.in_order(files) if name else files:
        try:
            reference, new = importing.publish(registry, file, name, metadata, ignore_unknown)
        except (RegistryError, WeightsError) as error:
            if len(files) == 1:
                raise
            failed += 1
            click.echo(f"warning: {error}", err=True)
            continue
        found.append({"file": str(file), "reference": reference, "new": new})
        if not as_json:
            click.echo(reference if new else f"{reference} is {file} already")
    if as_json:
        print_json(found)
    if failed:
        raise RegistryError(f"{failed} of {len(files)} files were not taken; see above")


@click.command()
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


@click.command()
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


@click.command()
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
    rows += [("left over", plain(key)) for key in found["left_over"][:20]]
    for network, parts in found["networks"].items():
        of = "modules" if "modules" in parts else "tensors"
        rows.append((network, f"{parts[of]} {of}, {parts['parameters']:,} parameters"))
    if found.get("not_finite"):
        rows.append(("not finite", f"{found['not_finite']} values are NaN or infinite"))
    return rows
