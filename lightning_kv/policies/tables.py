"""Tables with one number per head: read from files, checked against a model."""

from __future__ import annotations

import json
import math
from pathlib import Path

from lightning_kv.cache.passes import Geometry

HeadTable = tuple[tuple[float, ...], ...]
"""One row per layer, one number per head."""


def read_table(path: str | Path, name: str) -> HeadTable:
    """A table from the key ``name`` of a JSON file.

    Raises:
        ValueError: No such file or key, or its rows are no rows of numbers.
    """
    wanted = f'Give a JSON file such as {{"{name}": [[0.1, 0.9], [0.4, 0.2]]}}: a row per layer.'
    try:
        found = json.loads(Path(path).read_text())[name]
        return tuple(tuple(float(value) for value in row) for row in found)
    except FileNotFoundError:
        raise ValueError(f"No head table at {str(path)!r}. {wanted}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is no head table: {type(error).__name__}: {error}. {wanted}"
        ) from error


def check_numbers(table: HeadTable, part: str, name: str, low: float | None = None) -> None:
    """Refuse a table that is no rows of finite numbers.

    Args:
        table: What was given.
        part: Name of the budget part.
        name: Of the setting.
        low: Smallest number that makes sense.

    Raises:
        ValueError: It is empty or flat, or holds something else than such numbers.
    """
    rows = [row if isinstance(row, tuple | list) else (None,) for row in table]
    values = [value for row in rows for value in row]
    fine = [
        isinstance(x, int | float) and math.isfinite(x) and (low is None or x >= low)
        for x in values
    ]
    if not fine or not all(fine):
        floor = "" if low is None else f" from {low:g}"
        raise ValueError(
            f"The budget part {part!r} needs `{name}`: finite numbers{floor}, a row per layer and "
            f"one number per head, or the path of a JSON file. Given: {str(table)[:60]}."
        )


def check_heads(table: HeadTable, geometry: Geometry, what: str) -> None:
    """Refuse a table of another model.

    Raises:
        ValueError: It has another shape than the model.
    """
    shape = [len(row) for row in table]
    if shape != [geometry.heads] * geometry.layers:
        widths = ", ".join(map(str, sorted(set(shape)))) or "no"
        raise ValueError(
            f"The {what} has {len(shape)} rows of {widths} heads: it was made for another model. "
            f"This one has {geometry.layers} layers of {geometry.heads} heads: give one number "
            "for each."
        )
