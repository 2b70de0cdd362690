"""What holds for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("GLOG_v", "3")  # MindSpore's log: errors only


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes (-n) a file stays in one, as its fixtures do; and so does everything
    that launches runs: a launcher ends what a killed one has left, whoever that was."""
    for item in items:
        folder = item.path.parent.name
        group = "launch" if folder in ("launcher", "end_to_end") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def _no_registry_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test names its registry itself."""
    monkeypatch.delenv("LORA_REGISTRY", raising=False)


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The folder of pyproject.toml."""
    return Path(__file__).parents[1]
