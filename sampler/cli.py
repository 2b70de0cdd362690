"""`lora-sample`: draws with a base model and LoRAs."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from registry.command_line import OneSentenceErrors
from sampler.errors import SampleError
from sampler.options import (
    BASE,
    DEVICES,
    LORAS,
    SETTINGS,
    input_errors,
    options,
    parse_size,
    parse_weighted,
)
from sampler.plan import parse_axis
from sampler.prompt_file import parse, read


@click.command(cls=OneSentenceErrors)
@options(LORAS)
@click.option("--prompt", "prompts", multiple=True, help="What to draw; may be given again.")
@click.option(
    "--prompts",
    "prompt_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prompts, one a line, each with settings of its own if need be: --n negative, --w, --h, "
    "--s steps, --d seed, --l scale.",
)
@options(SETTINGS)
@click.option(
    "--grid",
    "axes",
    multiple=True,
    metavar="SETTING=V,V,…",
    help="Draw every value of a setting, such as weight=0,0.5,1, side by side; given twice, in "
    "columns and rows. Also lora=, steps=, scale=, solver=, seed=, prompt=, negative=, ….",
)
@click.option("--compare", is_flag=True, help="Draw each picture with the base alone, too.")
@click.option(
    "--again",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PICTURE",
    help="Draw this picture once more, from what it says of itself; may be given again.",
)
@click.option(
    "--out",
    default=Path("pictures"),
    show_default=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where each picture becomes a PNG. What is there already is not drawn anew.",
)
@click.option(
    "--sheet",
    type=click.Path(path_type=Path),
    metavar="PNG",
    help="All pictures on one page. Default: none, but with --grid and --compare DIR/sheet.png.",
)
@click.option("--overwrite", is_flag=True, help="Replace other pictures.")
@options(BASE)
@click.option(
    "--apart",
    is_flag=True,
    help="Keep LoRAs beside the weights instead of merging them: slower, but other weights of them "
    "cost nothing.",
)
@click.option(
    "--batch",
    default=1,
    show_default=True,
    type=click.IntRange(1, 256),
    help="Pictures in one pass. More are faster, but the last bits then depend on the place in it.",
)
@options(DEVICES)
@click.option(
    "--json", "as_json", is_flag=True, help="Print everything about the pictures as JSON."
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(**given: Any) -> int:
    """Draw with a base model and LoRAs: a PNG for each prompt and seed.

    Prints the files. Each says how it was drawn, so that --again can do it once more, to the bit on
    the same platform. In a prompt, (word:1.3) counts more and (word:0.7) less; long ones are not
    cut off.

    \b
    Example:
      lora-sample --registry runs/registry --lora emoji-ink --prompt "ink emoji of penguin"
      lora-sample --lora style@3:0.7 --lora hero.safetensors --prompts scenes.txt --devices 8
      lora-sample --lora style@prod --prompt "a fox" --grid weight=0,0.5,1 --grid steps=10,20
      lora-sample --again pictures/0001-a-fox-7.png --out again
    """
    as_json, debug = given.pop("as_json"), given.pop("debug")
    try:
        if given["again"]:
            _check_alone(click.get_current_context())
        drawn, sheet = _draw(given)
    except input_errors() as error:
        if debug:
            traceback.print_exc()
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo(
            f"interrupted; the pictures that are done are in {given['out']}, and the same "
            "command goes on",
            err=True,
        )
        return 130
    records = [record for one in drawn for record in one.records]
    bad = [path for one in drawn for path in one.bad]
    if as_json:
        pictures = {"pictures": records, "sheet": str(sheet) if sheet else None}
        click.echo(json.dumps(pictures, indent=2, ensure_ascii=False))
    else:
        for found in records:
            click.echo(found["file"])
        if sheet:
            click.echo(sheet)
    if bad:
        names = ", ".join(path.name for path in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        click.echo(
            f"error: {len(bad)} pictures came out as NaN and are not saved ({names}{more}); "
            "use --precision fp32, or a smaller weight of the LoRA",
            err=True,
        )
        return 2
    return 0


_WITH_AGAIN = {
    *("again", "loras", "registry", "base", "out", "overwrite", "devices", "as_json", "debug"),
}


def _check_alone(context: click.Context) -> None:
    """Raise SampleError for options that a picture which is drawn again does not listen to."""
    told = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in _WITH_AGAIN
        and context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    ]
    if told:
        raise SampleError(f"--again takes everything from the picture; leave out {', '.join(told)}")


def _draw(given: dict[str, Any]) -> tuple[list[Any], Path | None]:
    """Draw as the given say; what was drawn, and its sheet."""
    from sampler import sample

    loras, prompts, prompt_file, axes, again, sheet, size = (
        given.pop(key)
        for key in ("loras", "prompts", "prompt_file", "axes", "again", "sheet", "size")
    )
    where = sample.Where(
        **{key: given.pop(key) for key in list(given) if key in sample.Where.__dataclass_fields__}
    )
    if again:
        return sample.draw_again(again, where, loras), None
    if len(axes) > 2:
        raise SampleError(f"--grid is given {len(axes)} times; a sheet has two sides")
    if axes and given["compare"]:
        raise SampleError("--compare does not go with --grid; use --grid weight=0,1")
    parsed = tuple(parse_axis(text) for text in axes)
    if not loras and where.base is None and not any(axis.key == "lora" for axis in parsed):
        raise SampleError("nothing to draw with; name a LoRA with --lora, or a --base")
    if given["compare"] and not loras:
        raise SampleError("--compare needs a --lora to compare the base with")
    if len({axis.key for axis in parsed}) < len(parsed):
        raise SampleError(f"--grid {parsed[0].key} is given twice; use two settings")
    lines = [*(parse(text, "--prompt") for text in prompts)]
    lines += read(prompt_file) if prompt_file else []
    if not lines and not any(axis.key == "prompt" for axis in parsed):
        raise SampleError("nothing says what to draw; give --prompt or --prompts")
    if sheet is None and (axes or given["compare"]):
        sheet = where.out / "sheet.png"
    if where.out.exists() and not where.out.is_dir():
        raise SampleError(f"--out {where.out}: expected a folder, found a file; name another one")
    if sheet is not None:
        sample.check_sheet(sheet, where.overwrite)
    drawn = sample.sample(
        sample.Request(
            loras=tuple(parse_weighted(text) for text in loras),
            prompts=tuple(lines),
            size=parse_size(size),
            axes=parsed,
            **given,
        ),
        where,
    )
    if sheet is not None:
        sample.write_sheet(drawn, sheet, where.overwrite, bool(axes))
    return [drawn], sheet


if __name__ == "__main__":
    main()
