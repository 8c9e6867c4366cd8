"""Retention of whole frames or single tokens, per head."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Retention
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.checks import between, choice
from lightning_kv.policies.layout import Layout
from lightning_kv.policies.scores import ROUNDING, top_frames

GRANULARITIES = ("frame", "token")


@dataclass(frozen=True)
class UnitPart(RetainPart):
    """Keep some frames, or some single rows, and always the newest chunk.

    Whatever is ranked is called a unit: a frame (U = F) or a row at a frame and place (U = F · T).

    Args:
        granularity: Keep or drop whole ``frame``s, or single ``token``s of any frame.
        sink: First frames of the video that are never dropped; they count in the budget.
    """

    granularity: str = "frame"
    sink: int = 0

    def __post_init__(self) -> None:
        choice(self, granularity=GRANULARITIES)
        between(self, 0, None, "sink")

    def smallest(self, chunk: int) -> int:
        """The sink and the newest chunk."""
        return self.sink + chunk

    def fits(self, view: CacheView) -> bool:
        """Whether every head holds no more than the budget whatever its score."""
        if self.budget is None or not len(view.frame_ids):
            return True
        held = int(view.rows_per_frame.sum(-1).max())
        return held <= rows_in(self.budget.fewest(view), view)

    def units(self, per_row: Tensor) -> Tensor:
        """Row values ``[H, F, T]`` summed over units, ``[H, U]``; where bool, whether any is."""
        if self.granularity == "token":
            return per_row.flatten(1)
        return per_row.any(-1) if per_row.dtype == torch.bool else per_row.sum(-1)

    def guarded(self, view: CacheView, layout: Layout) -> Tensor:
        """Units that stay whatever their score, bool ``[H, U]``: the sink and the newest chunk."""
        ids = layout.frame_ids
        safe = (ids < self.sink) | (ids >= view.step.final[0])
        return self.units(safe.view(1, -1, 1) & layout.there)

    def lengths(self, scores: Tensor, view: CacheView) -> Tensor:
        """Units that each head may keep, int64 ``[H, 1]``, given scores ``[H, U]``."""
        if self.granularity == "frame":
            return self.budget.lengths(scores.unsqueeze(1), view)
        tokens = view.geometry.tokens
        frames = scores.unflatten(1, (-1, tokens)).sum(-1).unsqueeze(1)
        least = rows_in(self.budget.fewest(view), view)  # tokens need not fill whole frames
        return (self.budget.lengths(frames, view) * tokens).clamp_min(least)

    def best(self, scores: Tensor, there: Tensor, view: CacheView, layout: Layout) -> Tensor:
        """The units to keep, bool ``[H, U]``, of those that are there."""
        safe = self.guarded(view, layout).unsqueeze(1)
        lengths = self.lengths(scores, view)
        return top_frames(scores.unsqueeze(1), lengths, safe, there.unsqueeze(1))[:, 0]

    def rows(self, units: Tensor, layout: Layout) -> Tensor:
        """Units ``[H, U]`` as rows, bool ``[H, F, T]``."""
        if self.granularity == "token":
            return units.unflatten(1, layout.row.shape[1:])
        return units.unsqueeze(-1) & layout.there


@dataclass(frozen=True)
class RowScoredPart(UnitPart, ABC):
    """Keep the units with the highest scores of their rows."""

    @abstractmethod
    def row_scores(self, view: CacheView, layout: Layout) -> Tensor:
        """Score of every row, ``[H, F, T]``; that of a frame is the sum over its rows."""
        ...

    def _keep(self, view: CacheView, state: Any) -> Retention | None:
        if self.fits(view):
            return None
        layout = Layout.of(view)
        scores = self.units(self.row_scores(view, layout))
        kept = self.best(scores, self.units(layout.there), view, layout)
        return Retention(keep=layout.rows(self.rows(kept, layout)))


def rows_in(frames: float, view: CacheView) -> int:
    """Whole rows in so many frames, which may be a broken number."""
    return math.floor(frames * view.geometry.tokens + ROUNDING)
