"""How numbers are written: bytes, shares, counts."""

from __future__ import annotations

import math


def several(number: int, what: str) -> str:
    """A number of things.

    >>> several(1, "clip"), several(2, "clip")
    ('1 clip', '2 clips')
    """
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def upper(sentence: str) -> str:
    """The sentence with a capital at its start."""
    return sentence[:1].upper() + sentence[1:]


def sureness(confidence: float) -> str:
    """A confidence, rounded down so that 94.9 % does not look like 95 %.

    >>> sureness(0.949), sureness(0.9999)
    ('94 %', 'more than 99 %')
    """
    return "more than 99 %" if confidence > 0.99 else f"{int(100 * confidence + 1e-9)} %"


def percent(share: float, digits: int | None = None) -> str:
    """A share, with that many digits after the point; else with one where it is small.

    >>> percent(0.262), percent(0.0123), percent(0.262, 1)
    ('26 %', '1.2 %', '26.2 %')
    """
    if digits is None:
        digits = 1 if 0 != share < 0.1 else 0
    return f"{100 * share:.{digits}f} %"


def number(value: float) -> str:
    """A number, short.

    >>> number(0.9921), number(0.02), number(0.000031), number(0)
    ('0.992', '0.02', '3.1e-05', '0')
    """
    if abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:.3f}".rstrip("0").rstrip(".")


def format_bytes(size: float) -> str:
    """Bytes with a binary prefix.

    >>> format_bytes(3_355_443)
    '3.20 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000 or unit == "GiB":
            break
        size /= 1024
    digits = 0 if unit == "B" else max(0, 2 - int(math.log10(max(size, 1.0))))
    return f"{size:.{digits}f} {unit}"
