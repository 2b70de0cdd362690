"""How many pictures were drawn and judged, for whoever scrapes.

prometheus-client keeps values in files if PROMETHEUS_MULTIPROC_DIR names a folder, as lora-launch
lets it for the evaluation of a run; without that nothing is counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

_TEXTS = {
    "drawn": "Pictures drawn.",
    "judged": "Pictures seen by a network that judges them.",
}


@cache
def counted(what: str) -> Callable[[int], object]:
    """What is told how many more pictures were drawn or judged: `lora_pictures_drawn_total`, …"""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return lambda _: None
    from prometheus_client import CollectorRegistry, Counter

    return Counter(f"lora_pictures_{what}", _TEXTS[what], registry=CollectorRegistry()).inc
