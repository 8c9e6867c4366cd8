"""A number of frames for each head, from a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import BudgetPart
from lightning_kv.policies.tables import check_heads, check_numbers, read_table


@dataclass(frozen=True)
class Table(BudgetPart):
    """A share of the amount for each head, so that some keep more and some less.

    Args:
        shares: One row per layer, one number per head, or the path of a JSON file with them under
            ``shares``; 1 is the amount itself. A head gets
            ``round(share * amount)`` frames, and never less than what is protected.
    """

    name: ClassVar[str] = "table"
    shares: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self.shares, self.name, "shares", low=0)

    @classmethod
    def prepared(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Reads the table if it is a path."""
        if isinstance(settings.get("shares"), str | Path):
            settings = settings | {"shares": read_table(settings["shares"], "shares")}
        return settings

    def fewest(self, view: CacheView) -> float:
        """The smallest share of the amount."""
        return float(round(min(map(min, self.shares)) * self.frames(view)))

    def check(self, geometry: Geometry, least: int) -> None:
        """The table has the model's shape."""
        check_heads(self.shares, geometry, "budget table")

    def lengths(self, score: Tensor, view: CacheView) -> Tensor:
        """The layer's row of the table, in frames."""
        shares = torch.tensor(self.shares[view.layer], device=score.device)
        return (shares * self.frames(view)).round().long().unsqueeze(1)
