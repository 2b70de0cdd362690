"""A run on a terminal while it goes on: a bar, how the loss falls, and what each rank is at."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from launcher.job import Start
from launcher.watchdog import Sign, read_signs
from launcher.words import cache_text, remark, speed_text
from trainer.plan import Plan

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 32
"""Of the curve, in characters."""
_STEPS = 2_000
"""Which it shows, the last ones."""
_SILENT_SECONDS = 10.0
"""A rank is said to be silent after it."""
_A_SECOND = 4
"""So often it is drawn anew."""


class Screen:
    """Three calm lines at the foot of the terminal; sentences go above them."""

    def __init__(self, plan: Plan, start: Start):
        self._plan, self._start = plan, start
        self._began = time.monotonic()
        self._step = plan.start_step
        self._last: Mapping[str, Any] | None = None
        self._losses: deque[float] = deque(maxlen=_STEPS)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
        )
        self._task = self._bar.add_task(
            "starting", total=plan.steps, completed=plan.start_step, text=""
        )
        self.live = Live(
            get_renderable=self._lines, console=Console(stderr=True), refresh_per_second=_A_SECOND
        )

    def show(self, event: Mapping[str, Any]) -> None:
        """Show one line of events.jsonl."""
        if event["event"] == "phase":
            self._bar.update(
                self._task,
                description=event["phase"],
                total=self._plan.steps,
                completed=self._step,
            )
        elif text := remark(event):
            self.note(text)
        elif event["event"] == "cache":
            self._bar.update(
                self._task, total=event["total"], completed=event["done"], text=cache_text(event)
            )
        elif event["event"] == "step":
            self._step, self._last = event["step"], event
            self._losses.append(event["loss"])
            text = speed_text(event, self._plan.global_batch)
            self._bar.update(self._task, completed=event["step"], text=text)

    def note(self, text: str) -> None:
        """Show a sentence."""
        self.live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _lines(self) -> Group:
        signs = read_signs(
            self._start.attempt / "beats", self._start.rank_ids, self._began, time.monotonic()
        )
        lines: list[Progress | Text] = [self._bar]
        if self._last is not None:
            lines.append(Text(self._loss_text(self._last), no_wrap=True, overflow="ellipsis"))
        lines.append(Text(ranks_text(signs), style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*lines)

    def _loss_text(self, step: Mapping[str, Any]) -> str:
        words = [f"loss {step['loss']:.4f}"]
        if self.live.console.encoding.lower().startswith("utf"):
            words.append(sparkline(tuple(self._losses)))
        if "learning_rate" in step:
            words.append(f"learning rate {step['learning_rate']:.3g}")
        if "gradient_norm" in step:
            words.append(f"gradient {step['gradient_norm']:.3g}")
        return "  ".join(words)


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """The values in at most so many blocks, each the mean of its share; none for what is no
    number."""
    count = min(width, len(values))
    edges = [round(n * len(values) / count) for n in range(count + 1)] if count else []
    means = []
    for first, last in zip(edges, edges[1:], strict=False):
        finite = [value for value in values[first:last] if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    known = [mean for mean in means if math.isfinite(mean)]
    low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    top = len(_BLOCKS) - 1
    return "".join(
        _BLOCKS[round(top * (mean - low) / span) if span else 0] if math.isfinite(mean) else " "
        for mean in means
    )


def ranks_text(signs: Mapping[int, Sign]) -> str:
    """What the ranks are at, those of one kind together: `ranks 0-7 training, 0.48 to 0.52 s of
    own work a step`."""
    at = {
        rank_id: sign.phase
        + (f", silent for {sign.age:.0f} s" if sign.age > _SILENT_SECONDS else "")
        for rank_id, sign in sorted(signs.items())
    }
    parts = []
    for text, group in groupby(at.items(), key=lambda item: item[1]):
        ids = [rank_id for rank_id, _ in group]
        name = f"rank {ids[0]}" if len(ids) == 1 else f"ranks {ids[0]}-{ids[-1]}"
        parts.append(f"{name} {text}")
    own = [sign.own for sign in signs.values() if sign.own is not None]
    if own:
        both = f"{min(own):.2f} to {max(own):.2f}" if len(own) > 1 else f"{own[0]:.2f}"
        parts.append(f"{both} s of own work a step")
    return "; ".join(parts)
