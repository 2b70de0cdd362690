"""docs/config.md is what the schema says."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_config.py"))["document"]()
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == made, (
        "run: python docs/make_config.py > docs/config.md"
    )
