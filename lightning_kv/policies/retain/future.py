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
from lightning_kv.policies.foresight import Foresight
from lightning_kv.policies.merging import ALIGNS, MERGES, merged, row_pairs
from lightning_kv.policies.proxies import PROXIES
from lightning_kv.policies.redundancy import METRICS
from lightning_kv.policies.rowwise import RowScoredPart

BANK = 24  # frames


@dataclass(frozen=True)
class Future(RowScoredPart):
    """Keep what the queries to come will ask for, once.

    Future Forcing (arXiv 2605.30083). Its equations are not public; this is a reconstruction whose
    defaults were chosen by measurement. At each commit: past queries, before rotation, are turned
    to future times and stand for those to come (``proxy``). Of rows that are alike (``redundancy``)
    the older go into the youngest. If that is not enough, rows with the least expected softmax mass
    are dropped. The newest chunk always stays.

    Args:
        proxy: ``mean`` of all past queries, a mean for each of several ``cells`` of the frame, or a
            ``bank`` of single queries.
        horizon: Frames looked ahead.
        steps: At how many times within the horizon the proxies are asked.
        reduce: ``mean`` or ``max`` of the mass over the proxies.
        variance: Add the spread of queries around their mean to the logits (not for the bank).
        value_norm: Multiply the mass by the length of the value.
        cells: Rows and columns of cells.
        rate: Smallest weight of a new chunk in the running means.
        bank_frames: Newest frames whose queries are remembered; 24 where None.
        bank_rows: Queries of each of them.
        redundancy: What alike means: ``content`` (keys before rotation and values), ``future``
            (logits under the queries to come), ``cosine`` (keys), or None to skip the stage.
        similar: Rows are alike below this squared distance: 0 for equal rows, about 2 for unrelated
            ones.
        neighbourhood: With tokens: how far away in the frame an alike row may be, in tokens.
        merge: What becomes of an alike row: it goes into the other, which then counts for more
            tokens (``weight``; wants ``bias: log_weight``) or gets a key that draws the mass of
            both (``hyperplane``); or ``drop``.
        align: Merge keys ``raw`` (before rotation, at the time of the younger) or ``relative``
            (after rotation, each at its own time).
        most: Rows that may go into one at a time.
    """

    name: ClassVar[str] = "future"
    proxy: str = "bank"
    horizon: int = 12
    steps: int = 2
    reduce: str = "mean"
    variance: bool = False
    value_norm: bool = False
    cells: tuple[int, int] = (6, 13)
    rate: float = 0.1
    bank_frames: int | None = None
    bank_rows: int = 4
    redundancy: str | None = "content"
    similar: float = 0.25
    neighbourhood: int = 0
    merge: str = "drop"
    align: str = "raw"
    most: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, proxy=PROXIES, reduce=("mean", "max"), merge=MERGES, align=ALIGNS)
        choice(self, redundancy=(*METRICS, None))
        between(self, 1, None, "horizon", "steps", "bank_rows", "most")
        if self.bank_frames is not None:
            between(self, 1, None, "bank_frames")
        between(self, 0, None, "similar", "neighbourhood")
        if self.variance and self.proxy == "bank":
            raise ValueError(
                "variance: true does not go with proxy: bank, which holds the spread itself. "
                "Use proxy: cells or mean, or variance: false."
            )

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """The bank lies within the history, the neighbourhood within the frame."""
        if self.bank_frames is not None and self.bank_frames > frames:
            raise ValueError(
                f"bank_frames={self.bank_frames} is larger than the rollout of {frames} frames, "
                f"so the bank would never be full. Use {frames} or fewer."
            )
        if self.neighbourhood >= max(geometry.grid):
            raise ValueError(
                f"neighbourhood={self.neighbourhood} is larger than the frame of "
                f"{geometry.grid[0]} x {geometry.grid[1]} tokens. "
                f"Use {max(geometry.grid) - 1} or less."
            )

    @property
    def needs(self) -> dict[str, dict[str, Any]]:
        """The bank, or the moments."""
        if self.proxy == "bank":
            return {"query_bank": {"frames": self.bank_frames or BANK, "rows": self.bank_rows}}
        cells = (1, 1) if self.proxy == "mean" else self.cells
        return {"query_moments": {"cells": cells, "rate": self.rate}}

    def _keep(self, view: CacheView, state: Any) -> Retention | None:
        if self.fits(view):
            return None
        (need,) = self.needs
        seen = Foresight.of(
            view, view.collected[need], self.horizon, self.steps, variance=self.variance
        )
        layout, there = seen.layout, self.units(seen.layout.there)
        scores = self._scores(seen, there)
        gone, match = torch.zeros_like(there), None
        if self.redundancy is not None:
            gone, match = self._alike(seen, there, self.lengths(scores, view))
            scores = self._scores(seen, there & ~gone)
        kept = self.best(scores, there & ~gone, view, layout)
        rows = layout.rows(self.rows(kept, layout))
        if self.merge == "drop" or match is None:
            return Retention(keep=rows)
        pairs = row_pairs(layout, gone, match, kept, scores, self.most)
        return merged(view, seen.ahead, seen.asked, rows, pairs, self.merge, self.align)

    def _scores(self, seen: Foresight, alive: Tensor) -> Tensor:
        rows, frames = self.rows(alive, seen.layout), self.granularity == "frame"
        return seen.scores(rows, frames, self.reduce == "max", self.value_norm)

    def _alike(self, seen: Foresight, there: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Units that are too many and have a younger one alike, ``[H, U]``, and which that is."""
        frames = self.granularity == "frame"
        distance, match = seen.alike(self.redundancy, frames, self.neighbourhood)
        spare = there & ~self.guarded(seen.view, seen.layout) & (distance < self.similar)
        rank = distance.masked_fill(~spare, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
        return spare & (rank < there.sum(-1, keepdim=True) - lengths), match
