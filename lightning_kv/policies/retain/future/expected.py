"""Retention by what the queries to come will look at.

Shapes: H heads, J queries to come, N rows, F frames, U units (frames or rows).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.checks import named
from lightning_kv.cache.decisions import Event
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.rotary import wide
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.base import UnitPart, newest
from lightning_kv.policies.checks import between, choice
from lightning_kv.policies.retain.future.proxies import (
    PROXIES,
    FutureQueries,
    expected_mass,
    future_queries,
)
from lightning_kv.policies.statistics import update_bank, update_moments

BANK = 24  # frames


@dataclass(frozen=True)
class ExpectedPart(UnitPart):
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

    observes: ClassVar[tuple[str, ...]] = ("prefill", "commit")
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

    def observe(self, view: PassView, state: Any) -> None:
        """The queries of a clean pass."""
        if self.proxy == "bank":
            update_bank(view, state, self.bank_frames or BANK, self.bank_rows)
        else:
            cells = (1, 1) if self.proxy == "mean" else self.cells
            update_moments(view, state, cells, self.rate)

    def event(self, event: Event, views: list[CacheView], state: Any) -> None:
        """A prompt switch forgets the queries of the old prompt."""
        if event.kind == "prompt_switch":
            state.pop("bank", None)
            state.pop("moments", None)

    def expected(self, view: CacheView, state: Any) -> Expected:
        """Ask the queries of the past again, at ``steps`` times within ``horizon`` frames.

        Raises:
            ValueError: Frames have become final without a clean pass.
        """
        collected = state.get("bank" if self.proxy == "bank" else "moments", {}).get(view.layer)
        if collected is None:
            raise ValueError(
                f"{named(self, view)} expects by the queries of clean passes, but "
                f"frame {newest(view)} became final without one. Use a sampler that commits "
                "frames in a pass at t = 0."
            )
        ahead = view.ahead()
        asked = future_queries(collected, ahead, self.horizon, self.steps)
        mass = expected_mass(view, ahead, asked, self.variance)
        return Expected(view, ahead, asked, mass)

    def unit_scores(self, seen: Expected, alive: Tensor) -> Tensor:
        """Scores ``[H, U]`` of the units of which bool ``[1 or H, U]`` are alive."""
        return seen.scores(alive, self.unit == "frame", self.reduce == "max", self.value_norm)


@dataclass(frozen=True)
class Expected:
    """What can be known at a commit about the queries to come, and what that says of held rows.

    Args:
        view: At the commit.
        ahead: The view of the next chunk.
        asked: Queries to come.
        mass: ``[H, J, N]``: their softmax mass on every held row.
    """

    view: CacheView
    ahead: CacheView
    asked: FutureQueries
    mass: Tensor

    def scores(self, alive: Tensor, frames: bool, largest: bool, value_norm: bool) -> Tensor:
        """Expected mass of the living rows, as if the others had never been.

        Args:
            alive: bool ``[1 or H, U]``.
            frames: Units are frames, whose mass is that of all their rows.
            largest: The maximum over the queries to come, else the mean.
            value_norm: Multiply the mass by the length of the row's value.

        Returns:
            ``[H, F]`` for frames, ``[H, N]`` otherwise.
        """
        mass, wide_mass = self.mass, self.mass
        if value_norm:
            wide_mass = mass * wide(self.view.values()).norm(dim=-1).unsqueeze(1)
        if frames:
            same = wide_mass is mass
            mass = self.view.by_frame(mass)
            wide_mass = mass if same else self.view.by_frame(wide_mass)
        total = (mass * alive.unsqueeze(1)).sum(-1, keepdim=True)
        own = wide_mass * alive.unsqueeze(1) / total.clamp_min(torch.finfo(mass.dtype).tiny)
        return own.amax(1) if largest else own.mean(1)
