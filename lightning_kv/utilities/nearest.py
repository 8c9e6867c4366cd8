"""The name that somebody may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def hint(given: str, known: Iterable[str]) -> str:
    """The nearest known name as a question, with a blank before it; nothing where none is near.

    >>> hint("self-forcin", ["causvid", "self-forcing"])
    " Did you mean 'self-forcing'?"
    """
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""
