"""A deep sink, the newest frames, and of all between what the last queries look at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Retention
from lightning_kv.cache.host import upload
from lightning_kv.cache.rotary import wide
from lightning_kv.cache.table import BLOCK
from lightning_kv.cache.view import PassView
from lightning_kv.policies.checks import between, choice
from lightning_kv.policies.part import Preset
from lightning_kv.policies.retain.deep_sink import DeepSink
from lightning_kv.policies.scored import top_units
from lightning_kv.policies.statistics import last_queries, update_last_queries


@dataclass(frozen=True)
class DeepForcing(DeepSink):
    """A deep sink, the newest frames, and of all between the rows the last queries look at.

    Deep Forcing (arXiv 2512.05081). Only when memory exceeds the budget, in the first pass of a
    chunk: rows between sink and newest frames are ranked, once for all heads of a layer, by their
    mean logit with the queries of the last ``recent`` frames that were asked, in whatever pass. The
    best stay, at their own times; a row can win ``reuse`` times. Only at such an event the sink is
    turned to where it starts ``capacity`` and a chunk before this chunk.

    Ours: the sink is a share of the budget (10 of 18 is the authors' 10 of a window of 21). Each
    sample decides for itself (the release pads a batch with zero keys that are attended). A shorter
    last chunk counts as a full one. With more frames in flight than ``recent``, the last of them
    rank, and beside the sink no held frame is protected.

    Args:
        recent: Newest frames that stay, the chunk included; and frames of queries that rank.
        capacity: History frames left by an event; the next one comes when memory is full again.
            The whole budget, with an event at every chunk, where None or where it leaves no room
            for a chunk.
        reuse: How often a row can win; 0 for no limit.
        fusion: Logits of the last queries: their ``sum``, or ``max``, which meets each query alone.
    """

    name: ClassVar[str] = "deep-forcing"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "deep-forcing",
            "Keep the first frames, moved up, the newest, and rows between that are looked at.",
            "Deep Forcing, arXiv 2512.05081",
            ("memory", "reads"),
            {"retain": {"part": "deep-forcing", "capacity": 13, "budget": "18f"}},
            "18f, capacity 13: a window of 21, compressed to 16; up to 13f at every chunk",
        ),
    )
    columns: ClassVar[dict[str, str]] = {"reused": "max"}
    moments: ClassVar[tuple[str, ...]] = ("open",)
    observes: ClassVar[tuple[str, ...]] = ("prefill", "denoise", "commit")
    sink: float = 0.55
    recent: int = 4
    capacity: int | None = None
    reuse: int = 7
    fusion: str = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, fusion=("sum", "max"))
        between(self, 1, None, "recent", *(["capacity"] if self.capacity is not None else []))
        between(self, 0, None, "reuse")

    def smallest(self, chunk: int) -> int:
        """The sink and the held ones of the newest frames."""
        old = max(self.recent - chunk, 0)
        if isinstance(self.sink, int):
            return max(self.sink + old, 1)
        return max(math.ceil((old + 0.5) / (1 - self.sink)), 1)

    def observe(self, view: PassView, state: Any) -> None:
        """Remember the queries of the last frames."""
        update_last_queries(view, state, *self.asked(view))

    def asked(self, view: PassView) -> tuple[int, Tensor]:
        """How many rows stand for the last frames; those of this pass, ``[H, R, D]``."""
        own = wide(view.query)
        if self.fusion == "sum":
            return self.recent, own.unflatten(1, (view.query_frames, -1)).sum(2)
        return self.recent * view.geometry.tokens, own

    def open(self, view: PassView, state: Any) -> Retention | None:
        """The event, where memory exceeds the budget."""
        if self.fits(view):
            return None
        step, tokens, history = view.step, view.geometry.tokens, self.history(view)
        flight = max(view.query_frames, view.geometry.chunk)
        old = max(self.recent - flight, 0)
        safe = (view.frame_id < self.sunk(view)) | (view.frame_id >= step.start - old)
        reused, size = view.field("reused"), view.valid.long()
        if self.reuse:
            size = size * (safe | (reused < self.reuse))
        left = self.capacity or history
        left = max(left if left + flight <= history else history, self.sunk(view) + old)
        lengths = upload([left * tokens], view.frame_id, torch.int64).unsqueeze(1)
        scores = self.logits(view, state), lengths
        kept = top_units(*scores, safe.unsqueeze(1), size.unsqueeze(1))[:, 0]
        time = self.turned(view, step.query_times[0], left + flight)
        return Retention(write={"reused": reused + (kept & ~safe)}, time=time, keep=kept)

    def logits(self, view: PassView, state: Any) -> Tensor:
        """Of every row with the last queries, ``[1, 1, N]``; one ranking for all heads."""
        query = last_queries(view, state, *self.asked(view))
        keys = wide(view.keys("read"))
        query, keys = (x.transpose(0, 1).flatten(1) for x in (query, keys))  # [rows, H D]
        query = query.sum(0, keepdim=True) if self.fusion == "sum" else query
        view.scored += sum(view.lengths) * len(query)
        blocks = query.split(max(1, BLOCK // len(keys)))
        score = torch.stack([(keys @ q.T).amax(1) for q in blocks]).amax(0)
        return (score / (view.heads * view.geometry.head_dim**0.5)).view(1, 1, -1)
