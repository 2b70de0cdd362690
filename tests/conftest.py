"""What holds for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("GLOG_v", "3")  # MindSpore's log: errors only


@pytest.fixture(autouse=True)
def _no_registry_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test names its registry itself."""
    monkeypatch.delenv("LORA_REGISTRY", raising=False)


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The folder of pyproject.toml."""
    return Path(__file__).parents[1]
