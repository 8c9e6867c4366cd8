"""Each head keeps what its kind looks at; memory heads keep frames that differ most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lightning_kv.cache.decisions import Retention
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.budgets import least_with, part_of
from lightning_kv.policies.checks import between, portion
from lightning_kv.policies.episodes import Entries, Pools
from lightning_kv.policies.labels import heads_of, labelled
from lightning_kv.policies.part import Preset
from lightning_kv.policies.tables import AUTO, HeadTable


@dataclass(frozen=True)
class HeadForcing(RetainPart):
    """Newest frames for local heads, first for anchor heads, and episodes for memory heads.

    Head Forcing (arXiv 2605.14487), rebuilt from its description. Local heads keep the newest
    frames; anchor heads the first ones and the newest; memory heads the first, the newest, and a
    pool of frames between. A frame that is among the newest no longer enters the pool. When the
    pool is full, the frame that is most like the others leaves, and moves a summary frame towards
    itself, which is one frame of the pool.

    Ours, since no code is public: how like others a frame is, is the mean cosine of its mean key
    (before rotation) with those of the pool, plus the mean cosine of its tokens with those at the
    same places of its neighbour in time (the earlier of two as near). The summary is compared with
    nothing, and keeps the id of the first frame that left, which it was at first. Frames enter one
    at a time, so chunks of any length do the same. Nothing is dropped while all fits. First and
    newest frames are shares of the budget, so that they shrink with it.

    Args:
        first: First frames of the video that anchor and memory heads keep: a number of frames, or a
            share of the budget.
        last: Newest frames that local and memory heads keep, alike.
        anchor_last: Newest frames that anchor heads keep.
        rate: Weight of a frame that leaves the pool in the summary.
        labels: ``local`` (0), ``anchor`` (1) or ``memory`` (2) for each head; ``auto``: those of
            the model.
    """

    name: ClassVar[str] = "head-forcing"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "head-forcing",
            "Keep the newest frames, the first ones, or those least alike and a mean of others, "
            "by the kind of head.",
            "Head Forcing, arXiv 2605.14487",
            ("memory", "reads"),
            {"retain": {"part": "head-forcing", "budget": "13f"}, "positions": "contiguous"},
            "13f for memory heads: 3 first frames, a pool of 6, 4 newest",
        ),
    )
    first: float = 0.23
    last: float = 0.31
    anchor_last: int = 1
    rate: float = 0.1
    labels: HeadTable = AUTO

    def __post_init__(self) -> None:
        portion(self, "first", "last")
        between(self, 0.01, None, "last")
        between(self, 1, None, "anchor_last")
        between(self, 0, 1, "rate")
        object.__setattr__(self, "labels", labelled(self, ("local", "anchor", "memory")))
        if max(self.first, self.last) < 1 <= self.first + self.last:
            raise ValueError(
                f"first={self.first} and last={self.last} of the retain part {self.name!r} leave "
                "nothing of the budget to a pool. Give shares of less than 1 together."
            )

    def smallest(self, chunk: int) -> int:
        """First and newest frames; then there is no pool."""
        most = least_with(self.first, self.anchor_last)
        while part_of(self.first, most) + part_of(self.last, most) > most:
            most += 1
        return most

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """The labels are those of the model, and all memory heads have a pool of one size."""
        self.labels.check_heads(geometry, "head labels", self.name)
        self.evenly()

    def commit(self, views: list[CacheView], state: Any) -> list[Retention | None]:
        """Nothing while all fits; then each head keeps its own."""
        view, made = views[0], views[0].step.final[-1] + 1
        rows = self.rows(view)[0] if self.budget else made * view.geometry.tokens
        room = max(rows // view.geometry.tokens, self.smallest(0))
        if made <= room:
            return [None] * len(views)
        sink, last = state.setdefault("first", part_of(self.first, room)), part_of(self.last, room)
        state["pool"] = state.get("pool", Entries(sink)).until(made - last, room - sink - last)
        return [self.keeping(own, sink, made - last, state["pool"]) for own in views]

    def keeping(self, view: CacheView, sink: int, near: int, pool: Entries) -> Retention:
        """The decision for one layer; ``near`` is the first of the newest frames."""
        ids, made = view.frame_ids.unsqueeze(0), view.step.final[-1] + 1
        anchor = (ids < sink) | (ids >= made - self.anchor_last)
        keep = torch.where(heads_of(view, self.labels, "anchor"), anchor, ids >= near)
        words = self.labels.rows_for(view.geometry)[view.layer]
        heads = [head for head, word in enumerate(words) if word == "memory"]
        if not heads:
            return Retention(keep=view.rows_of(keep))
        pools = Pools.of(view, heads)
        sums, stay = pools.updated(view, sink, pool, self.rate)
        own = torch.zeros_like(keep[:1]).repeat(len(heads), 1).scatter(1, pools.index, stay)
        keep = keep.index_copy(0, pools.heads, own)
        return Retention(sums=sums, keep=view.rows_of(keep))
