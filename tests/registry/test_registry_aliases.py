"""Aliases with their history, yanked and removed versions, gates, and what was done."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from registry.aliases import aliases, history, remove_alias, rollback, set_alias
from registry.api import Registry, RegistryError
from registry.cli import main
from registry.gates import evaluate, promote
from registry.pages import edit
from registry.states import log, remove, unyank, yank
from registry.upkeep import collect


@pytest.fixture
def four(loras: Registry, make_lora: Any) -> Registry:
    """Versions 1 to 4 of ink, whose kid gets smaller."""
    for number in range(1, 5):
        loras.push(
            "ink",
            make_lora(seed=number),
            metrics={
                "kid": {"value": 5.0 - number, "lower": 4.8 - number, "upper": 5.2 - number},
                "kid_base": {"value": 9.0, "lower": 8.0, "upper": 10.0},
                "clip": 0.3,
            },
            evaluation={"prompts": 8},
        )
    return loras


def test_an_alias_and_what_it_meant(four: Registry) -> None:
    for version in (1, 3, 2):
        set_alias(four, "ink", "prod", version)
    assert four.resolve("ink@prod").version == 2
    assert rollback(four, "ink", "prod").version == 3
    assert rollback(four, "ink", "prod").version == 1
    with pytest.raises(RegistryError, match="nothing to roll back: ink@prod means ink@1, as when"):
        rollback(four, "ink", "prod")
    set_alias(four, "ink", "prod", 4)
    assert rollback(four, "ink", "prod").version == 1
    remove_alias(four, "ink", "prod", reason="the show is over")
    with pytest.raises(RegistryError, match="ink has no alias 'prod'; it has none"):
        four.resolve("ink@prod")
    assert aliases(four, "ink") == {}
    found = history(four, "ink", "prod")
    assert [entry.version for entry in found] == [1, 3, 2, 3, 1, 4, 1, None]
    assert found[-1].reason == "the show is over"
    assert all("@" in entry.by for entry in found)


@pytest.mark.parametrize(
    ("alias", "message"),
    [
        ("v1", "looks like a version"),
        ("12", "looks like a version"),
        ("latest", "has a meaning of its own"),
        ("base", "has a meaning of its own"),
        ("Prod", "is not an alias"),
        ("../up", "is not an alias"),
        ("прод", "is not an alias"),
    ],
)
def test_what_is_no_alias(four: Registry, folder: Path, alias: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        set_alias(four, "ink", alias, 1)
    assert not (folder / "models" / "ink" / "aliases").exists()


def test_digests_and_latest(four: Registry) -> None:
    digest = four.resolve("ink@2").files[0].sha256
    assert four.resolve(f"ink@sha256:{digest}").version == 2
    assert four.resolve(f"ink@sha256:{digest[:8]}").version == 2
    assert four.resolve("ink@latest").version == 4
    with pytest.raises(RegistryError, match="no version of ink has a file whose sha256 begins"):
        four.resolve("ink@sha256:" + "0" * 64)
    with pytest.raises(RegistryError, match="is not a digest"):
        four.resolve("ink@sha256:xyz")


def test_a_yanked_version(four: Registry, tmp_path: Path) -> None:
    yank(four, "ink@4", "trained on the wrong set")
    assert four.resolve("ink").version == 3
    with pytest.raises(RegistryError, match="ink@4 is yanked: trained on the wrong set"):
        four.pull("ink@4", tmp_path / "out")
    with pytest.raises(RegistryError, match="is yanked already"):
        yank(four, "ink@4", "again")
    with pytest.raises(RegistryError, match="ink@4 is yanked"):
        set_alias(four, "ink", "prod", 4)
    assert four.pull("ink@4", tmp_path / "out", yanked=True).exists()
    unyank(four, "ink@4")
    assert four.resolve("ink").version == 4
    with pytest.raises(RegistryError, match="is not yanked"):
        unyank(four, "ink@4")
    with pytest.raises(RegistryError, match="give one"):
        yank(four, "ink@4", " ")


def test_a_number_is_never_given_twice(four: Registry, make_lora: Any) -> None:
    set_alias(four, "ink", "prod", 4)
    with pytest.raises(RegistryError, match="ink@4 is what prod means"):
        remove(four, "ink@4")
    remove_alias(four, "ink", "prod")
    remove(four, "ink@4")
    assert four.versions("ink") == [1, 2, 3]
    with pytest.raises(RegistryError, match="ink has no version 4"):
        four.resolve("ink@4")
    assert four.push("ink", make_lora(seed=9)).version == 5


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        ("kid < 3.5", True),
        ("kid < 3", False),
        ("kid <= 3 and clip > 0.2", True),
        ("kid < 1 or clip == 0.3", True),
        ("not kid < 1", True),
        ("kid.upper < base.kid.lower", True),
        ("kid.upper < prod.kid.lower", True),
        ("kid < 0.5 * prod.kid", False),
        ("clip >= 0.98 * prod.clip and kid.upper < base.kid.lower", True),
        ("1 < kid < 4 - -0.5", True),
        ("kid < beta.kid", True),  # nothing to compare with
        ("kid < beta.kid and clip > 1", False),
        ("not kid < beta.kid", True),
    ],
)
def test_gates(four: Registry, gate: str, passed: bool) -> None:
    current = {"prod": four.resolve("ink@1"), "beta": None}
    assert evaluate(gate, four.resolve("ink@2"), current.__getitem__).passed is passed


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("", "cannot be read"),
        ("kid <", "cannot be read: it ends or breaks off"),
        ("kid", "expected a comparison, found kid"),
        ("__import__('os').system('true') == 0", "expected a metric or a number"),
        ("kid.__class__ < 3", "has no alias 'kid'"),
        ("[kid for kid in (1,)] < 3", "expected a metric or a number"),
        ("kid in 3", "expected < <= > >= == or !="),
        ("kid < True", "expected a metric or a number, found True"),
        ("kid < 'x'", "expected a metric or a number"),
        ("kid ** 9 ** 9 < 3", "expected a metric or a number"),
        ("prd.kid < 3", "ink has no alias 'prd'"),
        ("`prd", "cannot be read: it ends or breaks off"),
        ("a.b.c.d < 3", "expected metric, alias.metric or .lower"),
        ("(" * 400 + "kid" + ")" * 400 + "<3", "cannot be read"),
        ("kid<3 or " * 200 + "kid<3", "more than 1000 characters"),
    ],
)
def test_gates_that_cannot_be_read(four: Registry, gate: str, message: str) -> None:
    with pytest.raises(RegistryError) as caught:
        promote(four, "ink@2", "prod", gate)
    assert message in str(caught.value)
    assert [event.text for event in log(four, "ink")][4:] == []


def test_a_gate_that_is_nested_too_deeply(four: Registry) -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # a library may have raised it
    try:
        with pytest.raises(RegistryError, match="cannot be read: it is nested too deeply"):
            promote(four, "ink@2", "prod", "-" * 990 + "kid < 3")
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("kid / 0 < 3", "kid / 0 divides by zero"),
        ("fid < 3", "asks for fid, and ink@2 has no 'fid'; its metrics are kid, kid_base, clip"),
        ("kid < 9 or clip.upper < 3", "has no interval of 'clip'"),
        ("prod-eu.kid < 3", "a name such as clip-score is written `clip-score`"),
        ("kid < prod.kid", "kid of ink@2 and ink@5 were measured differently: prompts is 8 for"),
        ("kid < gone.kid", "gone means ink@1, which was removed"),
    ],
)
def test_what_cannot_be_compared_is_refused_recorded_and_can_be_forced(
    four: Registry, make_lora: Any, gate: str, message: str
) -> None:
    four.push("ink", make_lora(seed=7), metrics={"kid": 0.1}, evaluation={"prompts": 64})
    set_alias(four, "ink", "prod", 5)
    set_alias(four, "ink", "gone", 1)
    remove(four, "ink@1", force=True)
    with pytest.raises(RegistryError, match="ink@2 is not promoted to prod: ") as caught:
        promote(four, "ink@2", "prod", gate)
    assert message in str(caught.value)
    assert f"refuse ink@2 as prod, gate {gate}" in [event.text for event in log(four, "ink")]
    _, verdict = promote(four, "ink@2", "prod", gate, force=True)
    assert verdict is not None
    assert not verdict.passed
    assert four.resolve("ink@prod").version == 2


def test_an_alias_that_a_gate_does_not_name_does_not_matter(four: Registry) -> None:
    set_alias(four, "ink", "gone", 1)
    remove(four, "ink@1", force=True)
    _, verdict = promote(four, "ink@2", "prod", "kid < 9 and kid < prod.kid")
    assert verdict is not None
    assert verdict.passed


def test_quoted_names(four: Registry, make_lora: Any) -> None:
    scores = {"clip-score": {"value": 1, "lower": 0, "upper": 2}, "a/b c": 3, "lower": 4}
    four.push("ink", make_lora(seed=8), metrics=scores)
    set_alias(four, "ink", "prod-eu", 5)
    gate = "`prod-eu`.`clip-score`.upper == 2 and `a/b c` == 3 and `prod-eu`.`lower` == 4"
    _, verdict = promote(four, "ink@5", "prod", gate)
    assert verdict is not None
    assert verdict.passed
    assert verdict.comparisons == [
        "`prod-eu`.`clip-score`.upper == 2 (2 == 2) holds, and nothing says how it was measured",
        "`a/b c` == 3 (3 == 3) holds",
        "`prod-eu`.`lower` == 4 (4 == 4) holds, and nothing says how it was measured",
    ]


def test_of_two_promotions_at_once_the_second_is_judged_by_the_first(
    four: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ink@3 and ink@4 are both better than ink@1, and ink@3 is not better than ink@4."""
    set_alias(four, "ink", "prod", 1)
    put = four.store.put_if_absent

    def late(key: str, data: bytes) -> bool:
        monkeypatch.undo()
        promote(four, "ink@4", "prod", "kid < prod.kid")
        return put(key, data)

    monkeypatch.setattr(four.store, "put_if_absent", late)
    with pytest.raises(
        RegistryError, match=r"ink@3 is not promoted to prod: kid < prod.kid \(2 < 1"
    ):
        promote(four, "ink@3", "prod", "kid < prod.kid")
    assert four.resolve("ink@prod").version == 4


