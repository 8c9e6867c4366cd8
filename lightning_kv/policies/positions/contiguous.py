"""Held frames stand side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

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
