"""Gates: what a version must be better in before an alias means it.

    kid.upper < base.kid.lower and clip >= 0.98 * prod.clip

`kid` is a metric of the version that is to be promoted, `kid.lower` and `kid.upper` the ends of its
interval, `base.kid` what the base without the LoRA had (the metric `kid_base`), and `prod.kid` that
of the version which the alias `prod` means now. A comparison with an alias that means nothing
decides nothing. Expressions are taken apart by Python's parser and never executed.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from registry import logs
from registry.aliases import PROMOTE, aliases, set_alias
from registry.api import Registry
from registry.errors import RegistryError
from registry.evaluation import difference
from registry.logs import LogEntry
from registry.manifest import Manifest

_LONGEST = 1000
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

    Verdicts, refusals and force are recorded. Raises RegistryError if the gate refuses.
    """
    manifest = registry.resolve(reference)
    verdict = None
    if gate is not None:
        known = registry.store.names(f"models/{manifest.name}/aliases")
        current: dict[str, Manifest | None] = dict.fromkeys((alias, *known))
        for name, entry in aliases(registry, manifest.name).items():
            current[name] = registry.resolve(f"{manifest.name}@{entry.version}")
        verdict = evaluate(gate, manifest, current)
    facts = {**(verdict.as_dict() if verdict else {}), **({"forced": True} if force else {})}
    if verdict and not verdict.passed and not force:
        fields = {
            "action": "refuse",
            "version": manifest.version,
            "reason": reason,
            "facts": {**facts, "alias": alias},
        }
        folder = f"models/{manifest.name}/events"
        logs.append(registry.store, folder, registry.store.now(), lambda _: fields)
        raise RegistryError(
            f"{manifest.reference} is not promoted to {alias}: {'; '.join(verdict.comparisons)}; "
            "publish a better one, or --force, which is recorded"
        )
    entry = set_alias(
        registry,
        manifest.name,
        alias,
        manifest.version,
        reason=reason,
        action=PROMOTE,
        facts=facts,
    )
    return entry, verdict


def evaluate(gate: str, manifest: Manifest, current: Mapping[str, Manifest | None]) -> Verdict:
    """What a gate says of a version, given what the aliases mean now, None for nothing.

    Raises RegistryError if it cannot be read, names what is not there, or compares what was
    measured differently.
    """
    if len(gate) > _LONGEST:
        raise RegistryError(f"the gate has more than {_LONGEST} characters; shorten it")
    try:
        tree = ast.parse(gate.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f" at character {error.offset}" if isinstance(error, SyntaxError) else ""
        raise _unreadable(gate, f"it ends or breaks off{where}") from error
    verdict = Verdict(gate)
    found = _Evaluation(gate, manifest, current, verdict).decide(tree)
    verdict.passed = found is not False
    return verdict


class _Evaluation:
    def __init__(
        self,
        gate: str,
        manifest: Manifest,
        current: Mapping[str, Manifest | None],
        verdict: Verdict,
    ):
        self.gate = gate
        self.manifest = manifest
        self.current = current
        self.verdict = verdict

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
        raise _unreadable(self.gate, f"expected a comparison, found `{ast.unparse(node)}`")

    def _compare(self, node: ast.Compare) -> bool | None:
        operands = [node.left, *node.comparators]
        values = [self._number(operand) for operand in operands]
        results: list[bool | None] = []
        for number, kind in enumerate(node.ops):
            if type(kind) not in _COMPARISONS:
                what = f"expected < <= > >= == or !=, found `{ast.unparse(node)}`"
                raise _unreadable(self.gate, what)
            symbol, compare = _COMPARISONS[type(kind)]
            left, right = values[number], values[number + 1]
            names = f"{ast.unparse(operands[number])} {symbol} {ast.unparse(operands[number + 1])}"
            if left is None or right is None:
                self.verdict.comparisons.append(f"{names}: nothing to compare with")
                results.append(None)
                continue
            result = compare(left, right)
            word = "holds" if result else "does not hold"
            self.verdict.comparisons.append(f"{names} ({left:g} {symbol} {right:g}) {word}")
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
                raise RegistryError(
                    f"the gate divides by zero in `{ast.unparse(node)}`; correct it"
                ) from None
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self._metric(ast.unparse(node).split("."))
        raise _unreadable(self.gate, f"expected a metric or a number, found `{ast.unparse(node)}`")

    def _metric(self, parts: list[str]) -> float | None:
        name, end = ".".join(parts), None
        if len(parts) > 1 and parts[-1] in ("lower", "upper"):
            end = parts.pop()
        if len(parts) == 1:
            manifest, key = self.manifest, parts[0]
        elif len(parts) == 2 and parts[0] == "base":
            manifest, key = self.manifest, f"{parts[1]}_base"
        elif len(parts) == 2:
            if parts[0] not in self.current:
                raise RegistryError(
                    f"the gate asks for {name}, and {self.manifest.name} has no alias "
                    f"{parts[0]!r}; correct it"
                )
            incumbent = self.current[parts[0]]
            if incumbent is None:
                return None
            manifest, key = incumbent, parts[1]
            if different := difference(self.manifest, manifest, key):
                raise RegistryError(
                    f"{key} of {self.manifest.reference} and {manifest.reference} were measured "
                    f"differently, so a gate cannot compare them: {different}; measure one anew"
                )
        else:
            raise _unreadable(self.gate, f"expected metric, alias.metric or .lower, found `{name}`")
        if end is None:
            value = manifest.metrics.get(key)
        else:
            interval = manifest.intervals.get(key)
            value = None if interval is None else interval[end == "upper"]
        if value is None:
            what = f"no interval of {key!r}" if end and key in manifest.metrics else f"no {key!r}"
            known = ", ".join(manifest.metrics) or "none"
            raise RegistryError(
                f"the gate asks for {name}, and {manifest.reference} has {what}; its metrics are "
                f"{known}"
            )
        return value


def _unreadable(gate: str, why: str) -> RegistryError:
    return RegistryError(
        f"the gate {gate!r} cannot be read: {why}; write it like 'kid < base.kid and clip >= 0.98 "
        "* prod.clip'"
    )
