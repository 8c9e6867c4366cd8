"""The same number of frames for every head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_kv.cache.view import CacheView
from lightning_kv.policies.part import BudgetPart


@dataclass(frozen=True)
class Uniform(BudgetPart):
    """The same number of frames for every head of every layer."""

    name: ClassVar[str] = "uniform"

    def allowed(self, view: CacheView) -> tuple[float, ...]:
        """The amount."""
        return (self.frames(view),)
