"""Scores of versions beside each other, as tables with small drawings.

Only versions that were measured alike (registry.evaluation) share a scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from registry.evaluation import difference
from registry.manifest import Manifest
from registry.site_text import text

_KNOWN = (
    ("validation_loss", "Validation loss", "lower"),
    ("kid", "KID", "lower"),
    ("cmmd", "CMMD", "lower"),
    ("fid", "FID", "lower"),
    ("clip_score", "CLIP score", "higher"),
    ("diversity", "Diversity", ""),
    ("nearest", "Distance to the nearest training image", ""),
)
"""Of lora-launch and lora-eval, those that say most first; and which is better."""
_ON_CARD = 2
_OPEN = 3
"""So many metrics are seen at once, the others on request."""
_WIDTH, _HEIGHT, _LORA, _BASE = 240.0, 24.0, 7.0, 18.0
_MARGIN = 6.0


@dataclass(frozen=True)
class Scored:
    """A version whose scores are to be seen."""

    manifest: Manifest
    yanked: bool = False


@dataclass(frozen=True)
class Scale:
    """From numbers to places in a drawing."""

    low: float
    high: float

    def x(self, value: float) -> float:
        """Place of a number."""
        share = (value - self.low) / (self.high - self.low)
        return round(_MARGIN + share * (_WIDTH - 2 * _MARGIN), 2)


def main_scores(manifest: Manifest) -> list[tuple[str, str]]:
    """The scores that say most: title, and HTML with value, interval and base."""
    found = []
    for key in _ordered([manifest])[:_ON_CARD]:
        said = _words(manifest.metrics[key])
        if interval := manifest.intervals.get(key):
            said += f" <small>({_words(interval[0])} to {_words(interval[1])})</small>"
        if (base := manifest.metrics.get(f"{key}_base")) is not None:
            said += f" <small>base {_words(base)}</small>"
        found.append((_title(key)[0], said))
    return found


def tables(versions: Sequence[Scored]) -> str:
    """A table for each metric, with the versions newest first; empty if there are none."""
    keys = _ordered([version.manifest for version in versions])
    if not keys:
        return ""
    shown = [_table(key, versions) for key in keys]
    legend = (
        '<p class="legend"><span><svg viewBox="0 0 40 16" aria-hidden="true"><g class="lora">'
        '<line x1="4" x2="36" y1="8" y2="8"/><circle cx="20" cy="8" r="4.5"/></g></svg>with the '
        'LoRA</span><span><svg viewBox="0 0 40 16" aria-hidden="true"><g class="base">'
        '<line x1="4" x2="36" y1="8" y2="8"/><circle cx="20" cy="8" r="3.5"/></g></svg>base alone'
        "</span><span>A line is the interval in which the true value lies.</span></p>\n"
    )
    more = "".join(shown[_OPEN:])
    if more:
        count = len(shown) - _OPEN
        words = f"{count} more {'scores' if count > 1 else 'score'}"
        more = f"<details>\n<summary>{words}</summary>\n<div>{more}</div>\n</details>\n"
    return legend + "".join(shown[:_OPEN]) + more


def groups(key: str, versions: Sequence[Scored]) -> list[list[Scored]]:
    """The versions that have a metric, together if it was measured alike."""
    found: list[list[Scored]] = []
    for version in versions:
        if key not in version.manifest.metrics:
            continue
        for group in found:
            if difference(group[0].manifest, version.manifest, key) is None:
                group.append(version)
                break
        else:
            found.append([version])
    return found


def scale(key: str, group: Sequence[Scored]) -> Scale:
    """On which a metric of these versions, with and without the LoRA, has its place."""
    values: list[float] = []
    for version in group:
        manifest = version.manifest
        for name in (key, f"{key}_base"):
            if name in manifest.metrics:
                values += [manifest.metrics[name], *manifest.intervals.get(name, ())]
    low, high = min(values), max(values)
    if low == high:
        room = abs(low) / 10 or 1.0
        return Scale(low - room, high + room)
    room = (high - low) / 20
    return Scale(low - room, high + room)


def drawing(key: str, manifest: Manifest, on: Scale) -> str:
    """An SVG with the LoRA's value and interval and, below, those of the base."""
    parts = []
    for name, kind, y, radius in ((f"{key}_base", "base", _BASE, 3.5), (key, "lora", _LORA, 4.5)):
        value = manifest.metrics.get(name)
        if value is None:
            continue
        line = ""
        if interval := manifest.intervals.get(name):
            ends = f'x1="{on.x(interval[0]):g}" x2="{on.x(interval[1]):g}"'
            line = f'<line {ends} y1="{y:g}" y2="{y:g}"/>'
        dot = f'<circle cx="{on.x(value):g}" cy="{y:g}" r="{radius:g}"/>'
        parts.append(f'<g class="{kind}">{line}{dot}</g>')
    return (
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" aria-hidden="true" focusable="false">'
        f"{''.join(parts)}</svg>"
    )


