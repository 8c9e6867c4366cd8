"""Budget amounts as people write them: ``9f``, ``9360t``, ``0.25``, ``2GiB``."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_kv.utilities.formatting import several

if TYPE_CHECKING:
    from lightning_kv.cache.passes import Geometry
    from lightning_kv.cache.view import CacheView

_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_PATTERN = re.compile(r"(\d+(?:\.\d+)?)(f|t|B|KiB|MiB|GiB)?")


@dataclass(frozen=True)
class Amount:
    """A budget: history per head, the current chunk not counted.

    Args:
        value: The number.
        unit: ``f`` frames, ``t`` tokens, ``share`` of the history the reference holds, or ``B``
            bytes of the whole cache of one clip, all layers, the current chunk included.
    """

    value: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Amount:
        """Read an amount.

        >>> Amount.parse("9f"), Amount.parse("2KiB")
        (Amount(value=9.0, unit='f'), Amount(value=2048.0, unit='B'))

        Raises:
            ValueError: Not an amount, not positive, or a share above 1.
        """
        found = _PATTERN.fullmatch(str(text).strip())
        if not found:
            raise ValueError(
                f"{text!r} is not a budget. Write 9f (frames), 9360t (tokens), 0.25 (of the "
                "history) or 2GiB (whole cache)."
            )
        value, unit = float(found[1]), found[2] or "share"
        if value <= 0 or (unit == "share" and value > 1) or (unit in "ft" and value % 1):
            raise ValueError(
                f"The budget {text!r} is out of range. Frames and tokens are whole numbers from 1 "
                "(9f, 9360t), a share lies between 0 and 1 (0.25), bytes are above 0 (2GiB)."
            )
        return cls(value * _BYTES[unit], "B") if unit in _BYTES else cls(value, unit)

    def over(self, other: Amount) -> float:
        """This amount as a share of another one of the same unit.

        Raises:
            ValueError: Their units differ.
        """
        if self.unit != other.unit:
            raise ValueError(
                f"Memory in {other.unit!r} and reads in {self.unit!r} have no ratio that one "
                "budget could keep. Give both, such as 15f/9f."
            )
        return self.value / other.value

    def scaled(self, share: float) -> str:
        """A share of this amount as people write it; frames, tokens and bytes are whole.

        >>> Amount.parse("10f").scaled(0.6)
        '6f'
        """
        if self.unit == "share":
            return f"{self.value * share:g}"
        return f"{max(1, round(self.value * share))}{self.unit}"

    def frames(self, view: CacheView) -> float:
        """Frames per head in the pass that ``view`` is about; may be fractional for tokens."""
        tokens = view.geometry.tokens
        if self.unit == "f":
            return self.value
        if self.unit == "t":
            return self.value / tokens
        if self.unit == "share":
            step = view.step
            history = step.start + (len(step.final) if view.query is None else 0)
            return float(max(1, math.floor(self.value * history)))
        flight = max(view.geometry.flight, len(view.step.frames))
        numbers = 4 * len(view.columns)
        row, age = view.old_row_bytes or (None, 0)
        return self._of_bytes(view.geometry, flight, view.fixed_bytes, numbers, row, age)

    def _of_bytes(
        self,
        geometry: Geometry,
        flight: int,
        fixed: int = 0,
        numbers: int = 0,
        row: float | None = None,
        age: int = 0,
    ) -> float:
        """History frames that fit beside what is in flight.

        Args:
            geometry: Sizes of the model.
            flight: Frames in flight; they are stored as computed.
            fixed: Bytes of state, modules and archive.
            numbers: Bytes of the columns of one row.
            row: Bytes of a row and head in the codec it ends in; as computed where None.
            age: Frames of history that are still stored as computed.
        """
        streams = geometry.tokens * geometry.heads * geometry.layers
        plain = geometry.frame_bytes + numbers * streams
        old = plain if row is None else (row + numbers) * streams
        left = self.value / geometry.branches - fixed - flight * plain
        young = min(max(left / plain, 0), age)
        return float(math.floor(young + max(0.0, left - young * plain) / old)) if left > 0 else 0.0

    def check(
        self,
        policy: str,
        smallest: int,
        history: int,
        chunk: int,
        geometry: Geometry,
        row: tuple[float, int] = (0.0, 0),
    ) -> None:
        """Refuse an amount that no rollout of this length could use.

        Args:
            policy: Name, for the message.
            smallest: Frames that the part protects whatever happens.
            history: Longest history of the rollout, in frames.
            chunk: Frames per chunk.
            geometry: Sizes of the model.
            row: Bytes of a row in the codec it ends in (0: as computed), and the age for it.

        Raises:
            ValueError: Below ``smallest``; or frames or tokens above ``history``.
        """
        frames = {
            "f": self.value,
            "t": self.value / geometry.tokens,
            "share": math.floor(self.value * history),
            "B": self._of_bytes(
                geometry, max(geometry.flight, chunk), row=row[0] or None, age=row[1]
            ),
        }[self.unit]
        if frames < smallest or (self.unit in "ft" and frames > history):
            least = (smallest + chunk) * geometry.frame_bytes
            amount = "1 frame" if frames == 1 else f"{frames:g} frames"
            raise ValueError(
                f"The budget of {policy!r} is {amount}. In a rollout with at most "
                f"{several(history, 'history frame')} it must lie between {smallest}f and "
                f"{history}f ({smallest}f of this model, with the current chunk, are {least} "
                "bytes)."
            )


def part_of(size: float, budget: float) -> int:
    """Frames of a setting that counts them, or below 1 gives a share of a budget.

    >>> part_of(3, 21), part_of(0.15, 21), part_of(0.15, 6), part_of(0.15, 1), part_of(0, 21)
    (3, 3, 1, 1, 0)

    Args:
        size: Frames from 1 on; below 1 a share, of which at least one frame is taken.
        budget: What it is a share of, in frames.
    """
    return int(size) if size >= 1 or not size else max(1, math.floor(size * budget + 0.5))


def least_with(size: float, rest: int) -> int:
    """The smallest budget in frames that holds a part of it (:func:`part_of`) and so many others.

    >>> least_with(3, 4), least_with(0.15, 4), least_with(0.5, 4)
    (7, 5, 8)
    """
    return next(n for n in itertools.count(rest) if part_of(size, n) + rest <= n)


def read_memory(text: str | None) -> int | None:
    """Bytes from ``24GiB``; None from None.

    Raises:
        ValueError: Not an amount of bytes above 0.
    """
    if text is None:
        return None
    try:
        amount = Amount.parse(text)
    except ValueError:
        amount = None
    if amount is None or amount.unit != "B":
        raise ValueError(
            f"--memory {text!r} is no amount of memory. It needs a number above 0 and a unit. "
            "Write 24GiB, 800MiB, 512KiB or 4096B."
        )
    return int(amount.value)
