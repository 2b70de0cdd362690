"""Signs of life of who holds a claim, between processes that share a cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from registry.cache import Cache
from registry.claims import Signs

HOLD = """
import sys
from pathlib import Path
from registry.cache import Cache
from registry.claims import Signs
with Signs(Cache(Path(sys.argv[1]), 0)).held() as sign:
    if sys.argv[2] == "writes":
        sign.writes()
    print(sign.name, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 0)


@pytest.mark.parametrize(
    ("does", "over"), [("waits", True), ("writes", False)], ids=["before it wrote", "as it wrote"]
)
def test_a_holder_that_is_killed(cache: Cache, does: str, over: bool) -> None:
    """Its claim is of no account at once, unless its write may still come to pass."""
    signs = Signs(cache)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, cache.folder, does],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        name = holder.stdout.readline().strip()
        assert not signs.over(name)
        holder.kill()
        holder.wait()
        assert signs.over(name) is over
        assert signs.over(name) is over  # asked again, the same


def test_a_claim_that_was_withdrawn(cache: Cache) -> None:
    """It can arrive later than its holder has withdrawn it."""
    signs = Signs(cache)
    with signs.held() as sign:
        assert not signs.over(sign.name)
        sign.writes()
        sign.unsettled = False
    assert signs.over(sign.name)


def test_a_claim_of_another_cache_has_to_grow_old(cache: Cache, tmp_path: Path) -> None:
    with Signs(Cache(tmp_path / "other", 0)).held() as sign:
        pass
    assert not Signs(cache).over(sign.name)


def test_a_claim_of_another_machine_has_to_grow_old(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the cache is the same: whether its holder lives, the lock does not tell there."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("registry.claims._of_this_machine", lambda cache_id: "0123456789abcdef")
        with Signs(cache).held() as sign:
            pass
    assert not Signs(cache).over(sign.name)


def test_processes_that_begin_at_once_share_one_id(cache: Cache) -> None:
    assert Signs(cache).cache_id == Signs(Cache(cache.folder, 0)).cache_id
