"""A number of frames for each head, from a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import BudgetPart


@dataclass(frozen=True)
class Table(BudgetPart):
    """A share of the amount for each head, so that some keep more and some less.

    Args:
        shares: One row per layer, one number per head; 1 is the amount itself. A head gets
            ``round(share * amount)`` frames, and never less than what is protected.
    """

    name: ClassVar[str] = "table"
    shares: tuple[tuple[float, ...], ...] = ()

    def lengths(self, score: Tensor, view: CacheView) -> Tensor:
        """The layer's row of the table, in frames.

        Raises:
            ValueError: The table has another shape than the model.
        """
        shape = [len(row) for row in self.shares]
        if shape != [view.heads] * view.geometry.layers:
            raise ValueError(
                f"The budget table has {len(shape)} rows of {sorted(set(shape))} heads. This model "
                f"has {view.geometry.layers} layers of {view.heads} heads: give one number each."
            )
        shares = torch.tensor(self.shares[view.layer], device=score.device)
        return (shares * self.frames(view)).round().long().unsqueeze(1)
