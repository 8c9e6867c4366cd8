"""A sink, two running means of what was dropped, and the newest frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Retention, Sums
from lightning_kv.cache.host import upload
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.rotary import wide
from lightning_kv.cache.table import summed
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.budgets import least_with, part_of
from lightning_kv.policies.checks import between, choice, portion
from lightning_kv.policies.layout import Layout
from lightning_kv.policies.part import Preset


@dataclass(frozen=True)
class MemRoPE(RetainPart):
    """Keep a sink, two running means of the frames that were dropped, and the newest frames.

    MemRoPE (arXiv 2603.12513). Frames that leave the window are averaged (keys before rotation, and
    values), and two memories, each a frame behind the sink, move towards the average. When frames
    first leave, both become it, and the two frames in whose places they stand are lost.

    Ours: the average is taken at each place (the release's default: ``mean: frame``), and at the
    commit, with the same rows. The memories carry the ids of the two lost frames. The sink is a
    share of the budget, as large as at the first fold.

    Args:
        sink: First frames of the video that stay: a number of frames, or a share of the budget.
        long: Weight of new frames in the long memory.
        short: The same in the short memory.
        adaptive: ``short`` times 0.1 where keys do not change, to 5 where they change most.
        mean: Of the dropped rows at the same ``place``, or of all of the ``frame`` (slow).
    """

    name: ClassVar[str] = "mem-rope"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "mem-rope",
            "Keep the first and the newest frames, merge all others into two running means.",
            "MemRoPE, arXiv 2603.12513",
            ("memory", "reads"),
            {"retain": {"part": "mem-rope", "budget": "9f"}, "positions": "contiguous"},
            "9f: 3 first frames, 2 means, 4 newest",
        ),
    )
    sink: float = 0.333
    long: float = 0.01
    short: float = 0.1
    adaptive: bool = False
    mean: str = "place"

    def __post_init__(self) -> None:
        choice(self, mean=("place", "frame"))
        portion(self, "sink")
        between(self, 0, 1, "long", "short")

    def smallest(self, chunk: int) -> int:
        """The sink, both means and one frame."""
        return least_with(self.sink, 3)

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """All heads drop the same frames."""
        self.evenly()

    def commit(self, views: list[CacheView], state: Any) -> list[Retention | None]:
        """Fold the oldest frames behind the sink into both memories."""
        return [None if self.fits(view) else self.folding(view, state) for view in views]

    def folding(self, view: CacheView, state: Any) -> Retention | None:
        """The decision for one layer."""
        room = max(self.rows(view)[0] // view.geometry.tokens, self.smallest(view.geometry.chunk))
        sink = state.get("sink", part_of(self.sink, room))
        memories, behind = view.frames[sink : sink + 2], view.frames[sink + 2 :]
        if not (gone := behind[: max(len(view.frames) - room, 0)]):  # a share of little
            return None
        first, state["sink"], state[view.layer] = view.layer not in state, sink, True
        kept = ~view.rows_from((*memories, *gone))
        return Retention(sums=self.folded(view, memories, gone, first), keep=kept)

    def folded(self, view: CacheView, memories: tuple, gone: tuple, first: bool) -> Sums:
        """Both memories as sums of what they were and of the frames that leave."""
        tokens, layout = view.geometry.tokens, Layout.of(view).row  # [1, F, T]
        row = {frame: layout[:, i] for i, frame in enumerate(view.frames)}
        place = torch.arange(tokens, device=view.device).unsqueeze(0)
        leaving = torch.cat([row[frame] for frame in gone], 1)
        if self.mean == "frame":  # every row that leaves goes into every place
            leaving = leaving.repeat_interleave(tokens, 1)
        into = place.repeat(1, count := leaving.shape[1] // tokens)
        source, target, coefficient = [], [], []
        rates = self.rates(view, row[memories[1]], leaving, into)
        for i, rate in enumerate([torch.ones_like(rates[0])] * 2 if first else rates):
            source += [leaving, row[memories[i]]]
            target += [into + i * tokens, place + i * tokens]
            coefficient += [(rate / count).gather(1, into), 1 - rate]
        ids = upload(memories, place, torch.int64).repeat_interleave(tokens).unsqueeze(0)
        spots = view.geometry.places(view.device).float().repeat(2, 1).unsqueeze(0)
        pairs = (torch.cat(x, 1) for x in (source, target, coefficient))
        return Sums(*pairs, ids, ids.float(), spots, weight=torch.ones_like(ids).float())

    def rates(self, view: CacheView, old: Tensor, leaving: Tensor, into: Tensor) -> list[Tensor]:
        """How far each place of the long and the short memory moves, ``[1, T]`` each."""
        blank = torch.ones(1, view.geometry.tokens, device=view.device)
        if not self.adaptive:
            return [blank * self.long, blank * self.short]
        keys = wide(view.keys("raw"))
        view.scored += (leaving.shape[1] + old.shape[1]) * view.heads
        moved = summed(keys[:, leaving[0]], into, view.geometry.tokens)
        moved = moved / (into.shape[1] // view.geometry.tokens) - keys[:, old[0]]
        motion = moved.norm(dim=-1).mean(0, keepdim=True)
        motion = motion / motion.amax().clamp_min(torch.finfo(motion.dtype).tiny)
        return [blank * self.long, (self.short * (0.1 + 4.9 * motion)).clamp_max(1.0).to(blank)]
