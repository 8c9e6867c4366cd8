"""Rows stay at the time at which they were made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import PositionsPart


@dataclass(frozen=True)
class Absolute(PositionsPart):
    """Rows stay at their recorded time. Keys are held rotated, so reading costs nothing."""

    name: ClassVar[str] = "absolute"
    moves: ClassVar[bool] = False

    def lags(self, view: CacheView, state: Any, selection: Selection | None = None) -> Tensor:
        """Those of the recorded times."""
        return view.step.query_times[0] - view.time.unsqueeze(1)
