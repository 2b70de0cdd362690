"""Signatures: who vouches for a version or an alias, and whose word counts.

A key is an Ed25519 key in a PEM file. What `LORA_REGISTRY_KEY` names signs all that is published.
Whose signature is asked for stands in a policy, a YAML file that `LORA_REGISTRY_POLICY` names and
that belongs to who reads, not to the registry:

    mode: enforce                    # off, warn or enforce
    keys:
      alice: ed25519:3q2+7w…         # what `lora-registry key` prints
    publish:
      "emoji-*": [alice]             # the first pattern that fits a name counts
    aliases:
      prod: [alice]                  # who may set it; for others whoever may publish
"""

from __future__ import annotations

import base64
import fnmatch
import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from registry.errors import RegistryError, os_errors, problems

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY_VARIABLE, POLICY_VARIABLE = "LORA_REGISTRY_KEY", "LORA_REGISTRY_POLICY"
_ALGORITHM = "ed25519"
_log = logging.getLogger("lora-registry")
_PUBLIC = r"^ed25519:[A-Za-z0-9+/]{43}=$"


@dataclass(frozen=True)
class Key:
    """A key that signs."""

    _private: Ed25519PrivateKey

    @property
    def public(self) -> str:
        """`ed25519:` and 32 bytes in base64."""
        return f"{_ALGORITHM}:{_text(self._private.public_key().public_bytes_raw())}"

    def sign(self, data: bytes) -> str:
        """`ed25519:PUBLIC:SIGNATURE`."""
        return f"{self.public}:{_text(self._private.sign(data))}"


def new_key(path: Path) -> Key:
    """Make a key and write it to a file that only its owner can read.

    Raises RegistryError if there is a file, or it cannot be written.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with os_errors(f"write the key {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
    return Key(private)


def read_key(path: Path) -> Key:
    """The key in a PEM file. Raises RegistryError if it holds none."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    with os_errors("read the key"):
        content = path.read_bytes()
    try:
        private = load_pem_private_key(content, None)
    except (ValueError, TypeError):
        private = None
    if not isinstance(private, Ed25519PrivateKey):
        raise RegistryError(
            f"{path} is no Ed25519 key without a password; make one with 'lora-registry key FILE'"
        )
    return Key(private)


def own_key() -> Key | None:
    """What `LORA_REGISTRY_KEY` names, None if it is not set. Raises RegistryError if it is no
    key."""
    path = os.environ.get(KEY_VARIABLE)
    return _read_once(path) if path else None


@cache
def _read_once(path: str) -> Key:
    return read_key(Path(path).expanduser())


def is_of(signature: str, data: bytes) -> bool:
    """Are these the bytes that were signed?"""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        algorithm, public, signed = signature.split(":")
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public, validate=True))
        key.verify(base64.b64decode(signed, validate=True), data)
    except (ValueError, InvalidSignature):
        return False
    return algorithm == _ALGORITHM


def signer(signature: str | None) -> str | None:
    """The public key of a signature."""
    return signature.rpartition(":")[0] if signature else None


class Policy(BaseModel):
    """Whose signature is asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["off", "warn", "enforce"] = "enforce"
    keys: dict[str, Annotated[str, Field(pattern=_PUBLIC)]] = {}
    publish: dict[str, tuple[str, ...]] = {}
    aliases: dict[str, tuple[str, ...]] = {}

    @model_validator(mode="after")
    def _people_have_keys(self) -> Policy:
        named = {
            name for names in (*self.publish.values(), *self.aliases.values()) for name in names
        }
        if unknown := sorted(named - set(self.keys)):
            raise ValueError(f"no key is given for {', '.join(unknown)}")
        return self

    def name_of(self, signature: str | None) -> str | None:
        """Whom a signature belongs to, None if to nobody known."""
        public = signer(signature)
        return next((name for name, key in self.keys.items() if key == public), None)

    def publishers(self, name: str) -> tuple[str, ...]:
        """Who may publish under a name."""
        for pattern, people in self.publish.items():
            if fnmatch.fnmatchcase(name, pattern):
                return people
        return ()

    def problem(self, name: str, signature: str | None, alias: str | None = None) -> str | None:
        """Why a version, or what an alias means, is not to be trusted; None if it is."""
        allowed = self.publishers(name)
        if alias is not None:
            allowed = self.aliases.get(alias, allowed)
        names = ", ".join(allowed) or "nobody"
        if signature is None:
            return f"is not signed, and {names} may"
        found = self.name_of(signature)
        if found is None:
            return f"is signed by the unknown key {signer(signature)}, and {names} may"
        return None if found in allowed else f"is signed by {found}, and {names} may"


def policy() -> Policy | None:
    """What `LORA_REGISTRY_POLICY` names, None if it is not set.

    Raises RegistryError if it cannot be read.
    """
    path = os.environ.get(POLICY_VARIABLE)
    if not path:
        return None
    file = Path(path).expanduser()
    with os_errors("read the policy"):
        return _read_policy_once(file, file.stat().st_mtime_ns)


@cache
def _read_policy_once(path: Path, _: int) -> Policy:
    return read_policy(path)


def judge(words: str, name: str, signature: str | None, alias: str | None = None) -> None:
    """Hold a signature against the policy, if there is one: of a version of a model or what was
    done to it, or of what an alias of it means.

    `words` say what is signed. Raises RegistryError if the policy is enforced and forbids it.
    """
    found = policy()
    if found is None or found.mode == "off":
        return
    problem = found.problem(name, signature, alias)
    if problem and found.mode == "enforce":
        raise RegistryError(f"{words} {problem}; see the policy {os.environ[POLICY_VARIABLE]}")
    if problem:
        _log.warning("warning: %s %s", words, problem)


def judge_own(name: str, alias: str | None = None) -> None:
    """The same for what is about to be written with one's own key."""
    key = own_key()
    words = f"what you publish as {name}@{alias}" if alias else f"what you publish as {name}"
    judge(words, name, f"{key.public}:" if key else None, alias)


def read_policy(path: Path) -> Policy:
    """The policy in a YAML file. Raises RegistryError if it is none."""
    import yaml

    with os_errors("read the policy"):
        text = path.read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
        if isinstance(values, dict) and values.get("mode") is False:
            values["mode"] = "off"  # YAML's own reading of the word
        return Policy.model_validate(values)
    except yaml.YAMLError as error:
        raise RegistryError(f"{path} is not YAML ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        raise RegistryError(f"{path}: {problems(error)}; correct it") from error


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
