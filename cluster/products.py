"""Which devices of a server HCCL lets work together, product by product.

From HCCL's documentation (constraints.md) and its checks CheckDevCount and CheckSingleServerComm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import ClusterError

PRODUCTS = ("910A", "A2", "A3")
"""Atlas training servers (910A), Atlas A2 (910B1 to 910B4), Atlas A3."""

_RINGS = (range(4), range(4, 8))
_MODULE = 8
"""Devices of one module of an A2; a 16-card server has two."""


@dataclass(frozen=True)
class Objection:
    """Why a set of devices cannot be used."""

    rule: int
    """Number in docs/rank-tables.md."""
    code: str
    """HCCL's error code; "documented" for what it asks for but does not check."""
    text: str
    """expected …, found …; what can be chosen."""


def largest_device_id(product: str) -> int:
    """The largest physical id on any server of the product."""
    return 7 if product == "910A" else 15


def objection(
    product: str, device_ids: Sequence[int], servers: int = 1, intra_roce: bool = False
) -> Objection | None:
    """What speaks against using these devices on each of `servers`; None if nothing does.

    `intra_roce` is HCCL_INTRA_ROCE_ENABLE=1: the modules of an A2 then talk over their network.
    """
    ids = sorted(device_ids)
    last = largest_device_id(product)
    if ids and ids[-1] > last:
        return Objection(
            6,
            "HCCL_E_PARA",
            f"expected device ids 0 to {last} on a server of {product}, found {ids[-1]}; choose "
            f"among 0-{last}",
        )
    if product == "910A":
        return _rings(ids)
    if product == "A2":
        return _modules(ids, servers, intra_roce)
    return None


def check_devices(product: str, device_ids: Sequence[int]) -> None:
    """Raise ClusterError unless these devices of one server can work together."""
    found = objection(product, device_ids)
    if found:
        raise ClusterError(f"--devices {_listed(device_ids)}: {found.text}")


def _rings(ids: list[int]) -> Objection | None:
    if len(ids) not in (1, 2, 4, 8):
        return Objection(
            13,
            "EI0014",
            f"expected 1, 2, 4 or 8 devices of a 910A server, found {len(ids)}; choose one, two "
            "or four of 0-3 or of 4-7, or 0-7",
        )
    if len(ids) in (2, 4) and not any(set(ids) <= set(ring) for ring in _RINGS):
        choices = "0-3 or 4-7" if len(ids) == 4 else "two of 0-3 or two of 4-7"
        return Objection(
            13,
            "documented",
            f"expected {len(ids)} devices of one ring of a 910A server (0-3 or 4-7), found "
            f"{_listed(ids)}; choose {choices}",
        )
    return None


def _modules(ids: list[int], servers: int, intra_roce: bool) -> Objection | None:
    if servers > 1 and len(ids) > _MODULE:
        return Objection(
            13,
            "documented",
            f"expected 1 to 8 devices on each of several A2 servers, found {len(ids)}; choose at "
            "most 8, such as 0-7",
        )
    lower = [i for i in ids if i < _MODULE]
    upper = [i - _MODULE for i in ids if i >= _MODULE]
    if servers == 1 and not intra_roce and lower and upper and lower != upper:
        half = range(max(1, len(ids) // 2))
        pairs = ",".join(str(i) for i in (*half, *(i + _MODULE for i in half)))
        return Objection(
            13,
            "EI0010",
            "expected the same places in both modules of a 16-card A2 server (0 with 8, 1 with 9 "
            f"and so on), found {_listed(ids)}; choose {pairs}, or stay within 0-7 or 8-15",
        )
    return None


def _listed(ids: Sequence[int]) -> str:
    return ",".join(map(str, ids))
