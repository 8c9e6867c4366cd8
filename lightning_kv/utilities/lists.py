"""Lists as people write them in one word."""

from __future__ import annotations


def items_of(text: str) -> list[str]:
    """Items of ``a,b`` or ``[a,b]``.

    >>> items_of("[psnr, fvd/i3d]"), items_of("psnr"), items_of("[]")
    (['psnr', 'fvd/i3d'], ['psnr'], [])

    Raises:
        ValueError: Brackets are not closed.
    """
    inside = text.strip()
    if inside.startswith("[") != inside.endswith("]") or inside.count("{") != inside.count("}"):
        raise ValueError(f"The list {text!r} has brackets that do not match. Write [a,b] or a,b.")
    items = inside.removeprefix("[").removesuffix("]").split(",")
    return [item.strip() for item in items if item.strip()]
