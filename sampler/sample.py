"""The whole of `lora-sample`: from what is asked for to pictures, and a sheet of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampler.drawing import Task, draw, make_job, passes
from sampler.errors import SampleError
from sampler.loras import Lora, Model, find, open_model, read_adapters
from sampler.picture import Picture, Setup, Used, from_record, read_record, record
from sampler.plan import Axis, Panel, check_size, pictures
from sampler.progress import shown
from sampler.prompt_file import Prompt

if TYPE_CHECKING:
    from cluster.devices import Machine

SHEET_RECORD = "lora-sample-sheet"


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
    named = [*(text for text, _ in request.loras)]
    for axis in request.axes:
        named += axis.values if axis.key == "lora" else ()
    found = {text: find(text, where.registry) for text in dict.fromkeys(named)}
    model = open_model(list(found.values()), where.base, where.model, where.other_base)
    setup = _setup(model, where, any(lora.zero_terminal_snr for lora in found.values()))
    used = {text: Used(lora.reference, lora.sha256, 1.0) for text, lora in found.items()}
    width, height = request.size or (model.config.resolution,) * 2
    plain = Picture(
        prompt="",
        negative=request.negative,
        seed=request.seed,
        loras=tuple(replace(used[text], weight=weight) for text, weight in request.loras),
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
        _with_spacing(panel, setup)
        for panel in pictures(
            plain, request.prompts, request.per_prompt, request.axes, request.compare, used
        )
    ]
    factor = model.config.vae.factor * 2 ** (len(model.config.unet.block_out_channels) - 1)
    for panel in panels:
        check_size(panel.picture.width, panel.picture.height, factor)
        _check_solver(panel.picture)
    for lora in found.values():  # before hours, not after
        read_adapters(lora, model.base, where.ignore_unknown)
    return Drawn(panels, setup, where.out, {lora.reference: lora for lora in found.values()})


def _with_spacing(panel: Panel, setup: Setup) -> Panel:
    """After training with zero-terminal SNR the noisiest timestep has to be among those drawn."""
    picture = panel.picture
    if not setup.zero_terminal_snr or picture.spacing or picture.solver.endswith("karras"):
        return panel
    return replace(panel, picture=replace(picture, spacing="trailing"))


def _check_solver(picture: Picture) -> None:
    from diffusion.solvers import SOLVERS, noise_levels

    if picture.eta and SOLVERS[picture.solver].eta is None:
        raise SampleError(
            f"{picture.solver} adds no noise; take --eta away, or use ddim or euler-a"
        )
    try:
        noise_levels(picture.solver, picture.steps, spacing=picture.spacing)
    except ValueError as error:
        raise SampleError(f"{error}; choose another --spacing, --steps or --solver") from error


def draw_again(paths: Sequence[Path], where: Where) -> list[Drawn]:
    """Draw pictures once more, from what they say of themselves, into `where.out`; those with one
    setup together.

    Raises as `sample` does, also if a LoRA or the base is not what it was.
    """
    groups: dict[str, tuple[Setup, list[Panel], dict[str, Lora]]] = {}
    models: dict[tuple[str, str], Model] = {}
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
        panels.append(Panel(picture, path.name, "", "", ""))
        for used in picture.loras:
            if used.reference not in loras:
                loras[used.reference] = _as_it_was(used, where.registry, path)
    drawn = []
    for setup, panels, loras in groups.values():
        found = Drawn(panels, setup, where.out)
        # Each keeps its row, alone in its pass.
        tasks = [[(panel.picture, where.out / panel.file)] for panel in panels]
        found.bad = draw_tasks(tasks, setup, list(loras.values()), where)
        drawn.append(found)
    return drawn


def _as_it_was(used: Used, registry: str | None, path: Path) -> Lora:
    lora = find(used.reference, registry)
    if lora.sha256 != used.sha256:
        raise SampleError(
            f"{path} was drawn with {used.reference} of sha256 {used.sha256[:12]}…, and that now "
            f"has {lora.sha256[:12]}…; put the former back"
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
    with shown("pictures", job.count) as progress:

        def tell(path: Path, there: bool) -> None:
            if not there:
                bad.append(path)
            progress(1)

        if len(device_ids) > 1 and len(job.batches) > 1:
            from sampler.spread import draw_together

            draw_together(job, tell, machine, device_ids[: len(job.batches)])
        else:
            draw(job, tell)
    return bad


def _devices(where: Where, device_target: str) -> tuple[Machine, tuple[int, ...]]:
    from cluster.devices import parse_devices, this_machine

    machine = this_machine(device_target)
    if where.devices is None:
        return machine, machine.device_ids[:1]
    return machine, parse_devices(where.devices, machine)


def _setup(model: Model, where: Where, zero_terminal_snr: bool) -> Setup:
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
        zero_terminal_snr=zero_terminal_snr,
        apart=where.apart,
        precision=precision,
        device_target=target,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("ascend-lora", "mindspore")}


def write_sheet(drawn: Drawn, path: Path, overwrite: bool, grid: bool) -> None:
    """Put the pictures on one sheet. Raises SampleError if the file is there and is no sheet of
    the same pictures, unless it may be overwritten; WeightsError if it cannot be written."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from sampler.sheet import contact_sheet, sheet
    from weights.files import atomic_path

    said = json.dumps({"pictures": [panel.file for panel in drawn.panels]})
    check_sheet(path, overwrite, said)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:
        Image.Image.save(page, part, format="PNG", pnginfo=info, optimize=True)


def check_sheet(path: Path, overwrite: bool, said: str | None = None) -> None:
    """Raise SampleError if something else than the sheet with this record is at `path`."""
    from PIL import Image

    if overwrite or not path.exists():
        return
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            found = getattr(image, "text", {}).get(SHEET_RECORD)
    except (OSError, ValueError):
        found = None
    if found is None or (said is not None and found != said):
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
        panel = part[0][0]
        title = f"{panel.block}, seed {panel.picture.seed}" if panel.block else ""
        blocks.append(Block(title, tuple(columns), table))
        start += size
    return blocks
