"""Keep what the queries to come will ask for, once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Retention
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.checks import between, choice
from lightning_kv.policies.foreseen import ForeseenPart
from lightning_kv.policies.foresight import Foresight
from lightning_kv.policies.merging import ALIGNS, MERGES, merged, row_pairs
from lightning_kv.policies.redundancy import METRICS


@dataclass(frozen=True)
class Future(ForeseenPart):
    """Keep what the queries to come will ask for, once.

    Future Forcing (arXiv 2605.30083). Its equations are not public; this is a reconstruction whose
    defaults were chosen by measurement. At each commit: past queries, before rotation, are turned
    to future times and stand for those to come. Of rows that are alike the older go into the
    youngest, or just go. If that is not enough, rows with the least expected softmax mass are
    dropped. The newest chunk and the sink always stay.

    Args:
        redundancy: What alike means: ``content`` (keys before rotation and values), ``future``
            (logits under the queries to come), ``cosine`` (keys), or None to skip the stage.
        similar: Rows are alike below this squared distance: 0 for equal rows, about 2 for unrelated
            ones.
        neighbourhood: With tokens: how far away in the frame an alike row may be, in tokens.
        merge: What becomes of an alike row: ``drop``; or it goes into the other, which then counts
            for more tokens (``weight``; wants ``bias: log_weight``) or gets a key that draws the
            mass of both (``hyperplane``).
        align: Merge keys ``raw`` (before rotation, at the time of the younger) or ``relative``
            (after rotation, each at its own time).
        most: Rows that may go into one at a time.
    """

    name: ClassVar[str] = "future"
    redundancy: str | None = "content"
    similar: float = 0.25
    neighbourhood: int = 0
    merge: str = "drop"
    align: str = "raw"
    most: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, merge=MERGES, align=ALIGNS, redundancy=(*METRICS, None))
        between(self, 1, None, "most")
        between(self, 0, None, "similar", "neighbourhood")
        if self.neighbourhood and self.granularity == "frame":
            raise ValueError(
                f"neighbourhood={self.neighbourhood} is about tokens, but whole frames are kept. "
                "Use granularity: token, or neighbourhood: 0."
            )

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """The bank lies within the history, the neighbourhood within the frame."""
        super().check(geometry, chunk, frames)
        if self.neighbourhood >= max(geometry.grid):
            raise ValueError(
                f"neighbourhood={self.neighbourhood} is larger than the frame of "
                f"{geometry.grid[0]} x {geometry.grid[1]} tokens. "
                f"Use {max(geometry.grid) - 1} or less."
            )

    def suits(self, bias: str | None) -> None:
        """Weights count by the bias, keys on the hyperplane without it."""
        wanted = {"weight": "log_weight", "hyperplane": None}.get(self.merge, bias)
        if bias != wanted:
            raise ValueError(
                f"merge: {self.merge} does not go with bias: {bias or 'none'}, which would count "
                f"the mass of merged rows {'twice' if bias else 'not at all'}. "
                f"Use bias: {wanted or 'none'}, or merge: drop."
            )

    def _keep(self, view: CacheView, state: Any) -> Retention | None:
        if self.fits(view):
            return None
        seen = self.foresee(view)
        layout, there = seen.layout, self.units(seen.layout.there)
        before = scores = self.unit_scores(seen, there)
        gone, match = torch.zeros_like(there), None
        if self.redundancy is not None:
            gone, match = self._alike(seen, there, self.lengths(scores, view))
            scores = self.unit_scores(seen, there & ~gone)
        kept = self.best(scores, there & ~gone, view, layout)
        rows = layout.rows(self.rows(kept, layout))
        if self.merge == "drop" or match is None:
            return Retention(keep=rows)
        pairs = row_pairs(layout, gone, match, kept, before, self.most)
        return merged(view, seen.ahead, seen.asked, rows, pairs, self.merge, self.align)

    def _alike(self, seen: Foresight, there: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Units that are too many and have a younger one alike, ``[H, U]``, and which that is."""
        frames = self.granularity == "frame"
        distance, match = seen.alike(self.redundancy, frames, self.neighbourhood)
        spare = there & ~self.guarded(seen.view, seen.layout) & (distance < self.similar)
        rank = distance.masked_fill(~spare, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
        return spare & (rank < there.sum(-1, keepdim=True) - lengths), match
