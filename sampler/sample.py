"""The whole of `lora-sample`: from what is asked for to pictures, and a sheet of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.weight_tools import weighted
from sampler.drawing import Task, draw, make_job, passes, use_device
from sampler.errors import SampleError
from sampler.loras import Lora, Model, find, open_model, read_adapters
from sampler.picture import (
    SHEET_RECORD,
    Picture,
    Setup,
    Used,
    from_record,
    is_sheet,
    make_folder,
    read_record,
    record,
)
from sampler.plan import Axis, Panel, check_size, pictures
from sampler.progress import shown
from sampler.prompt_file import Prompt
from sampler.telemetry import counted

if TYPE_CHECKING:
    from cluster.devices import Machine


@dataclass(frozen=True)
class Where:
    """What to draw on, and where pictures go."""

    out: Path
    registry: str | None = None
    base: str | None = None
    model: str | None = None
    other_base: bool = False
    ignore_unknown: bool = False
    overwrite: bool = False
    apart: bool = False
    precision: str = "auto"
    device_target: str = "auto"
    devices: str | None = None


@dataclass(frozen=True)
class Request:
    """Pictures as they are asked for; what is None follows from the model."""

    loras: tuple[tuple[str, float], ...]
    """References or files, and weights."""
    prompts: tuple[Prompt, ...]
    negative: str = ""
    seed: int = 0
    per_prompt: int = 1
    steps: int = 20
    solver: str = "dpm++2m"
    spacing: str | None = None
    eta: float | None = None
    scale: float = 4.0
    rescale: float = 0.0
    size: tuple[int, int] | None = None
    batch: int = 1
    axes: tuple[Axis, ...] = ()
    compare: bool = False


@dataclass
class Drawn:
    """What came of it."""

    panels: list[Panel]
    setup: Setup
    folder: Path
    loras: Mapping[str, Lora] = field(default_factory=dict)
    """By reference."""
    bad: list[Path] = field(default_factory=list)
    """Pictures that came out as NaN, and are not there."""

    @property
    def records(self) -> list[dict[str, Any]]:
        """The file and everything else about each picture that is there."""
        bad = set(self.bad)
        return [
            {"file": str(path), **record(panel.picture, self.setup)}
            for panel in self.panels
            if (path := self.folder / panel.file) not in bad
        ]


def sample(request: Request, where: Where) -> Drawn:
    """Draw what is asked for, but for what is there already.

    Raises SampleError, RegistryError, ModelConfigError, WeightsError or ClusterError.
    """
    drawn = plan(request, where)
    tasks = passes([(panel.picture, where.out / panel.file) for panel in drawn.panels])
    drawn.bad = draw_tasks(tasks, drawn.setup, list(drawn.loras.values()), where)
    return drawn


def plan(request: Request, where: Where) -> Drawn:
    """Find LoRAs and base, and say which pictures there are to be; nothing is drawn yet.

    Raises as `sample` does, for everything that can be seen before.
    """
    of_axis = {
        value: weighted(value)
        for axis in request.axes
        if axis.key == "lora"
        for value in axis.values
    }
    named = [text for text, _ in (*request.loras, *of_axis.values())]
    found = {text: find(text, where.registry) for text in dict.fromkeys(named)}
    model = open_model(list(found.values()), where.base, where.model, where.other_base)
    setup = _setup(model, where)

    def use(text: str, weight: float) -> Used:
        return Used(found[text].reference, found[text].sha256, weight)

    used = {value: use(*parts) for value, parts in of_axis.items()}
    zero_terminal = {lora.sha256 for lora in found.values() if lora.zero_terminal_snr}
    width, height = request.size or (model.config.resolution,) * 2
    plain = Picture(
        prompt="",
        negative=request.negative,
        seed=request.seed,
        loras=tuple(use(*parts) for parts in request.loras),
        steps=request.steps,
        solver=request.solver,
        scale=request.scale,
        width=width,
        height=height,
        spacing=request.spacing,
        eta=request.eta,
        rescale=request.rescale,
        batch=request.batch,
    )
    panels = [
        _with_schedule(panel, zero_terminal)
        for panel in pictures(
            plain, request.prompts, request.per_prompt, request.axes, request.compare, used
        )
    ]
    factor = model.config.vae.factor
    for panel in panels:
        check_size(panel.picture.width, panel.picture.height, factor)
        _check_solver(panel.picture)
    for lora in found.values():  # before hours, not after
        read_adapters(lora, model.base, where.ignore_unknown)
    return Drawn(panels, setup, where.out, {lora.reference: lora for lora in found.values()})


def _with_schedule(panel: Panel, zero_terminal: set[str]) -> Panel:
    """With a LoRA that was trained with zero-terminal SNR a picture is drawn along that schedule,
    and the noisiest timestep has to be among those of the solver."""
    picture = panel.picture
    if not any(used.sha256 in zero_terminal for used in picture.loras):
        return panel
    spacing = picture.spacing
    if not picture.solver.endswith("karras"):
        spacing = spacing or "trailing"
    return replace(panel, picture=replace(picture, zero_terminal_snr=True, spacing=spacing))


def _check_solver(picture: Picture) -> None:
    from diffusion.solvers import SOLVERS, noise_levels

    if picture.eta and SOLVERS[picture.solver].eta is None:
        raise SampleError(
            f"{picture.solver} adds no noise; take --eta away, or use ddim or euler-a"
        )
    try:
        levels = noise_levels(picture.solver, picture.steps, spacing=picture.spacing)
    except ValueError as error:
        raise SampleError(f"{error}; choose another --spacing, --steps or --solver") from error
    if levels[0] < 0.5 * noise_levels("euler", 10)[0]:
        raise SampleError(
            f"{picture.solver} with {picture.steps} steps would begin where half the noise is "
            "gone; use 500 steps or fewer, or --spacing trailing"
        )


def draw_again(paths: Sequence[Path], where: Where, places: Sequence[str] = ()) -> list[Drawn]:
    """Draw pictures once more, from what they say of themselves, into `where.out`; those with one
    setup together. Their LoRAs are also looked for in `places`, files or references.

    Raises as `sample` does, also if a LoRA or the base is not what it was.
    """
    groups: dict[str, tuple[Setup, list[Panel], dict[str, Lora]]] = {}
    models: dict[tuple[str, str], Model] = {}
    moved = [find(place, where.registry) for place in places]
    names: set[str] = set()
    for path in paths:
        values = read_record(path)
        if values is None:
            raise SampleError(
                f"{path}: it says nothing of how lora-sample drew it; it was drawn by another "
                "program, or saved anew without its text"
            )
        picture, setup = from_record(values, path)
        weights = where.base or setup.base
        model = models.get((weights, setup.model)) or open_model((), weights, setup.model)
        models[weights, setup.model] = model
        if model.digest != setup.base_digest:
            raise SampleError(
                f"{path} was drawn with a base with digest {setup.base_digest[:12]}…, "
                f"{model.base.path} has {model.digest[:12]}…; name the right one with --base"
            )
        today = replace(setup, base=str(model.base.path), versions=_versions())
        _, panels, loras = groups.setdefault(json.dumps(asdict(today)), (today, [], {}))
        name, number = path.name, 1
        while name in names:
            number += 1
            name = f"{path.stem}-{number}{path.suffix}"
        names.add(name)
        panels.append(Panel(picture, name, "", "", ""))
        for used in picture.loras:
            if used.sha256 not in loras:
                loras[used.sha256] = _as_it_was(used, moved, where.registry, path)
    drawn = []
    for setup, panels, loras in groups.values():
        found = Drawn(panels, setup, where.out)
        # Each keeps its row, alone in its pass.
        tasks = [[(panel.picture, where.out / panel.file)] for panel in panels]
        found.bad = draw_tasks(tasks, setup, list(loras.values()), where)
        drawn.append(found)
    return drawn


def _as_it_was(used: Used, moved: Sequence[Lora], registry: str | None, path: Path) -> Lora:
    for lora in moved:
        if lora.sha256 == used.sha256:
            return lora
    if not os.path.isfile(used.reference) and "@" not in used.reference:
        raise SampleError(
            f"{path} was drawn with {used.reference}, and there is no such file; say with --lora "
            "where it is now"
        )
    lora = find(used.reference, registry)
    if lora.sha256 != used.sha256:
        raise SampleError(
            f"{path} was drawn with {used.reference} of sha256 {used.sha256[:12]}…, and that now "
            f"has {lora.sha256[:12]}…; say with --lora where the former is"
        )
    return lora


def draw_tasks(
    tasks: Sequence[Sequence[Task]], setup: Setup, loras: Sequence[Lora], where: Where
) -> list[Path]:
    """Draw what of these passes is not there, with progress; returns what came out as NaN.

    Raises SampleError, RegistryError, ModelConfigError, WeightsError or ClusterError.
    """
    job = make_job(
        tasks,
        setup,
        {lora.sha256: str(lora.file) for lora in loras},
        ignore_unknown=where.ignore_unknown,
        overwrite=where.overwrite,
    )
    machine, device_ids = _devices(where, setup.device_target)
    bad: list[Path] = []
    for folder in {path.parent for batch in job.batches for _, path in batch}:
        make_folder(folder)
    count = counted("drawn")
    with shown("pictures", job.count) as progress:

        def tell(path: Path, there: bool) -> None:
            if not there:
                bad.append(path)
            count(1)
            progress(1)

        if len(device_ids) > 1 and len(job.batches) > 1:
            from sampler.spread import draw_together

            draw_together(job, tell, machine, device_ids[: len(job.batches)])
        elif job.batches:
            use_device(setup.device_target)
            draw(job, tell)
    return bad


def _devices(where: Where, device_target: str) -> tuple[Machine, tuple[int, ...]]:
    from cluster.devices import parse_devices, this_machine

    machine = this_machine(device_target)
    if where.devices is None:
        return machine, machine.device_ids[:1]
    return machine, parse_devices(where.devices, machine)


def _setup(model: Model, where: Where) -> Setup:
    from cluster.devices import this_machine

    target = where.device_target
    if target == "auto":
        target = this_machine().device_target
    precision = where.precision
    if precision == "auto":
        precision = "fp16" if target == "Ascend" else "fp32"
    return Setup(
        base=str(model.base.path),
        base_digest=model.digest,
        model=model.name,
        apart=where.apart,
        precision=precision,
        device_target=target,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("ascend-lora", "mindspore")}


def write_sheet(drawn: Drawn, path: Path, overwrite: bool, grid: bool) -> None:
    """Put the pictures on one sheet. Raises SampleError if the file is there and is no sheet,
    unless it may be overwritten; WeightsError if it cannot be written."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from sampler.sheet import contact_sheet, sheet
    from weights.files import atomic_path

    said = json.dumps({"pictures": [panel.file for panel in drawn.panels]})
    check_sheet(path, overwrite)
    bad = set(drawn.bad)
    shown = [
        (panel, None if (file := drawn.folder / panel.file) in bad else _pixels(file))
        for panel in drawn.panels
    ]
    if grid:
        page = sheet(_blocks(shown))
    else:
        rows: dict[str, list[Any]] = {}
        for panel, pixels in shown:
            rows.setdefault(panel.row, []).append(pixels)
        first = drawn.panels[0].row
        captions = [panel.column for panel in drawn.panels if panel.row == first]
        page = contact_sheet(list(rows.items()), captions)
    info = PngInfo()
    info.add_itxt(SHEET_RECORD, said)
    make_folder(path.parent)
    with atomic_path(path) as part:
        Image.Image.save(page, part, format="PNG", pnginfo=info, optimize=True)


def check_sheet(path: Path, overwrite: bool) -> None:
    """Raise SampleError if something else than a sheet is at `path`: sheets are made anew."""
    if path.exists() and not overwrite and not is_sheet(path):
        raise SampleError(f"{path}: the file exists; choose another --sheet or add --overwrite")


def _pixels(path: Path) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(path, formats=("PNG",)) as image:
        return np.asarray(image.convert("RGB"))


def _blocks(shown: Sequence[tuple[Panel, Any]]) -> list[Any]:
    """A table for each prompt and seed."""
    from sampler.sheet import Block

    blocks: list[Any] = []
    start = 0
    columns = list(dict.fromkeys(panel.column for panel, _ in shown))
    rows = list(dict.fromkeys(panel.row for panel, _ in shown))
    size = len(columns) * len(rows)
    while start < len(shown):
        part = shown[start : start + size]
        table = tuple(
            (row, tuple(pixels for panel, pixels in part if panel.row == row)) for row in rows
        )
        blocks.append(Block(part[0][0].block, tuple(columns), table))
        start += size
    return blocks
