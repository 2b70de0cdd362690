"""Who vouches for a version or an alias, and whose word counts."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from registry import signing
from registry.aliases import set_alias
from registry.api import Registry, RegistryError, open_registry
from registry.cli import main
from registry.gates import promote
from registry.pages import edit, page
from registry.signing import new_key, read_key, read_policy
from registry.states import remove, unyank, yank

Sign = Callable[[str | None], None]


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """The public keys of three people."""
    return {name: new_key(tmp_path / f"{name}.pem").public for name in ("alice", "bob", "eve")}


@pytest.fixture
def sign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sign:
    """Sign as somebody from now on."""

    def begin(name: str | None) -> None:
        if name is None:
            monkeypatch.delenv("LORA_REGISTRY_KEY", raising=False)
        else:
            monkeypatch.setenv("LORA_REGISTRY_KEY", str(tmp_path / f"{name}.pem"))

    return begin


@pytest.fixture
def policy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keys: dict[str, str]
) -> Callable[[str], None]:
    """Ask for alice's or bob's signature, and for prod for alice's."""

    def ask(mode: str) -> None:
        path = tmp_path / "policy.yaml"
        known = "".join(f"\n  {name}: {keys[name]}" for name in ("alice", "bob"))
        path.write_text(
            f"mode: {mode}\nkeys:{known}\npublish:\n  'ink*': [alice, bob]\n"
            "aliases:\n  prod: [alice]\n"
        )
        monkeypatch.setenv("LORA_REGISTRY_POLICY", str(path))

    return ask


def test_a_key_file_is_its_owners(tmp_path: Path) -> None:
    key = new_key(tmp_path / "key.pem")
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    assert read_key(tmp_path / "key.pem").public == key.public
    with pytest.raises(RegistryError, match="cannot write the key"):
        new_key(tmp_path / "key.pem")
    (tmp_path / "no.pem").write_text("no key")
    with pytest.raises(RegistryError, match="is no Ed25519 key without a password; make one"):
        read_key(tmp_path / "no.pem")


def test_the_signature_is_that_of_the_bytes_before_it(
    loras: Registry, lora: Path, folder: Path, keys: dict[str, str], sign: Sign
) -> None:
    import base64

    sign("alice")
    loras.push("ink", lora)
    data = (folder / "models/ink/versions/00000001.json").read_bytes()
    end = data.index(b',\n  "signature"')
    algorithm, public, signature = json.loads(data)["signature"].split(":")
    assert f"{algorithm}:{public}" == keys["alice"]
    verifier = Ed25519PublicKey.from_public_bytes(base64.b64decode(public))
    verifier.verify(base64.b64decode(signature), data[:end])


