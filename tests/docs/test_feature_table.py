"""The feature tables of the pages name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("name", "folder", "features", "tests"),
    [("launching", "", 30, 28), ("registry", "registry", 36, 35)],
)
def test_each_feature_names_its_test(
    project_root: Path, name: str, folder: str, features: int, tests: int
) -> None:
    page = (project_root / "docs" / f"{name}.md").read_text(encoding="utf-8")
    table = page.partition("## Compared")[2]
    assert len(re.findall(r"^\| [^|-]", table, re.MULTILINE)) == features
    named = re.findall(r"`([a-z0-9_/.]+\.py)::(\w+)`", table)
    assert len(named) == tests
    for file, test in named:
        text = (project_root / "tests" / folder / file).read_text(encoding="utf-8")
        assert f"def {test}(" in text, f"{file}::{test}"
