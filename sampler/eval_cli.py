"""`lora-eval`: scores a LoRA by its pictures, beside the base with the same prompts and seeds."""

from __future__ import annotations

import dataclasses
import json
import traceback
from pathlib import Path
from typing import Any

import click

from registry.command_line import OneSentenceErrors, table
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
from sampler.prompt_file import read


@click.command(cls=OneSentenceErrors)
@options(LORAS)
@click.option(
    "--real",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Real pictures in the style or of the subject; best those that were not trained on.",
)
@click.option(
    "--train",
    "training",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The pictures that were trained on, to see whether any is drawn again. May be repeated.",
)
@click.option(
    "--prompts",
    "prompt_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What to draw, one prompt a line; best what was not trained on.",
)
@click.option(
    "--pictures",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Score these instead of drawing any.",
)
@click.option(
    "--base-pictures",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Those of the base, of the same prompts and seeds in the same order.",
)
@options(SETTINGS)
@click.option(
    "--inception",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Weights of the Inception of FID (pt_inception-2015-12-05-6726825d.pth): adds FID and KID "
    "as they are published.",
)
@click.option(
    "--clip",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Weights of a CLIP (model.safetensors): adds CMMD and, with prompts, the CLIP score.",
)
@click.option(
    "--out",
    default=Path("evaluation"),
    show_default=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Gets a folder for each LoRA, with pictures, sheet.png, scores.json and evaluation.json. "
    "What is there already is not drawn anew.",
)
@click.option("--overwrite", is_flag=True, help="Replace pictures that were drawn differently.")
@options(BASE)
@click.option(
    "--batch",
    default=4,
    show_default=True,
    type=click.IntRange(1, 256),
    help="Pictures in one pass of the network.",
)
@options(DEVICES)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(**given: Any) -> int:
    """Score a LoRA: draw prompts with it and with the base alone, and compare with real pictures.

    Prints each score with the interval that the true one lies in with 95 %, for the LoRA, the base
    and their difference. Without weights of Inception or CLIP, scores are on EfficientNet-Lite0 and
    named so. Publish them with: lora-registry push FILE NAME --metrics DIR/scores.json --evaluation
    DIR/evaluation.json

    \b
    Example:
      lora-eval --lora emoji-ink@1 --registry runs/registry --prompts held-out.txt \\
          --real assets/emoji-ink/validation --train assets/emoji-ink/train
      lora-eval --pictures drawn/ --real photos/ --clip clip-vit-large-patch14-336.safetensors
    """
    as_json, debug = given.pop("as_json"), given.pop("debug")
    try:
        evaluated = _evaluate(given)
    except input_errors() as error:
        if debug:
            traceback.print_exc()
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo(
            f"interrupted; the pictures that are done are in {given['out']}, and the same command "
            "goes on",
            err=True,
        )
        return 130
    from sampler import judge

    judgement = evaluated.judgement
    if as_json:
        found = {
            "scores": judgement.as_metrics(),
            "evaluation": evaluated.evaluation,
            "cautions": judgement.cautions,
            "nearest": judgement.nearest,
            "table": judge.table(judgement),
            "folder": str(evaluated.folder),
            "sheet": str(evaluated.sheet) if evaluated.sheet else None,
        }
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return 0
    click.echo(table(judge.table(judgement)))
    for nearest in judgement.nearest:
        click.echo(
            f"nearest to a training image: {nearest['picture']} to {nearest['training_image']}, "
            f"{nearest['distance']:.3g}"
        )
    for text in judgement.cautions:
        click.echo(f"caution: {text}", err=True)
    click.echo(f"see {evaluated.sheet or evaluated.folder}", err=True)
    return 0


def _evaluate(given: dict[str, Any]) -> Any:
    from sampler import evaluate, sample

    loras, prompt_file, pictures, base_pictures, size, training, real, inception, clip = (
        given.pop(key)
        for key in (
            *("loras", "prompt_file", "pictures", "base_pictures", "size"),
            *("training", "real", "inception", "clip"),
        )
    )
    where = sample.Where(
        **{key: given.pop(key) for key in list(given) if key in sample.Where.__dataclass_fields__}
    )
    against = evaluate.Against(real, training, inception, clip)
    target = "CPU" if where.device_target == "auto" else where.device_target
    prompts = read(prompt_file) if prompt_file else []
    if pictures is not None:
        if loras:
            raise SampleError("--pictures are there already, so leave --lora out")
        texts = [prompt.text for prompt in prompts] or None
        found = evaluate.given_pictures(pictures, base_pictures, texts, given["per_prompt"])
        found = dataclasses.replace(found, device_target=target)
        judge = evaluate.judge_of(against)
        return evaluate.evaluate(found, judge, where.out, where.out / "features")
    if not loras:
        raise SampleError("nothing to score; name a LoRA with --lora, or --pictures")
    if base_pictures is not None:
        raise SampleError("--base-pictures goes with --pictures; those of the base are drawn here")
    if not prompts:
        raise SampleError("nothing says what to draw; give --prompts with one a line")
    request = sample.Request(
        loras=tuple(parse_weighted(text) for text in loras),
        prompts=tuple(prompts),
        size=parse_size(size),
        **given,
    )
    return evaluate.evaluate_lora(request, where, against)


if __name__ == "__main__":
    main()
