"""Tables with one number per head: read from files, checked against a model."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_kv.cache.passes import Geometry


@dataclass(frozen=True)
class HeadTable:
    """One number per head, and the file they were read from.

    Args:
        rows: One row per layer, one number per head.
        file: Name of the file; None where the numbers were given in place.
        sha256: Of that file.
    """

    rows: tuple[tuple[float, ...], ...] = ()
    file: str | None = None
    sha256: str | None = None

    @classmethod
    def of(cls, value: Any) -> HeadTable:
        """A table from rows given in place, or from what :func:`dataclasses.asdict` made of one."""
        if isinstance(value, HeadTable):
            return value
        own = value if isinstance(value, dict) else {"rows": value}
        if not isinstance(own.get("rows"), tuple | list) or own.keys() - {"rows", "file", "sha256"}:
            raise ValueError(
                f"{str(value)[:60]} is no head table. Give a row per layer with one number per "
                "head, such as [[0.1, 0.9], [0.4, 0.2]], or the path of a JSON file."
            )
        return cls(**own)

    @classmethod
    def read(cls, path: str | Path, name: str) -> HeadTable:
        """A table from the key ``name`` of a JSON file.

        Raises:
            ValueError: No such file or key, or its rows are no rows of numbers.
        """
        wanted = (
            f'Give a JSON file such as {{"{name}": [[0.1, 0.9], [0.4, 0.2]]}}: a row per layer.'
        )
        try:
            content = Path(path).read_bytes()
            found = json.loads(content)[name]
            rows = tuple(tuple(float(value) for value in row) for row in found)
        except FileNotFoundError:
            raise ValueError(f"No head table at {str(path)!r}. {wanted}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(path)!r} is no head table: {type(error).__name__}: {error}. {wanted}"
            ) from error
        return cls(rows, Path(path).name, hashlib.sha256(content).hexdigest())

    def check(self, part: str, name: str, low: float | None = None) -> None:
        """Refuse a table that is no rows of finite numbers.

        Args:
            part: Name of the budget part.
            name: Of the setting.
            low: Smallest number that makes sense.

        Raises:
            ValueError: It is empty or flat, or holds something else than such numbers.
        """
        rows = [row if isinstance(row, tuple | list) else (None,) for row in self.rows]
        values = [value for row in rows for value in row]
        fine = [
            isinstance(x, int | float) and math.isfinite(x) and (low is None or x >= low)
            for x in values
        ]
        if not fine or not all(fine):
            floor = "" if low is None else f" from {low:g}"
            raise ValueError(
                f"The budget part {part!r} needs `{name}`: finite numbers{floor}, a row per layer "
                "and one number per head, or the path of a JSON file. "
                f"Given: {str(self.rows)[:60]}."
            )

    def check_heads(self, geometry: Geometry, what: str) -> None:
        """Refuse a table of another model.

        Raises:
            ValueError: It has another shape than the model.
        """
        shape = [len(row) for row in self.rows]
        if shape != [geometry.heads] * geometry.layers:
            widths = ", ".join(map(str, sorted(set(shape)))) or "no"
            whose = f" ({self.file})" if self.file else ""
            raise ValueError(
                f"The {what}{whose} has {len(shape)} rows of {widths} heads: it was made for "
                f"another model. This one has {geometry.layers} layers of {geometry.heads} heads: "
                "give one number for each."
            )


NO_TABLE = HeadTable()
"""Not given yet."""
