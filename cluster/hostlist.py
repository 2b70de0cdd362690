"""Slurm's compact lists of host names."""

from __future__ import annotations

import re
from itertools import product

from cluster.errors import ClusterError

_MOST_HOSTS = 100_000


def expand_hosts(text: str) -> tuple[str, ...]:
    """The hosts of a Slurm list, in its order: "n[08-10],gpu" is n08, n09, n10, gpu.

    Raises ClusterError if the text is not such a list.
    """
    hosts: list[str] = []
    for part in re.split(r",(?![^\[]*\])", text):
        pieces = re.split(r"\[([^\[\]]*)\]", part)
        literal, ranges = pieces[::2], pieces[1::2]
        if not all(re.fullmatch(r"[\w.-]*", piece) for piece in literal) or not part:
            raise _bad_hosts(text)
        numbers = [_numbers(piece, text) for piece in ranges]
        for chosen in product(*numbers):
            filled = zip(literal, (*chosen, ""), strict=True)
            hosts.append("".join(word + number for word, number in filled))
            if len(hosts) > _MOST_HOSTS:
                raise _bad_hosts(text)
    return tuple(hosts)


def _numbers(ranges: str, text: str) -> list[str]:
    """What a bracket holds: "08-10,12" is 08, 09, 10, 12."""
    found: list[str] = []
    for part in ranges.split(","):
        if not (match := re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)):
            raise _bad_hosts(text)
        first, last = match[1], match[2] or match[1]
        if not int(first) <= int(last) < int(first) + _MOST_HOSTS:
            raise _bad_hosts(text)
        found += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return found


def _bad_hosts(text: str) -> ClusterError:
    return ClusterError(
        f"SLURM_JOB_NODELIST: expected a list such as node[01-03,7], found {text!r}; start under "
        "srun, or give --nnodes, --node-rank and --master-addr"
    )
