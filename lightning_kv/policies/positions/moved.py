"""Rows appear at another time than the one at which they were made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Event, Selection
from lightning_kv.cache.host import upload
from lightning_kv.cache.plan import masks
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import PositionsPart
from lightning_kv.policies.checks import between, choice


@dataclass(frozen=True)
class Contiguous(PositionsPart):
    """The held frames of each head stand side by side, right before the current chunk.

    Block-relative rotary positions of Infinity-RoPE (arXiv 2511.20649), and its RoPE cut: the chunk
    after a scene cut stands at a fixed place, counted from the oldest held frame, so that all that
    is held appears far away; chunks after it stand as always. Ours: a cut never brings frames
    nearer; with several chunks in flight it holds once the chunk after it is the oldest.

    Args:
        of: Frames that take a place: all that are ``held``, or those that are ``read`` (Relax
            Forcing, arXiv 2603.21366), of each query frame its own; others share that of the next
            newer one.
        cut: Frames between the oldest of them and the chunk after a scene cut (the paper's 45); 0
            lets a scene cut change nothing.
    """

    name: ClassVar[str] = "contiguous"
    of: str = "held"
    cut: int = 0

    def __post_init__(self) -> None:
        choice(self, of=("held", "read"))
        between(self, 0, None, "cut")

    @property
    def depends(self) -> bool:
        """Only frames that are read take a place."""
        return self.of == "read"

    def event(self, event: Event, views: list[CacheView], state: Any) -> None:
        """Remember where a scene is cut."""
        if event.kind == "scene_cut":
            state["cut"] = event.frame

    def lags(self, view: CacheView, state: Any, selection: Selection | None = None) -> Tensor:
        """The frame's rank, counted from the newest of its head."""
        there = view.present.unsqueeze(1)
        if selection is not None and (read := masks(selection, view)[0]) is not None:
            there = view.by_frame(read.float(), "max") > 0
        rank = there.flip(2).cumsum(2).flip(2)  # [1 or H, 1 or Q, F], newest is 1
        if self.cut and view.step.start == state.get("cut"):
            rank = rank + (self.cut - there.sum(2, keepdim=True)).clamp_min(0)
        rank = view.at_rows(rank).float()
        if rank.shape[1] == 1:
            return rank
        times = view.step.query_times  # each query frame counts from itself
        later = upload([time - times[0] for time in times], rank, rank.dtype)
        return rank + later.unsqueeze(1)


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
        lag: Largest distance in frames; what the model's training allows (its horizon minus the
            chunk) where None.
        to: To the ``start`` of the query, or to its ``end``, so that history and a query of any
            length share a reach of ``lag`` frames.
    """

    name: ClassVar[str] = "clamp"
    lag: int | None = None
    to: str = "start"

    def __post_init__(self) -> None:
        choice(self, to=("start", "end"))
        if self.lag is not None:
            between(self, 0, None, "lag")

    def lags(self, view: CacheView, state: Any, selection: Selection | None = None) -> Tensor:
        """Those of the recorded times, none larger than allowed."""
        most = view.geometry.train_horizon if self.lag is None else self.lag
        if self.lag is None or self.to == "end":
            most = max(most - view.query_frames, 0)
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
