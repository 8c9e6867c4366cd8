"""Keep what was looked at most so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_kv.cache.view import CacheView
from lightning_kv.policies.checks import between
from lightning_kv.policies.layout import Layout
from lightning_kv.policies.rowwise import RowScoredPart


@dataclass(frozen=True)
class HeavyHitters(RowScoredPart):
    """Keep what was looked at most so far, and the newest chunk.

    H2O, Heavy-Hitter Oracle (arXiv 2306.14048): the softmax mass that a row received from the
    queries of all clean passes since it was made.

    Args:
        queries: Query rows sampled per pass.
    """

    name: ClassVar[str] = "heavy-hitters"
    queries: int = 520

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 1, None, "queries")

    @property
    def needs(self) -> dict[str, dict[str, Any]]:
        """The mass."""
        return {"attention_mass": {"sampled": self.queries}}

    def row_scores(self, view: CacheView, layout: Layout) -> Tensor:
        """The accumulated mass."""
        return layout.spread(view, [group.expanded("mass") for group in view.groups])
