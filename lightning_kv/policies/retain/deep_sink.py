"""A sink that takes up half of memory and moves along with the present."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Retention
from lightning_kv.cache.passes import Geometry, following
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.budgets import part_of
from lightning_kv.policies.checks import portion
from lightning_kv.policies.part import Preset


@dataclass(frozen=True)
class DeepSink(RetainPart):
    """Keep the first frames, about half of memory, moved up to the newest; and the newest.

    Deep Forcing's sink alone (arXiv 2512.05081). Whenever memory exceeds the budget, the oldest
    frames behind the sink are dropped, and the sink's keys are turned in time, in place, so that it
    starts one window (memory and the next chunk) before that chunk. Nothing else moves.

    Ours: the sink is a share of the budget, so that it shrinks with it (12 of 18 history frames is
    the authors' 12 of a window of 21); it is never turned back beyond time 0. A shorter last chunk
    counts as a full one.

    Args:
        sink: First frames of the video that stay: a number of frames, or a share of the budget
            (the paper finds 40 to 60 % of the window best).
    """

    name: ClassVar[str] = "deep-sink"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "deep-sink",
            "Keep the first frames, about half of memory and moved up in time, and the newest.",
            "Deep Forcing, arXiv 2512.05081",
            ("memory", "reads"),
            {"retain": {"part": "deep-sink", "budget": "18f"}},
            "18f: a window of 21 with chunks of 3, 12 of it the sink",
        ),
    )
    sink: float = 0.667

    def __post_init__(self) -> None:
        portion(self, "sink")

    def smallest(self, chunk: int) -> int:
        """The sink and one frame more; of a sink that is a share, one frame."""
        return self.sink + 1 if isinstance(self.sink, int) else 1

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """All heads turn the same sink."""
        self.evenly()

    def history(self, view: CacheView) -> int:
        """Whole frames of the budget."""
        return math.floor(self.budget.frames(view))

    def sunk(self, view: CacheView) -> int:
        """Frames of the sink."""
        return part_of(self.sink, self.history(view))

    def protected(self, view: CacheView, scores: Tensor) -> Tensor:
        """The sink."""
        return (view.frame_ids < self.sunk(view)).view(1, 1, -1)

    def kept(self, view: CacheView, units: Tensor | None, state: Any) -> Retention | None:
        """The sink turned to where the next chunk will look for it."""
        found = super().kept(view, units, state)
        if found is None:
            return None
        coming = following(view.step)
        chunk = max(len(coming.frames), view.geometry.chunk)
        time = self.turned(view, coming.query_times[0], self.history(view) + chunk)
        return replace(found, time=time)

    def turned(self, view: CacheView, start: float, back: float) -> Tensor:
        """Times ``[1 or H, N]``: the sink begins so many frames before a chunk's start."""
        frame = view.frame_id
        moved = max(start - back, 0.0) + frame.to(view.time)
        return torch.where(frame < self.sunk(view), moved, view.time)
