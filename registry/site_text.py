"""Text of publishers as HTML."""

from __future__ import annotations

import html
from datetime import datetime, timezone

_KEPT = "\n\t\u200c\u200d"
"""Not printable by themselves, and no harm; the last two join letters and emoji."""


def text(words: str) -> str:
    """Words as they are, in an element or an attribute: never markup, and nothing that turns the
    direction of what stands beside them."""
    plain = "".join(
        c if c.isprintable() or c in _KEPT else "\N{REPLACEMENT CHARACTER}" for c in words
    )
    return html.escape(plain)


def span(kind: str, words: str) -> str:
    """Words with a class."""
    return f'<span class="{kind}">{text(words)}</span>'


def time(at: datetime, form: str = "%-d %B %Y") -> str:
    """A moment, for people and programs, in UTC."""
    utc = at.astimezone(timezone.utc)
    return f'<time datetime="{utc:%Y-%m-%dT%H:%M:%SZ}">{utc.strftime(form)}</time>'
