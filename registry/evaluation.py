"""How metrics were measured, and whether two versions' can be compared.

`evaluation` of a manifest holds facts that count for all its metrics, and groups of facts: objects
with a list `metrics` of those that they count for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from registry.manifest import Manifest

_LISTED = "metrics"
_MOST = 3


def spec(manifest: Manifest, metric: str) -> dict[str, Any]:
    """How one metric of a version was measured, as flat facts. What was measured of the base alone,
    `kid_base`, was so as `kid`."""
    names = (metric, metric.removesuffix("_base"), metric.removesuffix("_difference"))
    found: dict[str, Any] = {}
    for key, value in manifest.evaluation.items():
        if isinstance(value, dict) and isinstance(listed := value.get(_LISTED), list):
            if any(name in listed for name in names):
                facts = {name: fact for name, fact in value.items() if name != _LISTED}
                found.update(flat(facts, f"{key}."))
        else:
            found.update(flat({key: value}))
    return found


def difference(one: Manifest, two: Manifest, metric: str) -> str | None:
    """In what the measuring of a metric differs between two versions, None if in nothing."""
    first, second = spec(one, metric), spec(two, metric)
    differing = [
        f"{key} is {_text(first.get(key))} for {one.reference} and {_text(second.get(key))} for "
        f"{two.reference}"
        for key in sorted({*first, *second})
        if first.get(key) != second.get(key)
    ]
    if not differing:
        return None
    more = len(differing) - _MOST
    return "; ".join(differing[:_MOST]) + (f"; and {more} more facts" if more > 0 else "")


def unsaid(one: Manifest, two: Manifest, metric: str) -> bool:
    """Does nothing say of either version how a metric was measured?"""
    return not spec(one, metric) and not spec(two, metric)


def measured(manifest: Manifest) -> list[str]:
    """A line for each group of facts: what it counts for, and the facts."""
    common, lines = {}, []
    for key, value in manifest.evaluation.items():
        if isinstance(value, dict) and isinstance(listed := value.get(_LISTED), list):
            names = ", ".join(str(name) for name in listed)
            facts = {name: fact for name, fact in value.items() if name != _LISTED}
            lines.append(f"{names}: {_said(facts)}")
        else:
            common[key] = value
    return [*([_said(common)] if common else []), *lines]


def _said(facts: Mapping[str, Any]) -> str:
    pairs = flat(facts).items()
    return ", ".join(f"{key} {_text(value)}" for key, value in pairs if value is not None)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots between the keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _text(value: Any) -> str:
    if value is None:
        return "not said"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
