"""The name that somebody may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def hint(given: Any, known: Iterable[str], shown: Mapping[str, str] | None = None) -> str:
    """The nearest known name as a question, with a blank before it; nothing where none is near.

    Near is what is spelled alike, or begins with what was given.

    Args:
        given: What somebody wrote.
        known: What would have worked.
        shown: What to say in place of some of them.

    >>> hint("self-forcin", ["causvid", "self-forcing"]), hint("dino", ["dino-vitb16"])
    (" Did you mean 'self-forcing'?", " Did you mean 'dino-vitb16'?")
    >>> hint("bogus", ["brightness", "causvid"])
    ''
    """
    near = nearest(given, known)
    return "" if near is None else f" Did you mean {(shown or {}).get(near, near)!r}?"


def nearest(given: Any, known: Iterable[str]) -> str | None:
    """The nearest known name, as `hint` says.

    >>> nearest("self-forcin", ["causvid", "self-forcing"])
    'self-forcing'
    """
    text, names = str(given), list(known)
    near = difflib.get_close_matches(text, names, n=1)
    near = near or [name for name in names if len(text) > 2 and name.startswith(text)]
    return near[0] if near else None


def unknown(what: str, given: Any, known: Iterable[str]) -> str:
    """What to say of an unknown name: that it is none, the nearest one, and all there are.

    >>> unknown("model", "panorma", ["panorama", "causvid"])
    "No model 'panorma'. Did you mean 'panorama'? Known: panorama, causvid."
    """
    names = list(known)
    return f"No {what} {given!r}.{hint(given, names)} Known: {', '.join(names)}."
