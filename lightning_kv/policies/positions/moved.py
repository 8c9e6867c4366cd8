"""Rows appear at another time than the one at which they were made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import PositionsPart
from lightning_kv.policies.budgets import part_of
from lightning_kv.policies.checks import between, choice


@dataclass(frozen=True)
class SinkLag(PositionsPart):
    """The sink follows the current chunk at a fixed distance; other rows stay.

    Deep Forcing's sink (arXiv 2512.05081), also used by Focused Forcing (arXiv 2605.18346), and the
    anchor of Rolling Forcing (arXiv 2509.25161).

    Args:
        sink: Number of first frames that move.
        lag: Frames between the first of them and a mark in the query; rows that are nearer than
            that stay where they are.
        to: The mark: the ``start`` of the query, or its ``end``, so that sink, history and a query
            of any length share a reach of ``lag`` frames.
    """

    name: ClassVar[str] = "sink-lag"
    sink: int = 3
    lag: int = 21
    to: str = "start"

    def __post_init__(self) -> None:
        between(self, 0, None, "sink", "lag")
        choice(self, to=("start", "end"))

    def lags(self, view: CacheView, state: Any, selection: Selection | None = None) -> Tensor:
        """Those of the recorded times, the sink's no larger than allowed."""
        frame, start = view.frame_id, view.step.query_times[0]
        lag = start - view.time
        ahead = view.query_frames if self.to == "end" else 0
        moved = torch.minimum(lag, self.lag - ahead - frame.float())
        return torch.where(frame < self.sink, moved, lag).unsqueeze(1)


@dataclass(frozen=True)
class Clamp(PositionsPart):
    """No row appears further back than a largest lag.

    Args:
        lag: Largest distance in frames; below 1 a share of the model's training horizon; what the
            horizon leaves beside the query where None.
        to: To the ``start`` of the query, or to the ``end`` of its oldest chunk, so that history
            and a chunk share a reach of ``lag`` frames.
    """

    name: ClassVar[str] = "clamp"
    lag: float | None = None
    to: str = "start"

    def __post_init__(self) -> None:
        choice(self, to=("start", "end"))
        if self.lag is not None:
            between(self, 0, None, "lag")

    def lags(self, view: CacheView, state: Any, selection: Selection | None = None) -> Tensor:
        """Those of the recorded times, none larger than allowed."""
        horizon, flight = view.geometry.train_horizon, view.query_frames
        most = horizon - flight if self.lag is None else part_of(self.lag, horizon)
        if self.lag is not None and self.to == "end":
            most -= min(view.geometry.chunk or flight, flight)
        most = max(most, 0)
        return (view.step.query_times[0] - view.time).clamp_max(most).unsqueeze(1)


@dataclass(frozen=True)
class TemporalCorrection(PositionsPart):
    """Held frames close ranks behind the chunk, in a window that the model knows.

    The dynamic temporal correction of Future Forcing (arXiv 2605.30083), rebuilt from its
    description: a frame appears as many frames back as there are younger frames in any head of the
    layer, so all heads agree; the sink keeps the far end of the window.

    Args:
        window: Frames in reach, the current chunk left out; no row appears further back.
        sink: First frames of the video that stay at the far end.
    """

    name: ClassVar[str] = "temporal-correction"
    window: int = 21
    sink: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sink < self.window:
            raise ValueError(
                f"A temporal correction with window={self.window} and sink={self.sink} leaves no "
                "room. Give a window larger than the sink, and a sink of 0 or more."
            )

    def lags(self, view: CacheView, state: Any, selection: Selection | None = None) -> Tensor:
        """The rank, or the place in the window for the sink."""
        ids = view.frame_ids
        rank = torch.arange(len(ids), 0, -1, device=ids.device).clamp_max(self.window - self.sink)
        lag = torch.where(ids < self.sink, self.window - ids, rank)
        lag = torch.minimum(lag, view.step.start - ids)
        return view.at_rows(lag.view(1, 1, -1)).float()
