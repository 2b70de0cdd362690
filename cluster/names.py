"""Names that Kubernetes and Slurm take, checked before anything is written."""

from __future__ import annotations

import re

from cluster.errors import ClusterError

_LABEL = r"[a-z]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = rf"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.{_LABEL})*"
_RULES = {
    "namespace": (r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", 63, "lower-case letters, digits and -"),
    "partition": (r"\w[\w.-]*(,\w[\w.-]*)*", 255, "names of partitions, separated by commas"),
    "image": (r"[\w.-]+(:\d+)?(/[\w.-]+)*(:[\w.-]+)?(@sha256:[0-9a-f]{64})?", 255, "name:tag"),
    "secret": (_SUBDOMAIN, 253, "the name of a Secret: lower-case letters, digits, . and -"),
    "claim": (_SUBDOMAIN, 253, "the name of a claim: lower-case letters, digits, . and -"),
}
_LONGEST_JOB = 48
"""A pod's name adds at most "-scheduler-0" or "-worker-9999" and has to fit into 63."""


def checked(kind: str, text: str) -> str:
    """`text`, if it can be the name of a `kind`; raises ClusterError otherwise."""
    pattern, longest, words = _RULES[kind]
    if not re.fullmatch(pattern, text, re.ASCII) or len(text) > longest:
        raise ClusterError(
            f"--{kind} {text!r}: expected {words}, at most {longest} characters; correct it"
        )
    return text


def job_name(name: str, stamp: str) -> str:
    """The name of one submission of the run `name`: a label of Kubernetes, a name for Slurm.

    Raises ClusterError if the run's name does not begin with a letter.
    """
    label = re.sub(r"[^a-z0-9]+", "-", name)[: _LONGEST_JOB - len(stamp) - 1].strip("-")
    if not re.fullmatch(_LABEL, label):
        raise ClusterError(
            f"name: expected a name that begins with a letter, found {name!r}; give one with "
            "--set name=..."
        )
    return f"{label}-{stamp}"


def volume(text: str) -> tuple[str, str]:
    """CLAIM:PATH as the claim's name and the absolute path that it appears at."""
    claim, colon, path = text.partition(":")
    if not colon or not re.fullmatch(r"(/[\w.-]+)+", path) or "/.." in path:
        raise ClusterError(
            f"--volume {text!r}: expected CLAIM:PATH with an absolute path, such as loras:/data"
        )
    return checked("claim", claim), path