def test_only_who_may_publish_is_trusted(
    loras: Registry, lora: Path, sign: Sign, policy: Callable[[str], None], tmp_path: Path
) -> None:
    for name in (None, "eve", "bob", "alice"):
        sign(name)
        loras.push("ink", lora)
    loras.push("oil", lora)
    policy("enforce")
    for reference, message in (
        ("ink@1", "ink@1 is not signed, and alice, bob may"),
        ("ink@2", "ink@2 is signed by the unknown key ed25519:"),
        ("oil@1", "oil@1 is signed by alice, and nobody may"),
    ):
        with pytest.raises(RegistryError, match=message):
            loras.pull(reference, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert loras.resolve("ink@3").version == 3
    assert loras.resolve("ink").version == 4


def test_who_may_not_publish_cannot_stop_pulls(
    loras: Registry,
    make_lora: Callable[..., Path],
    sign: Sign,
    policy: Callable[[str], None],
    tmp_path: Path,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither by a newer version, nor by one with the same file, nor by what is done to theirs."""
    first = make_lora()
    for name in ("alice", "eve", None):
        sign(name)
        loras.push("ink", first, metrics={"kid": 1})
    yank(loras, "ink@1", "eve's word")
    remove(loras, "ink@1")
    edit(loras, loras.readable([("ink", 1)])[0], "# eve's card")
    policy("enforce")
    digest = loras.resolve("ink@1").files[0].sha256
    assert loras.resolve("ink").version == 1
    assert loras.resolve(f"ink@sha256:{digest}").version == 1
    assert loras.pull("ink", tmp_path / "out").exists()
    assert "# eve's card" not in page(loras, loras.resolve("ink"))
    assert "ink@3 is not signed, and alice, bob may; " in caplog.text
    assert "ink@1 is the newest that may" in caplog.text
    result = CliRunner().invoke(main, ["history", "ink", "kid", "--registry", str(folder)])
    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == ["ink@1"]
    policy("off")
    with pytest.raises(RegistryError, match="ink has no version 1"):
        loras.resolve("ink@1")


def test_an_unsigned_word_does_not_undo_a_signed_one(
    loras: Registry, lora: Path, sign: Sign, policy: Callable[[str], None], tmp_path: Path
) -> None:
    sign("alice")
    loras.push("ink", lora)
    yank(loras, "ink@1", "trained on the wrong set")
    sign("eve")
    unyank(loras, "ink@1")
    policy("enforce")
    with pytest.raises(RegistryError, match="ink@1 is yanked: trained on the wrong set"):
        loras.pull("ink@1", tmp_path / "out")
    sign("bob")
    unyank(loras, "ink@1")
    assert loras.pull("ink@1", tmp_path / "out").exists()


def test_who_may_not_publish_is_told_so(
    loras: Registry,
    lora: Path,
    sign: Sign,
    policy: Callable[[str], None],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy("enforce")
    for push in (lambda: loras.push("ink", lora), lambda: loras.check_push("ink")):
        with pytest.raises(RegistryError, match="what you publish as ink is not signed, and alice"):
            push()
    assert not folder.exists()
    sign("bob")
    loras.push("ink", lora)
    set_alias(loras, "ink", "beta", 1)
    with pytest.raises(RegistryError, match="what you publish as ink@prod is signed by bob, and"):
        set_alias(loras, "ink", "prod", 1)
    sign("eve")
    with pytest.raises(RegistryError, match="what you publish as ink is signed by the unknown key"):
        yank(loras, "ink@1", "mine")
    policy("warn")
    loras.push("ink", lora)
    assert "warning: what you publish as ink is signed by the unknown key" in caplog.text


def test_a_gate_does_not_trust_an_alias_of_somebody_else(
    loras: Registry, lora: Path, sign: Sign, policy: Callable[[str], None]
) -> None:
    sign("bob")
    for number in range(2):
        loras.push("ink", lora, metrics={"kid": number})
    set_alias(loras, "ink", "prod", 2)
    policy("enforce")
    with pytest.raises(RegistryError, match="cannot be decided: ink@prod is signed by bob, and al"):
        promote(loras, "ink@1", "beta", "kid < prod.kid")


def test_an_alias_can_belong_to_somebody(
    loras: Registry, lora: Path, sign: Sign, policy: Callable[[str], None]
) -> None:
    sign("bob")
    loras.push("ink", lora)
    set_alias(loras, "ink", "prod", 1)
    set_alias(loras, "ink", "beta", 1)
    policy("enforce")
    assert loras.resolve("ink@beta").version == 1
    with pytest.raises(RegistryError, match="ink@prod is signed by bob, and alice may"):
        loras.resolve("ink@prod")
    sign("alice")
    set_alias(loras, "ink", "prod", 1)
    assert loras.resolve("ink@prod").version == 1


def test_a_policy_can_warn_or_be_off(
    loras: Registry,
    lora: Path,
    policy: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    loras.push("ink", lora)
    policy("off")
    assert loras.resolve("ink").version == 1
    assert caplog.text == ""
    policy("warn")
    assert loras.resolve("ink").version == 1
    assert "warning: ink@1 is not signed, and alice, bob may" in caplog.text


def test_a_signed_manifest_put_elsewhere_is_refused(
    loras: Registry, lora: Path, folder: Path, keys: dict[str, str], sign: Sign
) -> None:
    sign("alice")
    loras.push("ink", lora)
    set_alias(loras, "ink", "prod", 1)
    (folder / "models/ink/aliases/beta").mkdir()
    entry = "models/ink/aliases/{}/00000001.json"
    (folder / entry.format("beta")).write_bytes((folder / entry.format("prod")).read_bytes())
    with pytest.raises(RegistryError, match="is the entry of models/ink/aliases/prod/00000001"):
        open_registry(str(folder)).resolve("ink@beta")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mode: perhaps", "mode: Input should be 'off', 'warn' or 'enforce'"),
        ("keys: {alice: rsa:abc}", "keys.alice: String should match pattern"),
        ("publish: {'*': [alice]}", "no key is given for alice"),
        ("publsh: {}", "publsh: Extra inputs are not permitted"),
        ("a: [", "is not YAML"),
        ("- a", "Input should be a valid dictionary"),
    ],
)
def test_bad_policy(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(RegistryError, match=message):
        read_policy(tmp_path / "policy.yaml")


def test_verify_asks_for_signatures(
    loras: Registry,
    lora: Path,
    folder: Path,
    sign: Sign,
    policy: Callable[[str], None],
    tmp_path: Path,
) -> None:
    run, where = CliRunner(), ["--registry", str(folder)]
    loras.push("ink", lora)
    sign("eve")
    loras.push("ink", lora)
    assert run.invoke(main, ["verify", *where]).exit_code == 0
    result = run.invoke(main, ["verify", "--require-signature", *where])
    assert (result.exit_code, result.stdout) == (1, "ink@1: is not signed\n")
    policy("warn")
    result = run.invoke(main, ["verify", "--require-signature", "--json", *where])
    assert [found["reference"] for found in json.loads(result.stdout)] == ["ink@1", "ink@2"]


def test_key_command(tmp_path: Path) -> None:
    run = CliRunner()
    path = str(tmp_path / "sub" / "key.pem")
    made = run.invoke(main, ["key", path])
    assert made.exit_code == 0
    assert made.stdout.startswith("ed25519:")
    assert run.invoke(main, ["key", path]).stdout == made.stdout
    assert signing.signer("ed25519:abc:def") == "ed25519:abc"
