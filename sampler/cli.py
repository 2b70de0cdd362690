"""`lora-sample`: draws with a base model and LoRAs."""

from __future__ import annotations

import json
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from registry.command_line import OneSentenceErrors
from sampler.errors import SampleError
from sampler.picture import SOLVERS, SPACINGS
from sampler.plan import LARGEST_SEED, parse_axis
from sampler.prompt_file import parse, read


@click.command(cls=OneSentenceErrors)
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="NAME[@VERSION|@ALIAS][:WEIGHT]|FILE[:WEIGHT]",
    help="A LoRA in the registry, or a file of any dialect; given again, they are added up. "
    "Without one the --base draws.",
)
@click.option(
    "--registry", envvar="LORA_REGISTRY", help="Their registry: a folder or s3://BUCKET/PREFIX."
)
@click.option("--prompt", "prompts", multiple=True, help="What to draw; may be given again.")
@click.option(
    "--prompts",
    "prompt_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prompts, one a line, each with settings of its own if need be: --n negative, --w, --h, "
    "--s steps, --d seed, --l scale.",
)
@click.option("--negative", default="", help="What to keep away from.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, LARGEST_SEED),
    help="Seed of the first picture; each further one takes the next.",
)
@click.option(
    "--images-per-prompt",
    "per_prompt",
    default=1,
    show_default=True,
    type=click.IntRange(1, 10_000),
    help="Pictures of each prompt.",
)
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1, 1000))
@click.option("--solver", default="dpm++2m", show_default=True, type=click.Choice(SOLVERS))
@click.option(
    "--spacing",
    type=click.Choice(SPACINGS),
    help="Of the timesteps. Default: the solver's; trailing after training with zero-terminal SNR.",
)
@click.option(
    "--eta",
    type=click.FloatRange(0, 1),
    help="Noise that ddim and euler-a add again. Default: 0 for ddim, 1 for euler-a.",
)
@click.option(
    "--scale",
    default=4.0,
    show_default=True,
    type=click.FloatRange(0, 1000),
    help="Classifier-free guidance; 1 turns it off and takes half the time.",
)
@click.option(
    "--rescale",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Guidance rescale, against pictures that are too bright; 0.7 is usual.",
)
@click.option("--size", metavar="N|WxH", help="Pixels. Default: the model's own.")
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
@click.option(
    "--base",
    metavar="PATH",
    help="The base model, a folder or a file. Default: the one that the LoRA was trained on.",
)
@click.option("--model", help="Which model the base is, if its weights do not say it: sd21-v, …")
@click.option("--other-base", is_flag=True, help="Draw although --base is not the LoRA's own.")
@click.option("--ignore-unknown", is_flag=True, help="Leave out what the base has no place for.")
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
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "fp32", "fp16", "bf16"]),
    help="auto: fp16 on Ascend, fp32 on CPU.",
)
@click.option(
    "--device-target",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "CPU", "Ascend"]),
)
@click.option(
    "--devices", metavar="N|IDS", help="Draw on several devices; the pictures are the same."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print everything about the pictures as JSON."
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(**options: Any) -> int:
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
    as_json, debug = options.pop("as_json"), options.pop("debug")
    try:
        drawn, sheet = _draw(options)
    except _input_errors() as error:
        if debug:
            traceback.print_exc()
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo(
            f"interrupted; the pictures that are done are in {options['out']}, and the same "
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


def _draw(options: dict[str, Any]) -> tuple[list[Any], Path | None]:
    """Draw as the options say; what was drawn, and its sheet."""
    from sampler import sample

    loras, prompts, prompt_file, axes, again, sheet, size = (
        options.pop(key)
        for key in ("loras", "prompts", "prompt_file", "axes", "again", "sheet", "size")
    )
    where = sample.Where(
        **{
            key: options.pop(key)
            for key in list(options)
            if key in sample.Where.__dataclass_fields__
        }
    )
    if again:
        if loras or prompts or prompt_file or axes or sheet:
            raise SampleError(
                "--again takes everything from the picture; leave out --lora, --prompt, --prompts, "
                "--grid and --sheet"
            )
        return sample.draw_again(again, where), None
    if len(axes) > 2:
        raise SampleError(f"--grid is given {len(axes)} times; a sheet has two sides")
    if axes and options["compare"]:
        raise SampleError("--compare does not go with --grid; use --grid weight=0,1")
    if not loras and where.base is None:
        raise SampleError("nothing to draw with; name a LoRA with --lora, or a --base")
    if options["compare"] and not loras:
        raise SampleError("--compare needs a --lora to compare the base with")
    parsed = tuple(parse_axis(text) for text in axes)
    if len({axis.key for axis in parsed}) < len(parsed):
        raise SampleError(f"--grid {parsed[0].key} is given twice; use two settings")
    lines = [*(parse(text, "--prompt") for text in prompts)]
    lines += read(prompt_file) if prompt_file else []
    if not lines and not any(axis.key == "prompt" for axis in parsed):
        raise SampleError("nothing says what to draw; give --prompt or --prompts")
    if sheet is None and (axes or options["compare"]):
        sheet = where.out / "sheet.png"
    if where.out.exists() and not where.out.is_dir():
        raise SampleError(f"--out {where.out}: expected a folder, found a file; name another one")
    if sheet is not None:
        sample.check_sheet(sheet, where.overwrite)
    drawn = sample.sample(
        sample.Request(
            loras=tuple(_weighted(text) for text in loras),
            prompts=tuple(lines),
            size=_size(size),
            axes=parsed,
            **options,
        ),
        where,
    )
    if sheet is not None:
        sample.write_sheet(drawn, sheet, where.overwrite, bool(axes))
    return [drawn], sheet


def _weighted(text: str) -> tuple[str, float]:
    from registry.weight_tools import weighted

    return weighted(text)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:[xX×](\d{1,5}))?", text)
    if not match:
        raise SampleError(f"--size {text}: expected pixels such as 512 or 512x768")
    return int(match[1]), int(match[2] or match[1])


def _input_errors() -> tuple[type[Exception], ...]:
    """What the rooms raise for bad input, each with one sentence for the user; those of rooms that
    were not loaded were not raised."""
    names = {
        "cluster.errors": "ClusterError",
        "diffusion.config": "ModelConfigError",
        "registry.errors": "RegistryError",
        "weights.files": "WeightsError",
    }
    modules = {module: sys.modules.get(module) for module in names}
    return SampleError, *(getattr(found, names[m]) for m, found in modules.items() if found)


if __name__ == "__main__":
    main()
