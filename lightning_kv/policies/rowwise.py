"""Retention by a score of rows: whole frames or single tokens, per head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.decisions import PerHead, Retention
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import RetainPart

GRANULARITIES = ("frame", "token")


@dataclass(frozen=True)
class RowScoredPart(RetainPart):
    """Keep the rows, or the frames, with the highest scores, and always the newest chunk.

    Args:
        granularity: Keep or drop whole ``frame``s, or single ``token``s of any frame.
        sink: First frames of the video that are never dropped; they count in the budget.
    """

    granularity: str = "frame"
    sink: int = 0

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"granularity={self.granularity!r} of the part {self.name!r} is unknown. "
                f"Use one of: {', '.join(GRANULARITIES)}."
            )
        if self.sink < 0:
            raise ValueError(
                f"sink={self.sink} of the part {self.name!r} is below 0. Give a number of frames, "
                "0 for none."
            )

    def row_scores(self, view: CacheView, state: Any) -> list[Tensor]:
        """Score of every held row, per group ``[h, N]``."""
        raise NotImplementedError

    def scores(self, view: CacheView, state: Any) -> Tensor:
        """Frames: the sum over their rows."""
        return view.per_frame([x.unsqueeze(1) for x in self.row_scores(view, state)])

    def protected(self, view: CacheView, scores: Tensor) -> Tensor:
        """The sink and the chunk that was just committed."""
        return self.kept_frames(view).view(1, 1, -1)

    def kept_frames(self, view: CacheView) -> Tensor:
        """Frames that stay whatever their score, bool ``[F]``."""
        return (view.frame_ids < self.sink) | (view.frame_ids >= view.step.final[0])

    def smallest(self, chunk: int) -> int:
        """The sink and the newest chunk."""
        return self.sink + chunk

    def kept(self, view: CacheView, state: Any) -> PerHead | None:
        """Rows that stay, per head; None where everything fits."""
        if self.granularity == "frame":
            frames = self.choose(view, state)
            return None if frames is None else view.rows_of(frames[:, 0])
        if self.budget is None or not len(view.frame_ids):
            return None
        total = view.rows_per_frame.sum(-1)
        if self.budget.uniform and self._rows(view) >= int(total.max()):
            return None
        scores = self.row_scores(view, state)
        summed = view.per_frame([x.unsqueeze(1) for x in scores])
        return self._best_rows(view, scores, self.budget.lengths(summed, view))

    def _rows(self, view: CacheView) -> int:
        return int(self.budget.frames(view) * view.geometry.tokens)

    def _best_rows(self, view: CacheView, scores: list[Tensor], lengths: Tensor) -> PerHead:
        """The best rows of each head: as many as so many whole frames have."""
        guarded, found = self.kept_frames(view), {}
        for group, score in zip(view.groups, scores, strict=True):
            safe = guarded[view.frame_index(group)].expand_as(score)
            order = score.double().masked_fill(safe, torch.inf).argsort(dim=-1, descending=True, stable=True)
            for head, own, best in zip(group.heads, safe, order, strict=True):
                wanted = int(lengths[head, 0]) * view.geometry.tokens
                if self.budget.uniform:
                    wanted = self._rows(view)
                found[head] = best[: max(wanted, int(own.sum()))].sort().values
        return [found[head] for head in range(view.heads)]

    def _keep(self, view: CacheView, state: Any) -> Retention | None:
        rows = self.kept(view, state)
        return None if rows is None else Retention(keep=rows)
