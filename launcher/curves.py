"""Curves and bars as inline SVG, by hand: numbers in, text out.

Colours and fonts come from classes that the page styles; there is no style attribute, so that the
page's Content-Security-Policy need not allow any.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

MOST_POINTS = 1000
"""Of one curve."""
_MOST_CROSSES = 100
_PIXELS_A_TICK = 45
_TOP, _RIGHT, _BOTTOM = 12, 14, 44


@dataclass(frozen=True)
class Line:
    """A curve, or points that are joined."""

    name: str
    kind: str
    """Class of its colour and width: raw, smooth or second."""
    xs: Sequence[float]
    ys: Sequence[float]
    """What is not finite leaves a gap."""
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A place on the x axis with something to say."""

    x: float
    text: str
    kind: str
    """Class: published or restart."""


@dataclass(frozen=True)
class Chart:
    """What is drawn into one pair of axes."""

    name: str
    """Of the chart, as an id in the page."""
    title: str
    description: str
    lines: Sequence[Line]
    y_label: str
    marks: Sequence[Mark] = ()
    crosses: Sequence[float] = ()
    """Where there is no finite value."""
    x_label: str = "step"
    x_end: float | None = None
    """Where the axis ends at least."""
    from_zero: bool = True
    width: int = 480
    height: int = 250


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in a range, at most `most` and, if it can be, three or more."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low] if math.isfinite(low) else []
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10, 20) if f * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    found = []
    while first * step <= high + 1e-9 * step:
        # A multiple, not a sum, and rounded to the step: 0.3 and not 0.30000000000000004.
        found.append(round(first * step, max(0, 2 - math.floor(math.log10(step)))))
        first += 1
    return found