def test_promotion_refusal_and_force_are_recorded(four: Registry) -> None:
    gate = "kid < prod.kid"
    promote(four, "ink@3", "prod", gate)
    with pytest.raises(RegistryError, match=r"ink@1 is not promoted to prod: kid < prod.kid \(4 <"):
        promote(four, "ink@1", "prod", gate)
    assert four.resolve("ink@prod").version == 3
    promote(four, "ink@1", "prod", gate, force=True, reason="the new one is too dark")
    texts = [event.text for event in log(four, "ink")]
    assert texts[:4] == [f"push ink@{number}" for number in range(1, 5)]
    assert sorted(texts[4:]) == [
        "promote ink@prod: ink@1, gate kid < prod.kid, forced",
        "promote ink@prod: ink@3, gate kid < prod.kid",
        "refuse ink@1 as prod, gate kid < prod.kid",
    ]
    assert history(four, "ink", "prod")[-1].facts == {
        "gate": gate,
        "passed": False,
        "comparisons": ["kid < prod.kid (4 < 2) does not hold"],
        "forced": True,
    }


def test_the_log_is_that_of_removed_versions_too(four: Registry) -> None:
    edit(four, four.resolve("ink@2"), "# another card")
    for number in range(1, 5):
        remove(four, f"ink@{number}")
    texts = [event.text for event in log(four, "ink")]
    assert texts[:4] == [f"push ink@{number}" for number in range(1, 5)]
    assert sorted(texts[4:]) == ["card ink@2", *(f"remove ink@{number}" for number in range(1, 5))]
    with pytest.raises(RegistryError, match="has no 'oil'"):
        log(four, "oil")


