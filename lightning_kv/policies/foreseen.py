"""Retention by what the queries to come will look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.checks import between, choice
from lightning_kv.policies.foresight import Foresight
from lightning_kv.policies.proxies import PROXIES
from lightning_kv.policies.rowwise import UnitPart

BANK = 24  # frames


@dataclass(frozen=True)
class ForeseenPart(UnitPart):
    """Keep the rows with the largest softmax mass that the queries to come are expected to pay.

    The queries before rotation hardly change their distribution over a video, so those of the
    past, turned to future times, stand for those to come.

    Args:
        proxy: ``mean`` of all past queries, a mean for each of several ``cells`` of the frame, or a
            ``bank`` of single queries.
        horizon: Frames looked ahead.
        steps: At how many evenly spaced times within the horizon the proxies are asked.
        reduce: ``mean`` or ``max`` of the mass over the proxies.
        variance: Add the spread of queries around their mean to the logits (not for the bank).
        value_norm: Multiply the mass by the length of the value.
        cells: Rows and columns of cells.
        rate: Smallest weight of a new chunk in the running means.
        bank_frames: Newest frames whose queries are remembered; 24 where None.
        bank_rows: Queries of each of them.
    """

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

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, proxy=PROXIES, reduce=("mean", "max"))
        between(self, 1, None, "horizon", "steps", "bank_rows")
        between(self, 0, 1, "rate")
        if self.bank_frames is not None:
            between(self, 1, None, "bank_frames")
        if len(self.cells) != 2 or min(self.cells) < 1:
            raise ValueError(
                f"cells={self.cells} of the {self.kind} part {self.name!r} are no rows and "
                "columns. Give two numbers from 1, such as [6, 13]."
            )
        if self.variance and self.proxy == "bank":
            raise ValueError(
                "variance: true does not go with proxy: bank, which holds the spread itself. "
                "Use proxy: cells or mean, or variance: false."
            )

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """The bank lies within the history."""
        history = frames - chunk
        if self.bank_frames is not None and self.bank_frames > history:
            raise ValueError(
                f"bank_frames={self.bank_frames} is larger than the history, which has at most "
                f"{history} of {frames} frames. Use {history} or fewer."
            )

    @property
    def needs(self) -> dict[str, dict[str, Any]]:
        """The bank, or the moments."""
        if self.proxy == "bank":
            return {"query_bank": {"frames": self.bank_frames or BANK, "rows": self.bank_rows}}
        cells = (1, 1) if self.proxy == "mean" else self.cells
        return {"query_moments": {"cells": cells, "rate": self.rate}}

    def foresee(self, view: CacheView) -> Foresight:
        """Ask the proxies."""
        (need,) = self.needs
        if view.collected[need] is None:
            raise ValueError(
                f"The {self.kind} part {self.name!r} foresees by the queries of clean passes, but "
                f"frame {view.step.final[0]} became final without one. Use a sampler that commits "
                "frames in a pass at t = 0."
            )
        return Foresight.of(view, view.collected[need], self.horizon, self.steps, self.variance)

    def unit_scores(self, seen: Foresight, alive: Tensor) -> Tensor:
        """Scores ``[H, U]`` of the units of which bool ``[H, U]`` are alive."""
        rows, frames = self.rows(alive, seen.layout), self.granularity == "frame"
        return seen.scores(rows, frames, self.reduce == "max", self.value_norm)
