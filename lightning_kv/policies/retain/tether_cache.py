"""Keep first, chosen and newest frames, and draw what is chosen towards what is trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lightning_kv.cache.decisions import Match, Retention
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.budgets import least_with, part_of
from lightning_kv.policies.checks import between, portion
from lightning_kv.policies.part import Preset
from lightning_kv.policies.statistics import apart, mean_logits


@dataclass(frozen=True)
class TetherCache(RetainPart):
    """Keep first, chosen and newest frames, and draw what is chosen towards what is trusted.

    TetherCache (arXiv 2606.13035). Once sink, memory and recent are full, the oldest recent frames,
    a chunk of them, are set aside while the next is denoised. Its commit pass, before attention,
    lets them compete with the memory by the mean logit of its queries (before rotation, a softmax
    over candidate frames) and, weighted, by how far a frame lies from those with much of it. A
    newcomer is drawn to the mean and deviation of sink and memory, per head and channel.

    Ours: samples score for themselves; the budget is what is held between two chunks, frames aside
    included; recent is a chunk at least; a cache that chunks do not fill exactly gives up what the
    next one exceeds; with several chunks in flight, frames of one are aside; without a commit pass
    the last pass decides.

    Args:
        sink: First frames that always stay; below 1 a share of the budget.
        recent: Newest frames, the chunk just made included.
        diversity: Weight of the distance in time to what is looked at; 0 for mass alone.
        tether: How far newcomers are drawn, from 0 to 1.
        temperature: Of the softmax over candidates.
    """

    name: ClassVar[str] = "tether-cache"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "tether-cache",
            "Keep first and newest frames, and others that are looked at and far apart, drawn "
            "towards the statistics of what is trusted.",
            "TetherCache, arXiv 2606.13035",
            ("memory", "reads"),
            {
                "retain": {"part": "tether-cache", "budget": "21f"},
                "select": "quarantine",
                "positions": {"part": "contiguous", "of": "read"},
            },
            "21f: 3 first frames, 14 chosen, 4 newest, 3 of which no noisy pass reads",
        ),
    )
    moments: ClassVar[tuple[str, ...]] = ("commit", "closing")
    columns: ClassVar[dict[str, str]] = {"aside": "max"}
    sink: float = 0.15
    recent: int = 4
    diversity: float = 0.35
    tether: float = 0.35
    temperature: float = 1.0

    def __post_init__(self) -> None:
        portion(self, "sink")
        between(self, 0, None, "diversity")
        between(self, 1, None, "recent")
        between(self, 0, 1, "tether")
        between(self, 1e-6, None, "temperature")

    def check(self, *_: Any) -> None:
        """All heads have the same budget."""
        self.evenly()

    def smallest(self, chunk: int) -> int:
        """The sink and what is recent, and no memory."""
        return least_with(self.sink, max(self.recent, chunk))

    def regions(self, view: CacheView, coming: int) -> tuple[int, int, int] | None:
        """Frames that are held, of the sink, and recent ones; None while all fit."""
        chunk = view.geometry.chunk or view.query_frames
        if self.budget is None or not coming:
            return None
        held = max(int(self.budget.frames(view) + 1e-6), self.smallest(chunk))
        if len(view.frames) + coming <= held:
            return None
        return held, part_of(self.sink, held), max(self.recent, chunk)

    def commit(self, views: list[CacheView], state: Any) -> list[Retention | None] | None:
        """Set aside what the next chunk will push out, until its commit pass."""
        coming = views[0].step.next_chunk
        if (regions := self.regions(views[0], coming)) is None:
            return None
        aside = views[0].frames[-regions[2] :][:coming]
        return [Retention(write={"aside": v.rows_from(aside).float()}) for v in views]

    def closing(self, view: PassView, state: Any) -> Retention | None:
        """Which candidates are the memory from here on."""
        coming, frames = len(view.step.final), view.frames
        if (regions := self.regions(view, coming)) is None:
            return None
        held, sink, recent = regions
        last = len(frames) - max(recent - coming, 0)  # where candidates end
        first, before = min(sink, last), max(min(sink, last), len(frames) - recent)
        room = max(0, held - first - recent)
        chosen = torch.ones(1, len(frames), dtype=torch.bool, device=view.device)
        if last - first > room:
            mass = (mean_logits(view)[first:last] / self.temperature).softmax(0)
            score = mass + self.diversity * apart(mass, frames[first:last])
            chosen[:, first:last] = False
            best = score.argsort(descending=True, stable=True)[:room]
            chosen[0, first + best] = True
        trusted = view.rows_from(frames[:before])
        match = [Match(view.rows_from((f,)), trusted, self.tether) for f in frames[before:last]]
        aside = torch.zeros(1, len(view), device=view.device)
        return Retention({"aside": aside}, tuple(match), keep=view.rows_of(chosen))
