"""Figures in words."""

from __future__ import annotations

_SIZES = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def human_size(size: int) -> str:
    """Bytes in words."""
    for unit, scale in _SIZES:
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def human_time(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