def test_a_damaged_manifest_is_in_the_way_of_nothing_else(
    four: Registry, folder: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    digest = four.resolve("ink@2").files[0].sha256
    damage(folder / "models/ink/versions/00000003.json")
    for use in (lambda: four.resolve("ink@3"), lambda: collect(four, dry_run=False)):
        with pytest.raises(RegistryError, match=r"remove the version .lora-registry rm ink@3"):
            use()
    run, where = CliRunner(), ["--registry", str(folder)]
    shown = run.invoke(main, ["list", "--versions", *where])
    assert [line.split()[1] for line in shown.stdout.splitlines()[1:]] == ["1", "2", "4"]
    assert four.resolve(f"ink@sha256:{digest}").version == 2
    assert [event.text for event in log(four, "ink")] == [f"push ink@{n}" for n in (1, 2, 4)]
    assert run.invoke(main, ["history", "ink", "kid", *where]).exit_code == 0
    assert "00000003.json" in caplog.text
    yank(four, "ink@3", "damaged")
    remove(four, "ink@3")
    assert not any(found.due for found in collect(four))


def test_a_damaged_log_is_in_the_way_of_nothing_else(
    four: Registry, folder: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What it says of its version or alias is not guessed."""
    set_alias(four, "ink", "prod", 2)
    set_alias(four, "ink", "best", 1)
    yank(four, "ink@4", "blurred")
    unyank(four, "ink@4")
    damage(folder / "models/ink/aliases/prod/00000001.json")
    damage(folder / "models/ink/states/00000004/00000002.json")
    (found,) = four.models()
    assert (found.versions, found.aliases.keys()) == ((1, 2, 3, 4), {"best"})
    assert "damaged" in found.yanked[4]
    assert found.newest == 3
    assert "aliases/prod/00000001.json" in caplog.text
    with pytest.raises(RegistryError, match="damaged"):
        four.resolve("ink@prod")
