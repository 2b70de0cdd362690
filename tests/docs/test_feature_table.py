"""The feature table of docs/launching.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path


def test_each_feature_names_its_test(project_root: Path) -> None:
    page = (project_root / "docs" / "launching.md").read_text(encoding="utf-8")
    table = page.partition("## Compared")[2]
    assert len(re.findall(r"^\| [A-Z]", table, re.MULTILINE)) == 30
    named = re.findall(r"`([a-z_/]+\.py)::(\w+)`", table)
    assert len(named) == 28
    for file, test in named:
        text = (project_root / "tests" / file).read_text(encoding="utf-8")
        assert f"def {test}(" in text, f"{file}::{test}"