def _table(key: str, versions: Sequence[Scored]) -> str:
    found = groups(key, versions)
    title, better = _title(key)
    note = f" <small>{better} is better</small>" if better else ""
    has_base = any(f"{key}_base" in v.manifest.metrics for group in found for v in group)
    has_difference = any(f"{key}_difference" in v.manifest.metrics for g in found for v in g)
    columns = ["With the LoRA", *(["Base alone"] if has_base else [])]
    columns += ["LoRA minus base"] if has_difference else []
    heads = "".join(f'<th scope="col" class="number">{column}</th>' for column in columns)
    parts = []
    for number, group in enumerate(found):
        on = scale(key, group)
        before = ""
        if number:
            apart = difference(found[0][0].manifest, group[0].manifest, key) or ""
            before = (
                f'<tr><th scope="rowgroup" colspan="{len(columns) + 1}">Measured in another way, '
                f"not to be compared with those above: {text(apart)}</th>"
                f'<td class="drawn">{_ends(on)}</td></tr>\n'
            )
        rows = "".join(
            _row(key, version, on, better, has_base, has_difference) for version in group
        )
        parts.append(f"<tbody>\n{before}{rows}</tbody>\n")
    first = scale(key, found[0])
    return (
        f'<div class="wide-table" role="group" aria-label="{text(title)}" tabindex="0"><table>\n'
        f"<caption>{text(title)}{note}</caption>\n"
        f'<thead><tr><th scope="col">Version</th>{heads}'
        f'<th scope="col" class="drawn">{_ends(first)}</th></tr></thead>\n'
        f"{''.join(parts)}</table></div>\n"
    )


def _ends(on: Scale) -> str:
    low, high = _words(on.low, 3), _words(on.high, 3)
    return f'<span class="scale"><span>{low}</span> <span>{high}</span></span>'


def _row(
    key: str, version: Scored, on: Scale, better: str, has_base: bool, has_difference: bool
) -> str:
    manifest = version.manifest
    cells = [_number(manifest, key)]
    if has_base:
        cells.append(_number(manifest, f"{key}_base"))
    if has_difference:
        cells.append(_number(manifest, f"{key}_difference", _verdict(manifest, key, better)))
    yanked = ' <span class="badge yanked">yanked</span>' if version.yanked else ""
    return (
        f'<tr><th scope="row"><a href="#v{manifest.version}">@{manifest.version}</a>{yanked}</th>'
        f'{"".join(cells)}<td class="drawn">{drawing(key, manifest, on)}</td></tr>\n'
    )


def _number(manifest: Manifest, key: str, more: str = "") -> str:
    value = manifest.metrics.get(key)
    if value is None:
        return '<td class="number">–</td>'
    said = _words(value)
    if interval := manifest.intervals.get(key):
        said += f"<small>{_words(interval[0])} to {_words(interval[1])}</small>"
    return f'<td class="number">{said}{f"<small>{more}</small>" if more else ""}</td>'


def _words(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}g}".replace("-", "−")


def _verdict(manifest: Manifest, key: str, better: str) -> str:
    """What the interval of the difference says."""
    interval = manifest.intervals.get(f"{key}_difference")
    if interval is None or not better:
        return ""
    if interval[0] <= 0 <= interval[1]:
        return "no clear difference"
    lower = interval[1] < 0
    return "better than the base" if lower == (better == "lower") else "worse than the base"


def _ordered(manifests: Sequence[Manifest]) -> list[str]:
    """All metrics of the LoRAs, those that say most first."""
    keys = dict.fromkeys(key for manifest in manifests for key in manifest.metrics)
    own = [
        key
        for key in keys
        if not any(
            key.endswith(suffix) and key.removesuffix(suffix) in keys
            for suffix in ("_base", "_difference")
        )
    ]
    return sorted(
        own, key=lambda key: next((n for n, k in enumerate(_KNOWN) if _is(key, k[0])), 99)
    )


def _title(key: str) -> tuple[str, str]:
    """A metric in words, and whether "lower" or "higher" is better, "" if that is not known."""
    for known, title, better in _KNOWN:
        if _is(key, known):
            rest = key.removeprefix(known).strip("_").replace("_", " ")
            return f"{title} ({rest})" if rest else title, better
    return key.replace("_", " "), ""


def _is(key: str, known: str) -> bool:
    return key == known or key.startswith(f"{known}_")
