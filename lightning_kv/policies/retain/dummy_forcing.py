"""Keep the first frame or the newest chunk, by what a head looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Event, Rebuild, Retention
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.checks import between, choice
from lightning_kv.policies.part import Preset
from lightning_kv.policies.statistics import spread_rows

FIRST, DUMMY, MID = range(3)


@dataclass(frozen=True)
class DummyForcing(RetainPart):
    """Three kinds of heads, told apart once: first, dummy and mid heads keep a frame or a chunk.

    Dummy Forcing (arXiv 2601.20499). Until chunk ``ar_start`` is committed, all heads keep the
    first frame and the newest chunk. Then the softmax mass of its queries on the first frame and on
    the rest of what is held, each as a share of that of all heads and layers, tells heads apart:
    those whose larger share is smallest are dummy; others are mid, or first if that is where their
    larger share lies. From then on first heads keep the first frame, dummy heads the last frame of
    the newest chunk, and mid heads the newest chunk.

    Ours: each sample tells its heads apart; sampled queries are evenly spaced; ties go to the lower
    layer and head; a prompt switch empties the memory and encodes the last frames again, the oldest
    of which is then the first. In chunks of one frame with ``ar_start`` 1 no head is mid.

    Args:
        dummy: Share of all heads that are dummy, rounded to heads (half of one: up).
        ar_start: Index of the chunk in whose commit pass the heads are told apart, from 1.
        first_tokens: What counts as first: ``frame``, the first frame; or ``paper``, the released
            rule, which for ``ar_start`` above 1 takes as many of the first frames held as a chunk
            has.
        queries: Query rows sampled of each layer (the paper's: 520; with ``ar_start`` 2, 1560).
        window: Frames encoded again at a prompt switch.
    """

    name: ClassVar[str] = "dummy-forcing"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "dummy-forcing",
            "Keep by the kind of head the first frame, the newest chunk or its last; drop others.",
            "Dummy Forcing, arXiv 2601.20499",
            ("memory", "reads"),
            {"retain": "dummy-forcing"},
            "half of the heads dummy, told apart in chunk 1 by 520 queries; 1f or a chunk is kept",
        ),
    )
    limited: ClassVar[bool] = False
    moments: ClassVar[tuple[str, ...]] = ("commit", "open")
    observes: ClassVar[tuple[str, ...]] = ("prefill", "commit")
    dummy: float = 0.5
    ar_start: int = 1
    first_tokens: str = "frame"
    queries: int = 520
    window: int = 12

    def __post_init__(self) -> None:
        choice(self, first_tokens=("frame", "paper"))
        between(self, 0, 1, "dummy")
        between(self, 1, None, "ar_start", "queries", "window")

    def observe(self, view: PassView, state: Any) -> None:
        """Mass on the first and the other held frames, in the pass that tells heads apart."""
        if view.step.chunk != self.ar_start:
            return
        rows = spread_rows(len(view.step.final) * view.geometry.tokens, self.queries, view.device)
        mass = view.by_frame(view.attention(queries=view.final.start + rows)[0])[:, 0]
        first = len(view.step.final) if self.first_tokens == "paper" and self.ar_start > 1 else 1
        regions = mass[:, :first].sum(1), mass[:, first:].sum(1)
        state.setdefault("mass", {})[view.layer] = torch.stack(regions)  # [2, H]

    def commit(self, views: list[CacheView], state: Any) -> list[Retention | None]:
        """Tell the heads apart when it is time; then each keeps its own."""
        state["newest"] = views[0].step.final[0]
        if "mass" in state:
            mass = state.pop("mass")
            state["groups"] = self.groups(torch.stack([mass[v.layer] for v in views], dim=1))
        return [self.split(view, state) for view in views]

    def groups(self, mass: Tensor) -> Tensor:
        """Which kind each head is, int64 ``[L, H]``, by its mass on both regions ``[2, L, H]``."""
        total = mass.sum((1, 2), keepdim=True)
        first, mid = mass / total.clamp_min(torch.finfo(mass.dtype).tiny)
        count = math.floor(self.dummy * first.numel() + 0.5)
        order = torch.maximum(first, mid).flatten().argsort(stable=True)
        kinds = torch.where(first < mid, MID, FIRST)
        return kinds.flatten().scatter(0, order[:count], DUMMY).view_as(kinds)

    def split(self, view: CacheView, state: Any) -> Retention:
        """The first frame and the newest chunk, or which of them the kind of head keeps."""
        ids = view.frame_ids
        first, chunk = ids == ids[:1], ids >= state["newest"]
        kept = (first | chunk).unsqueeze(0)
        if "groups" in state:
            kept = torch.stack([first, ids == ids[-1:], chunk])[state["groups"][view.layer]]
        return Retention(keep=view.rows_of(kept))

    def event(self, event: Event, views: list[CacheView], state: Any) -> Rebuild | None:
        """At a prompt switch, start again from the last frames, under the new prompt."""
        if event.kind != "prompt_switch" or "newest" not in state:
            return None
        made, state["again"] = views[0].step.start, {view.layer for view in views}
        return Rebuild(tuple(range(max(0, made - self.window), made)))

    def open(self, view: PassView, state: Any) -> Retention | None:
        """Divide what has been encoded again among the heads before it is read."""
        if view.layer not in state.get("again", ()):
            return None
        state["again"].discard(view.layer)
        return self.split(view, state)
