"""Segments that changed for heads that follow motion; the sink and the last frame for others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Event, Rebuild, Retention
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.checks import between
from lightning_kv.policies.labels import heads_of, labelled
from lightning_kv.policies.part import Preset
from lightning_kv.policies.segments import compare, fitting
from lightning_kv.policies.tables import AUTO, HeadTable


@dataclass(frozen=True)
class ForcingKV(RetainPart):
    """Keep the segments that changed most for dynamic heads; sink and last frame for static ones.

    Forcing-KV (arXiv 2605.09681). When a chunk is committed, the keys of each token in two
    neighbouring frames are compared (cosine, all dynamic heads of the first layer that is split
    together). Dynamic heads of all layers that are split keep the segments (sixths of a frame in
    raster order) with the least mean, beside the sink and the last frame, which is all that the
    other heads keep, and every head until the chunk after ``start`` is committed.

    Ours: the pool of segments is what the budget leaves, and nothing is dropped while all fits: at
    the paper's 3 frames the second chunk reads all of the first. Compared are the whole frames kept
    before and the chunk (at chunks of 3 the paper's); a larger pool is filled up with older
    segments, newest chunk first. A frame's last segment takes the remainder of its tokens. Each
    sample decides. At a prompt switch as many frames as the pool has are encoded again, and the
    sink and the last of these stay.

    Args:
        sink: First frames of the video that stay.
        static_last: Newest frames that static heads keep.
        dynamic_last: Newest frames that dynamic heads keep whole.
        segments: Segments of a frame.
        start: Index of the last chunk at whose commit no segments are kept (the paper's
            ``ar_start``: 1 for Self Forcing, 2 for LongLive).
        unsplit: First layers in which no head keeps segments.
        labels: ``static`` (0) or ``dynamic`` (1) for each head; ``auto``: those of the model.
    """

    name: ClassVar[str] = "forcing-kv"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "forcing-kv",
            "Keep the first and the last frame, and for dynamic heads segments that changed most.",
            "Forcing-KV, arXiv 2605.09681",
            ("memory", "reads"),
            {"retain": {"part": "forcing-kv", "budget": "3f"}},
            "3f: sink 1, segments of 1 frame, last 1",
        ),
    )
    unit: ClassVar[str] = "token"
    comparable: ClassVar[bool] = False
    sink: int = 1
    static_last: int = 1
    dynamic_last: int = 1
    segments: int = 6
    start: int = 1
    unsplit: int = 1
    labels: HeadTable = AUTO

    def __post_init__(self) -> None:
        between(self, 0, None, "sink", "start", "unsplit")
        between(self, 1, None, "static_last", "dynamic_last", "segments")
        object.__setattr__(self, "labels", labelled(self, ("static", "dynamic")))

    def smallest(self, chunk: int) -> int:
        """Sink and last frames; then there is no pool."""
        return self.sink + max(self.static_last, self.dynamic_last)

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """The labels are those of the model."""
        self.labels.check_heads(geometry, "head labels", self.name)

    def commit(self, views: list[CacheView], state: Any) -> list[Retention | None]:
        """Nothing while all fits; then each head keeps its own."""
        step, tokens = views[0].step, views[0].geometry.tokens
        whole = [*state.get("whole", ()), *(f for f in step.final if f >= self.sink)]
        state["whole"], rooms = whole, [self.rows(view) if self.budget else None for view in views]
        if (step.final[-1] + 1) * tokens <= min((min(own) for own in rooms if own), default=2**62):
            return [None] * len(views)
        known, split = state.setdefault("known", {}), step.chunk > self.start
        count = self.dynamic_last if split else max(self.static_last, self.dynamic_last)
        state["whole"], labels = whole[-count:], self.labels.rows_for(views[0].geometry)
        able = [v for v in views if v.layer >= self.unsplit and "dynamic" in labels[v.layer]]
        if split and able:
            heads = heads_of(able[0], self.labels, "dynamic")
            compare(able, whole[: -self.dynamic_last], heads, self.segments, known)
        pairs, known = zip(views, rooms, strict=True), known if split else None
        return [Retention(keep=self.kept_rows(v, room, whole, known)) for v, room in pairs]

    def kept_rows(self, view: CacheView, room: Any, whole: list[int], known: Any) -> Tensor:
        """What stays of one layer, bool ``[1 or H, N]``."""
        sink = view.rows_of((view.frame_ids < self.sink).unsqueeze(0))
        last = {n: sink | view.rows_from(whole[-n:]) for n in (self.static_last, self.dynamic_last)}
        if known is None or view.layer < self.unsplit:
            return last[max(last)]
        own = last[self.dynamic_last]
        own = own | fitting(view, known, room, own.sum(1, keepdim=True), self.segments)
        return torch.where(heads_of(view, self.labels, "dynamic"), own, last[self.static_last])

    def event(self, event: Event, views: list[CacheView], state: Any) -> Rebuild | None:
        """At a prompt switch, encode the last frames again; the pool is empty then."""
        if event.kind != "prompt_switch" or not state.get("whole"):
            return None
        view, count = views[0], max(self.static_last, self.dynamic_last)
        room = min(self.rows(view) or (0,)) // view.geometry.tokens if self.budget else 0
        more = max(count, room - self.sink - self.dynamic_last, self.sink)
        again = tuple(range(max(self.sink, view.step.start - more), view.step.start))
        state |= {"whole": [*again[-count:]], "known": {}}
        return Rebuild(again, hold=again[-count:], spare=tuple(range(self.sink)))
