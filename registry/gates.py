"""Gates: what a version must be better in before an alias means it.

    kid.upper < base.kid.lower and clip >= 0.98 * prod.clip

`kid` is a metric of the version that is to be promoted, `kid.lower` and `kid.upper` the ends of its
interval, `base.kid` what the base without the LoRA had (the metric `kid_base`), and `prod.kid` that
of the version which the alias `prod` means now. A name with other characters than letters, digits
and _ is quoted: `prod-eu`.kid. A comparison with an alias that means nothing decides nothing; one
that cannot be made, since a metric is missing or was measured differently, refuses. Expressions are
taken apart by Python's parser and never executed.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from registry import logs, signing
from registry.aliases import PROMOTE, assign
from registry.api import Registry
from registry.errors import RegistryError
from registry.evaluation import difference, unsaid
from registry.logs import LogEntry
from registry.manifest import Manifest

_LONGEST = 1000
_QUOTE = " (a name such as clip-score is written `clip-score`)"
_COMPARISONS: dict[type[ast.cmpop], tuple[str, Callable[[float, float], bool]]] = {
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
}
_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}

Meaning = Callable[[str], Manifest | None]
"""The version that an alias means, None for nothing. Raises Incomparable if it cannot be used, or
RegistryError if there is no such alias."""


class Incomparable(RegistryError):
    """Why two numbers cannot be compared: a reason to refuse."""


class _Refused(Exception):
    """The gate does not let it through."""


@dataclass
class Verdict:
    """What a gate says of a version."""

    gate: str
    passed: bool = True
    comparisons: list[str] = field(default_factory=list)
    """Each one with its numbers and what it came to."""

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"gate": self.gate, "passed": self.passed, "comparisons": self.comparisons}


def promote(
    registry: Registry,
    reference: str,
    alias: str,
    gate: str | None,
    *,
    force: bool = False,
    reason: str = "",
) -> tuple[LogEntry, Verdict | None]:
    """Let an alias mean a version if the gate lets it through, or if it is forced.

    What the gate says is decided by what the alias means when it is set, whoever else sets it at
    the same time. Verdicts, refusals and force are recorded. Raises RegistryError if the gate
    refuses.
    """
    model, manifest = registry.located(reference)
    verdicts: list[Verdict] = []

    def decide(before: list[LogEntry]) -> dict[str, Any]:
        facts: dict[str, Any] = {"forced": True} if force else {}
        if gate is not None:
            verdict = evaluate(gate, manifest, _meaning(registry, model.name, alias, before))
            verdicts.append(verdict)
            facts = {**verdict.as_dict(), **facts}
            if not verdict.passed and not force:
                raise _Refused
        return {"action": PROMOTE, "version": manifest.version, "reason": reason, "facts": facts}

    try:
        entry = assign(registry, model, alias, manifest.version, decide)
    except _Refused:
        verdict = verdicts[-1]
        fields = {
            "action": "refuse",
            "version": manifest.version,
            "reason": reason,
            "facts": {**verdict.as_dict(), "alias": alias},
        }
        folder = f"models/{model.name}/events"
        logs.append(registry.store, folder, registry.store.now(), lambda _: fields)
        raise RegistryError(
            f"{manifest.reference} is not promoted to {alias}: {'; '.join(verdict.comparisons)}; "
            "publish a better one, or --force, which is recorded"
        ) from None
    return entry, verdicts[-1] if verdicts else None


def _meaning(registry: Registry, name: str, alias: str, before: list[LogEntry]) -> Meaning:
    """What aliases mean: that which is being set by its entries so far, others by a listing."""

    @cache
    def meaning(word: str) -> Manifest | None:
        model = registry.model(name)
        entry = model.aliases.get(word)
        if word == alias:
            entry = before[-1] if before else None
        elif entry is None and word not in registry.store.names(f"models/{name}/aliases"):
            raise RegistryError(f"{name} has no alias {word!r}; correct the gate{_QUOTE}")
        if entry is None or entry.version is None:
            return None
        if entry.version not in model.versions:
            raise Incomparable(f"{word} means {name}@{entry.version}, which was removed")
        try:
            signing.judge(f"{name}@{word}", name, entry.signature, word)
            (manifest,) = registry.manifests([(name, entry.version)])
            signing.judge(manifest.reference, name, manifest.signature)
        except RegistryError as error:
            raise Incomparable(str(error)) from error
        return manifest

    return meaning


def evaluate(gate: str, manifest: Manifest, meaning: Meaning) -> Verdict:
    """What a gate says of a version. Raises RegistryError if it cannot be read, or names an alias
    that is not there."""
    if len(gate) > _LONGEST:
        raise RegistryError(f"the gate has more than {_LONGEST} characters; shorten it")
    quoted: dict[str, str] = {}

    def stand_in(match: re.Match[str]) -> str:
        quoted[name := f"_quoted{len(quoted)}_"] = match[1]
        return name

    text = re.sub(r"`([^`]*)`", stand_in, gate.strip())
    verdict = Verdict(gate)
    evaluation = _Evaluation(gate, manifest, meaning, verdict, quoted)
    try:
        found = evaluation.decide(_parsed(gate, text))
    except (RecursionError, MemoryError) as error:
        raise _unreadable(gate, "it is nested too deeply") from error
    verdict.passed = found is not False and not evaluation.incomparable
    return verdict


def _parsed(gate: str, text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError) as error:
        where = f" at character {error.offset}" if isinstance(error, SyntaxError) else ""
        raise _unreadable(gate, f"it ends or breaks off{where}") from error


class _Evaluation:
    def __init__(
        self,
        gate: str,
        manifest: Manifest,
        meaning: Meaning,
        verdict: Verdict,
        quoted: dict[str, str],
    ):
        self.gate = gate
        self.manifest = manifest
        self.meaning = meaning
        self.verdict = verdict
        self.quoted = quoted
        """Names in backquotes by what stands for them in Python."""
        self.incomparable = False
        self.unsaid = False

    def decide(self, node: ast.expr) -> bool | None:
        """True, False, or None where there is nothing to compare with (Kleene's logic)."""
        if isinstance(node, ast.BoolOp):
            found = [self.decide(value) for value in node.values]
            if isinstance(node.op, ast.And):
                return False if False in found else None if None in found else True
            return True if True in found else None if None in found else False
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.decide(node.operand)
            return None if inner is None else not inner
        if isinstance(node, ast.Compare):
            return self._compare(node)
        raise self._unreadable(f"expected a comparison, found {self._text(node)}")

    def _compare(self, node: ast.Compare) -> bool | None:
        operands = [node.left, *node.comparators]
        if not all(type(kind) in _COMPARISONS for kind in node.ops):
            raise self._unreadable(f"expected < <= > >= == or !=, found {self._text(node)}")
        self.unsaid = False
        try:
            values = [self._number(operand) for operand in operands]
        except Incomparable as error:
            self.incomparable = True
            self.verdict.comparisons.append(f"{self._text(node)} cannot be decided: {error}")
            return None
        note = ", and nothing says how it was measured" if self.unsaid else ""
        results: list[bool | None] = []
        for number, kind in enumerate(node.ops):
            symbol, compare = _COMPARISONS[type(kind)]
            left, right = values[number], values[number + 1]
            names = f"{self._text(operands[number])} {symbol} {self._text(operands[number + 1])}"
            if left is None or right is None:
                self.verdict.comparisons.append(f"{names}: nothing to compare with")
                results.append(None)
                continue
            result = compare(left, right)
            word = "holds" if result else "does not hold"
            self.verdict.comparisons.append(f"{names} ({left:g} {symbol} {right:g}) {word}{note}")
            results.append(result)
        return False if False in results else None if None in results else True

    def _number(self, node: ast.expr) -> float | None:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(str(node.value))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            inner = self._number(node.operand)
            return None if inner is None else -inner
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            left, right = self._number(node.left), self._number(node.right)
            if left is None or right is None:
                return None
            try:
                return _ARITHMETIC[type(node.op)](left, right)
            except ZeroDivisionError:
                raise Incomparable(f"{self._text(node)} divides by zero") from None
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self._metric(node)
        raise self._unreadable(f"expected a metric or a number, found {self._text(node)}")

    def _metric(self, node: ast.expr) -> float | None:
        name, end, inner = self._text(node), None, node
        if isinstance(node, ast.Attribute) and node.attr in ("lower", "upper"):
            end, inner = node.attr, node.value
        if isinstance(inner, ast.Name):
            manifest, key = self.manifest, self._name(inner.id)
        elif not (isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name)):
            raise self._unreadable(f"expected metric, alias.metric or .lower, found {name}")
        elif inner.value.id == "base":
            manifest, key = self.manifest, f"{self._name(inner.attr)}_base"
        else:
            incumbent = self.meaning(self._name(inner.value.id))
            if incumbent is None:
                return None
            manifest, key = incumbent, self._name(inner.attr)
            if different := difference(self.manifest, manifest, key):
                raise Incomparable(
                    f"{key} of {self.manifest.reference} and {manifest.reference} were measured "
                    f"differently: {different}"
                )
            self.unsaid = self.unsaid or unsaid(self.manifest, manifest, key)
        if end is None:
            value = manifest.metrics.get(key)
        else:
            interval = manifest.intervals.get(key)
            value = None if interval is None else interval[end == "upper"]
        if value is None:
            what = f"no interval of {key!r}" if end and key in manifest.metrics else f"no {key!r}"
            known = ", ".join(manifest.metrics) or "none"
            raise Incomparable(
                f"the gate asks for {name}, and {manifest.reference} has {what}; its metrics are "
                f"{known}{_QUOTE}"
            )
        return value

    def _name(self, identifier: str) -> str:
        """What a name stands for, which may be in backquotes."""
        return self.quoted.get(identifier, identifier)

    def _text(self, node: ast.expr) -> str:
        """A part of the gate as it was written."""
        text = ast.unparse(node)
        for stand_in, name in self.quoted.items():
            text = text.replace(stand_in, f"`{name}`")
        return text

    def _unreadable(self, why: str) -> RegistryError:
        return _unreadable(self.gate, why)


def _unreadable(gate: str, why: str) -> RegistryError:
    return RegistryError(
        f"the gate {gate!r} cannot be read: {why}; write it like 'kid < base.kid and clip >= 0.98 "
        "* prod.clip'"
    )
