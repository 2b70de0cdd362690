"""`lora-sample`: draws with a base model and a LoRA from the registry."""

from __future__ import annotations

import json
import os
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.command_line import OneSentenceErrors

if TYPE_CHECKING:
    from diffusion.config import ModelConfig
    from weights.base import Base
    from weights.lora import Adapters


@click.command(
    cls=OneSentenceErrors,
    epilog="Example: lora-sample --registry runs/registry --lora emoji-ink@1 "
    '--prompt "ink emoji of penguin" --seed 7 --out penguin.png',
)
@click.option(
    "--lora",
    required=True,
    metavar="NAME[@VERSION]|FILE",
    help="A LoRA in the registry, or a LoRA file of any dialect (then name its --base).",
)
@click.option("--registry", envvar="LORA_REGISTRY", help="Its registry: a folder.")
@click.option(
    "--prompt", "prompts", multiple=True, required=True, help="What to draw; may be given again."
)
@click.option("--negative", default="", help="What to keep away from.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**63 - 1),
    help="Seed of the first picture; each further one takes the next.",
)
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1, 1000))
@click.option(
    "--scale", default=4.0, show_default=True, help="Classifier-free guidance; 1 turns it off."
)
@click.option("--weight", default=1.0, show_default=True, help="Strength of the LoRA.")
@click.option(
    "--base",
    metavar="PATH",
    help="The base model, a folder or a file; default: the one that the LoRA was trained on.",
)
@click.option("--model", help="Which model the base is, if its weights do not say it: sd21-v, …")
@click.option(
    "--ignore-unknown",
    is_flag=True,
    help="Leave out what the base has no place for.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="PNG to write.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@click.option(
    "--device-target", default="CPU", show_default=True, type=click.Choice(["CPU", "Ascend"])
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(**options: Any) -> None:
    """Draw base and LoRA side by side, from the same seeds, into one contact sheet."""
    as_json, debug = options.pop("as_json"), options.pop("debug")
    try:
        result = sample(**options)
    except _input_errors() as error:
        if debug:
            traceback.print_exc()
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(result) if as_json else result["out"])


def _input_errors() -> tuple[type[Exception], ...]:
    """What the rooms raise for bad input, each with one sentence for the user."""
    from diffusion.config import ModelConfigError
    from registry.errors import RegistryError
    from weights.files import WeightsError

    return ModelConfigError, RegistryError, SampleError, WeightsError


class SampleError(ValueError):
    """A picture that cannot be drawn as asked; the message is one sentence."""


def sample(
    lora: str,
    registry: str | None,
    prompts: tuple[str, ...],
    negative: str,
    seed: int,
    steps: int,
    scale: float,
    weight: float,
    base: str | None,
    model: str | None,
    ignore_unknown: bool,
    out: Path,
    overwrite: bool,
    device_target: str,
) -> dict[str, Any]:
    """Draw, write the sheet and return what was done as plain values.

    Raises SampleError, RegistryError, ModelConfigError or WeightsError, each one sentence.
    """
    from diffusion.config import recognise
    from weights.base import combined_digest
    from weights.lora import fit
    from weights.lora_files import read

    if out.exists() and not overwrite:
        raise SampleError(f"{out}: the file exists; choose another --out or add --overwrite")
    found = _local(lora, base) if Path(lora).is_file() else _registered(lora, registry, base)
    name, config = recognise(found.base, model or found.model)
    shapes = {network: parts.shapes for network, parts in found.base.networks.items()}
    adapters = fit(
        read(found.file, ignore_unknown).adapters,
        shapes,
        found.name,
        str(found.base.path),
        ignore_unknown,
    )
    settings, rows = _draw(
        config,
        found.base,
        adapters,
        prompts,
        [seed + i for i in range(len(prompts))],
        {"steps": steps, "scale": scale, "negative": negative},
        weight,
        device_target,
    )
    record = {
        "lora": found.name,
        "lora_sha256": found.sha256,
        "model": name,
        "base_digest": combined_digest(found.base.digests()),
        "prompts": list(prompts),
        "seed": seed,
        "weight": weight,
        **settings,
    }
    _write(out, [("base", rows[0]), (found.name, rows[1])], prompts, record)
    return {"out": str(out), **record}


@dataclass(frozen=True)
class _Found:
    """A LoRA's file and the base to draw it with."""

    name: str
    file: Path
    sha256: str
    base: Base
    model: str | None


def _local(lora: str, base: str | None) -> _Found:
    """A LoRA file of any dialect; nothing says which base it is for."""
    from weights.base import open_base
    from weights.files import sha256

    if base is None:
        raise SampleError(f"{lora}: a file does not say where its base is; name it with --base")
    path = Path(lora)
    return _Found(path.name, path, sha256(path), open_base(base), None)


def _registered(lora: str, registry: str | None, base: str | None) -> _Found:
    """A LoRA from the registry, with the base that its manifest names, checked by digest."""
    from registry.api import open_registry
    from weights.base import combined_digest, open_base

    if not registry:
        raise SampleError(
            f"there is no file {lora}, and no registry is named; give --registry or set "
            "LORA_REGISTRY"
        )
    file, manifest = open_registry(registry).fetch(lora)
    lineage = manifest.metadata.get("base")
    if not isinstance(lineage, dict) or not {"model", "weights", "digest"} <= lineage.keys():
        raise SampleError(f"{manifest.reference}: its manifest does not name a base model")
    opened = open_base(base or str(lineage["weights"]))
    found = combined_digest(opened.digests())
    if found != lineage["digest"]:
        raise SampleError(
            f"{manifest.reference} was trained on a base with digest "
            f"{str(lineage['digest'])[:12]}…, {opened.path} has {found[:12]}…; name the right one "
            "with --base"
        )
    sha256 = manifest.files[0].sha256
    return _Found(manifest.reference, file, sha256, opened, str(lineage["model"]))


def _draw(
    config: ModelConfig,
    base: Base,
    adapters: Adapters,
    prompts: tuple[str, ...],
    seeds: list[int],
    options: dict[str, Any],
    weight: float,
    device_target: str,
) -> tuple[dict[str, Any], list[Any]]:
    """Pictures of the base and of the base with the LoRA."""
    os.environ.setdefault("GLOG_v", "3")
    import mindspore as ms
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    from diffusion.pipeline import Pipeline, Settings

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device(device_target)
    settings = Settings(**options)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeLeft())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("loading", total=2 * len(prompts))
        pipeline = Pipeline.load(config, base)
        rows = []
        for number, description in enumerate(("base", "LoRA")):
            progress.update(task, description=description)
            if number == 1:
                pipeline.merge_lora(adapters, weight)
            done = number * len(prompts)
            rows.append(
                pipeline.text_to_image(
                    prompts,
                    seeds,
                    settings,
                    lambda count, done=done: progress.update(task, completed=done + count),
                )
            )
    return asdict(settings), rows


def _write(
    out: Path, rows: list[tuple[str, Any]], captions: tuple[str, ...], record: dict[str, Any]
) -> None:
    """The sheet as PNG, whole or not at all, with the record in its text chunk."""
    from PIL.PngImagePlugin import PngInfo

    from sampler.sheet import contact_sheet
    from weights.files import atomic_path

    info = PngInfo()
    info.add_text("lora-sample", json.dumps(record))
    with atomic_path(out) as part:
        contact_sheet(rows, captions).save(part, format="PNG", pnginfo=info, optimize=True)


if __name__ == "__main__":
    main()
