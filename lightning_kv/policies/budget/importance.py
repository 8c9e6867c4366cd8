"""More frames for the heads that matter more."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.budgets import Amount
from lightning_kv.policies.part import BudgetPart
from lightning_kv.policies.tables import NO_TABLE, HeadTable


@dataclass(frozen=True)
class Importance(BudgetPart):
    """More frames for the heads that matter more, between a least and a most.

    Focused Forcing (arXiv 2605.18346): importance scaled to [0, 1] over all heads of the model,
    ``round(least + importance ** gamma * (most - least))``, halves to the even number. The paper
    counts the current chunk in its budgets, so its 4 to 9 of a model with chunks of 3 is
    ``least: 1f, amount: 6f`` here.

    Args:
        amount: The most, that of the most important head.
        least: What the least important head gets, in the same unit.
        gamma: Above 1, the middle heads come closer to the least.
        importance: One row per layer, one number per head; the name of a shipped table, such as
            ``focused-forcing-wan-1.3b``; ``auto``, the one shipped for the model; the path of a
            file of ``lightning-kv calibrate`` (.safetensors: the loss with the whole head silenced,
            as the paper has it), or of a JSON file with them under ``importance``.
    """

    name: ClassVar[str] = "importance"
    least: str = "1f"
    gamma: float = 2.0
    importance: HeadTable = NO_TABLE

    def __post_init__(self) -> None:
        super().__post_init__()
        most, least = self.bounds
        if most.unit != least.unit or most.value < least.value or most.unit == "B":
            raise ValueError(
                f"An importance budget from {self.least} to {self.amount} does not work. Give "
                "both as frames, tokens or shares, the least first: least: 1f, amount: 6f."
            )
        if self.gamma <= 0:
            raise ValueError(f"gamma={self.gamma} of an importance budget must be above 0, like 2.")
        given = HeadTable.of(self.importance, "importance").numbered(self.name, "importance")
        object.__setattr__(self, "importance", given)

    @property
    def bounds(self) -> tuple[Amount, Amount]:
        """The most and the least."""
        return Amount.parse(self.amount), Amount.parse(self.least)

    def check(self, geometry: Geometry, least: int) -> None:
        """The table has the model's shape, and no head gets less than what is protected."""
        try:
            self.importance.check_heads(geometry, "importance table", self.name)
        except ValueError as error:
            way = "Or let all heads share one amount, as `focused-forcing` does."
            raise ValueError(f"{error} {way}") from None
        low = self.bounds[1]
        frames = low.value / (geometry.tokens if low.unit == "t" else 1)
        if low.unit != "share" and frames < least:
            raise ValueError(
                f"The least of an importance budget is {self.least}, but {least} frames are "
                f"protected in every head. Give least: {least}f or more."
            )

    def allowed(self, view: CacheView) -> tuple[float, ...]:
        """The layer's row of :func:`budgets`."""
        most, least = (bound.frames(view) for bound in self.bounds)
        rows = self.importance.rows_for(view.geometry)
        return budgets(rows, self.gamma, most, least)[view.layer]


@lru_cache
def budgets(
    importance: tuple[tuple[float, ...], ...], gamma: float, most: float, least: float
) -> tuple[tuple[float, ...], ...]:
    """Frames of every head, ``[L][H]``; half a frame goes to the even neighbour."""
    low, high = (f(map(f, importance)) for f in (min, max))
    if high - low <= 1e-12:
        return tuple(tuple(float(round((most + least) / 2)) for _ in row) for row in importance)
    return tuple(
        tuple(
            float(round(least + ((value - low) / (high - low)) ** gamma * (most - least)))
            for value in row
        )
        for row in importance
    )