def figure(value: float) -> str:
    """A number as people write it: 1,200 or 0.7561 or 2e-05."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "−infinite"
    if value == 0:
        return "0"
    if value < 0:
        return f"−{figure(-value)}"
    if value >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.4g}"
    if "e" in text:
        mantissa, _, exponent = text.partition("e")
        return f"{mantissa}e{int(exponent)}"
    return text


def downsampled(xs: Sequence[float], ys: Sequence[float], most: int = MOST_POINTS) -> list[int]:
    """Which points to draw: of each stretch the lowest and the highest, so that no peak is lost,
    and the first and the last of all."""
    count = len(xs)
    if count <= most:
        return list(range(count))
    stretches = max(1, (most - 2) // 2)
    chosen = {0, count - 1}
    for stretch in range(stretches):
        places = range(stretch * count // stretches, (stretch + 1) * count // stretches)
        finite = [place for place in places if math.isfinite(ys[place])]
        if finite:
            chosen.add(min(finite, key=lambda place: ys[place]))
            chosen.add(max(finite, key=lambda place: ys[place]))
        else:
            chosen.add(places[0])  # the gap stays one
    return sorted(chosen)


def value_range(lines: Sequence[Line], from_zero: bool) -> tuple[float, float, int]:
    """(lowest, highest, how many values lie above it): a few wild ones do not flatten the rest."""
    values = sorted(_finite(lines))
    if not values:
        return 0.0, 1.0, 0
    low, high = values[0], values[-1]
    usual = values[min(len(values) - 1, int(0.98 * len(values)))]
    spread = (usual - low) or abs(usual) or 1.0
    if len(values) >= 50 and high > low + 3 * spread:
        # Points that are joined are few, and each of them matters.
        high = max([low + 1.5 * spread, *_finite(line for line in lines if line.dots)])
    beyond = sum(value > high for value in values)
    if from_zero and low >= 0:
        low = 0.0
    elif from_zero and high <= 0:
        high = 0.0
    if high == low:
        low, high = (0.0, high * 2) if high > 0 else (low - 1, high + 1)
    room = 0.05 * (high - low)
    return (low if from_zero and low == 0 else low - room), high + room, beyond


def _finite(lines: Iterable[Line]) -> list[float]:
    return [y for line in lines for y in line.ys if math.isfinite(y)]


def draw(chart: Chart) -> tuple[str, str]:
    """(SVG, a remark on what it leaves out). Without any value the SVG is empty."""
    lines = [_thinned(line) for line in chart.lines]
    all_x = [x for line in lines for x in line.xs]
    if not _finite(lines):
        return "", ""
    low, high, beyond = value_range(lines, chart.from_zero)
    start, end = min(all_x), max([*all_x, *([chart.x_end] if chart.x_end else [])])
    if start == end:
        start, end = start - 1, end + 1
    elif 0 < start <= 1:
        start = 0.0
    widest = max(len(figure(value)) for value in ticks(low, high, chart.height // _PIXELS_A_TICK))
    scale = _Scale(start, end, low, high, 36 + 7 * widest, chart.width, chart.height)
    parts = [
        f'<svg class="chart" id="{chart.name}" viewBox="0 0 {chart.width} {chart.height}" '
        f'role="img" tabindex="0" aria-labelledby="{chart.name}-title {chart.name}-desc" '
        f"data-frame='{json.dumps([start, end, *scale.frame])}' "
        f'data-series="{escape(_series(lines))}">',
        f'<title id="{chart.name}-title">{escape(chart.title)}</title>',
        f'<desc id="{chart.name}-desc">{escape(chart.description)}</desc>',
        *_axes(chart, scale),
        f'<clipPath id="{chart.name}-clip"><rect x="{scale.left - 6}" y="0" '
        f'width="{scale.right - scale.left + 12}" height="{scale.bottom + 4}"/></clipPath>',
        f'<g clip-path="url(#{chart.name}-clip)">',
        *(_curve(line, scale) for line in lines),
        "</g>",
        *(_mark(mark, scale) for mark in chart.marks if start <= mark.x <= end),
        *_crosses(chart.crosses, scale),
        f'<line class="cursor" x1="0" x2="0" y1="{_TOP}" y2="{scale.bottom}" visibility="hidden"/>',
        "</svg>",
    ]
    remark = ""
    if beyond:
        peak = max(_finite(chart.lines))
        remark = f"The axis is cut: values go up to {figure(peak)}."
    return "\n".join(parts), remark


@dataclass(frozen=True)
class _Scale:
    start: float
    end: float
    low: float
    high: float
    left: int
    width: int
    height: int

    @property
    def right(self) -> int:
        return self.width - _RIGHT

    @property
    def bottom(self) -> int:
        return self.height - _BOTTOM

    @property
    def frame(self) -> list[int]:
        return [self.left, self.right]

    def x(self, value: float) -> float:
        return self.left + (value - self.start) / (self.end - self.start) * (self.right - self.left)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        # A wild value leaves the frame, but not the numbers that a renderer can take.
        return self.bottom - max(-1.0, min(3.0, share)) * (self.bottom - _TOP)


def _thinned(line: Line) -> Line:
    chosen = downsampled(line.xs, line.ys)
    return Line(
        line.name,
        line.kind,
        [line.xs[place] for place in chosen],
        [line.ys[place] for place in chosen],
        line.dots,
    )


def _series(lines: Sequence[Line]) -> str:
    """The points for the page's script, which says what is under the pointer."""
    return json.dumps(
        [
            {
                "name": line.name,
                "x": [int(x) if x == int(x) else x for x in line.xs],
                "y": [float(f"{y:.5g}") if math.isfinite(y) else None for y in line.ys],
            }
            for line in lines
        ],
        separators=(",", ":"),
    )


