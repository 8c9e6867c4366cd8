"""A number of frames for each head, from a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.budgets import Amount
from lightning_kv.policies.part import BudgetPart
from lightning_kv.policies.tables import NO_TABLE, HeadTable


@dataclass(frozen=True)
class Table(BudgetPart):
    """A share of the amount for each head, so that some keep more and some less.

    Args:
        shares: One row per layer, one number per head, the name of a shipped table, or the path of
            a JSON file with them under ``shares``; 1 is the amount itself. A head gets
            ``round(share * amount)`` frames, and never less than what is protected.
    """

    name: ClassVar[str] = "table"
    shares: HeadTable = NO_TABLE

    def __post_init__(self) -> None:
        super().__post_init__()
        given = HeadTable.of(self.shares, "shares").numbered(self.name, "shares", low=0)
        object.__setattr__(self, "shares", given)

    def check(self, geometry: Geometry, least: int) -> None:
        """The table has the model's shape, and no head gets less than what is protected.

        Raises:
            ValueError: It does not, or one does.
        """
        self.shares.check_heads(geometry, "budget table", self.name)
        amount = Amount.parse(self.amount)
        if amount.unit not in "ft":
            return
        frames = amount.value / (geometry.tokens if amount.unit == "t" else 1)
        share = min(map(min, self.shares.rows_for(geometry)))
        if round(share * frames) < least:
            raise ValueError(
                f"The smallest share of a budget table is {share:g} of {self.amount}: "
                f"{round(share * frames)} frames, but {least} are protected in every head. Give "
                f"shares of {least / frames:.3g} or more, or a larger amount."
            )

    def allowed(self, view: CacheView) -> tuple[float, ...]:
        """The layer's row of the table, in frames."""
        frames, shares = self.frames(view), self.shares.rows_for(view.geometry)[view.layer]
        return tuple(float(round(share * frames)) for share in shares)