def _axes(chart: Chart, scale: _Scale) -> list[str]:
    parts = []
    for value in ticks(scale.low, scale.high, chart.height // _PIXELS_A_TICK):
        y = scale.y(value)
        parts.append(
            f'<line class="grid" x1="{scale.left}" x2="{scale.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{scale.left - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{figure(value)}</text>"
        )
    steps = [x for x in ticks(scale.start, scale.end, max(4, chart.width // 110)) if x == int(x)]
    for value in steps:
        x = scale.x(value)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{scale.bottom}" '
            f'y2="{scale.bottom + 4}"/>'
        )
        # Else the last one would leave the picture.
        anchor = "end" if x > scale.right - 12 else "middle"
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{scale.bottom + 18}" text-anchor="{anchor}">'
            f"{int(value):,}</text>"
        )
    middle = (_TOP + scale.bottom) / 2
    parts += [
        f'<line class="axis" x1="{scale.left}" x2="{scale.right}" y1="{scale.bottom}" '
        f'y2="{scale.bottom}"/>',
        f'<text class="label" x="{(scale.left + scale.right) / 2:.0f}" y="{chart.height - 6}" '
        f'text-anchor="middle">{escape(chart.x_label)}</text>',
        f'<text class="label" x="13" y="{middle:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 13 {middle:.0f})">{escape(chart.y_label)}</text>',
    ]
    return parts


def _mark(mark: Mark, scale: _Scale) -> str:
    x = scale.x(mark.x)
    right_half = x > (scale.left + scale.right) / 2
    anchor, shift = ("end", -6) if right_half else ("start", 6)
    y = _TOP + (10 if mark.kind == "published" else 26)
    return (
        f'<line class="mark {mark.kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" '
        f'y2="{scale.bottom}"/><text class="note {mark.kind}" x="{x + shift:.1f}" y="{y}" '
        f'text-anchor="{anchor}">{escape(mark.text)}</text>'
    )


def _curve(line: Line, scale: _Scale) -> str:
    path, pen_down, dots = [], False, []
    for x, y in zip(line.xs, line.ys, strict=True):
        if not math.isfinite(y):
            pen_down = False
            continue
        place = f"{scale.x(x):.1f},{scale.y(y):.1f}"
        path.append(("L" if pen_down else "M") + place)
        pen_down = True
        if line.dots:
            left, top = place.split(",")
            dots.append(f'<circle class="dot {line.kind}" cx="{left}" cy="{top}" r="4"/>')
    alone = len(path) == 1 and not line.dots
    if alone:  # a path of one point shows nothing
        left, top = path[0][1:].split(",")
        dots.append(f'<circle class="dot {line.kind}" cx="{left}" cy="{top}" r="3"/>')
    return f'<path class="line {line.kind}" d="{"".join(path)}"/>' + "".join(dots)


def _crosses(places: Sequence[float], scale: _Scale) -> list[str]:
    """Red crosses at the foot, where there was no number; neighbours share one."""
    found, last = [], -math.inf
    for place in places:
        x = scale.x(place)
        if x - last < (scale.right - scale.left) / _MOST_CROSSES:
            continue
        last, y = x, scale.bottom - 5
        found.append(f'<path class="cross" d="M{x - 3:.1f},{y - 3}l6,6M{x + 3:.1f},{y - 3}l-6,6"/>')
    return found


# ---- bars


@dataclass(frozen=True)
class Bar:
    """A value with the interval that the true one lies in, if that is known."""

    name: str
    kind: str
    """Class of its colour: lora or base."""
    value: float
    lower: float | None = None
    upper: float | None = None

    @property
    def text(self) -> str:
        """`0.169 (0.134 to 0.205)`."""
        if self.lower is None or self.upper is None:
            return figure(self.value)
        return f"{figure(self.value)} ({figure(self.lower)} to {figure(self.upper)})"


def draw_bars(name: str, title: str, bars: Sequence[Bar], width: int = 480) -> str:
    """Bars below each other from zero on, with their intervals as whiskers."""
    ends = [end for bar in bars for end in (bar.value, bar.lower, bar.upper) if end is not None]
    finite = [end for end in ends if math.isfinite(end)]
    if not finite:
        return ""
    low, high = min(0.0, *finite), max(0.0, *finite)
    if low == high:
        high = low + 1.0
    left, right, row = 52, width - 16, 34
    bottom = row * len(bars) + 6

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    description = "; ".join(f"{bar.name} {bar.text}" for bar in bars)
    parts = [
        f'<svg class="bars" viewBox="0 0 {width} {bottom + 24}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc">',
        f'<title id="{name}-title">{escape(title)}</title>',
        f'<desc id="{name}-desc">{escape(description)}, with 95 % intervals</desc>',
    ]
    for tick in ticks(low, high, 5):
        parts.append(
            f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="0" y2="{bottom}"/>'
            f'<text class="tick" x="{x(tick):.1f}" y="{bottom + 17}" text-anchor="middle">'
            f"{figure(tick)}</text>"
        )
    for place, bar in enumerate(bars):
        if not math.isfinite(bar.value):
            continue
        top, from_x, to_x = place * row + 6, *sorted((x(0.0), x(bar.value)))
        middle = top + 11
        parts.append(
            f'<text class="name" x="{left - 8}" y="{middle + 4}" text-anchor="end">'
            f"{escape(bar.name)}</text>"
            f'<rect class="bar {bar.kind}" x="{from_x:.1f}" y="{top}" '
            f'width="{max(1.0, to_x - from_x):.1f}" height="22" rx="2"/>'
        )
        if bar.lower is not None and bar.upper is not None:
            a, b = x(bar.lower), x(bar.upper)
            parts.append(
                f'<path class="whisker" d="M{a:.1f},{middle - 6}v12M{a:.1f},{middle}H{b:.1f}'
                f'M{b:.1f},{middle - 6}v12"/>'
            )
    parts.append(f'<line class="axis" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{bottom}"/></svg>')
    return "\n".join(parts)
