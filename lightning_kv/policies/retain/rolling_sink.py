"""The first frames play back and forth behind the newest chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lightning_kv.cache.decisions import Retention, Sums
from lightning_kv.cache.host import upload
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.archived import ArchivingPart, played
from lightning_kv.policies.base import newest
from lightning_kv.policies.checks import between
from lightning_kv.policies.part import Preset


@dataclass(frozen=True)
class RollingSink(ArchivingPart):
    """The first frames play back and forth behind the newest chunk, at the times of what was there.

    Rolling Sink (arXiv 2602.07775). The first frames of the video, as many as the budget has, go to
    an archive too. From the time on when memory would be past them, only the newest chunk is what
    it was; once the next is committed, its keys and values become those of archived frames, at
    its own times: forwards through the archive, then backwards with single frames in reverse, and
    so on. Older rows leave by age, as in any rolling cache.

    Ours: the place in the archive follows each frame's time, so that any length of chunk works; for
    the release's (archive a multiple of the chunk) it is the same. Archived are the frames that are
    ever used, not the chunk after them. The archive lies beside the budget: memory is twice it.

    Args:
        sink: First frames of the video that also stay where they are; they count in the budget.
    """

    name: ClassVar[str] = "rolling-sink"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "rolling-sink",
            "Keep the newest chunk; before it the first frames play back and forth, from an archive"
            " as large as memory (which is saved beyond 36 frames at 18f).",
            "Rolling Sink, arXiv 2602.07775",
            ("memory", "reads"),
            {"retain": {"part": "rolling-sink", "budget": "18f"}},
            "18f, and as much in the archive: a window of 21 with chunks of 3",
        ),
    )
    sink: int = 0

    def __post_init__(self) -> None:
        between(self, 0, None, "sink")

    def smallest(self, chunk: int) -> int:
        """The sink and the newest chunk."""
        return self.sink + chunk

    def held(self, window: int, chunk: int) -> int:
        """The archive is as large as the window."""
        return 2 * window

    def commit(self, views: list[CacheView], state: Any) -> list[Retention | None]:
        """Archive what is early, replace what is no longer new, drop what is old."""
        if self.budget is None:
            return [None] * len(views)
        period = self.window(views[0], state)
        return [self.rolled(view, period) for view in views]

    def rolled(self, view: CacheView, period: int) -> Retention:
        """The decision for one layer."""
        ids, first = view.frame_id, newest(view)
        oldest = view.step.final[-1] + 1 - (period - self.sink)
        over = [frame for frame in view.frames if period <= frame < first]
        stays = ((view.time >= oldest) | (view.time < self.sink)) & ~view.rows_from(over)
        early = (ids >= first) & (ids < period)
        played_over = [frame for frame in over if frame >= oldest]
        return Retention(sums=self.copies(view, played_over, period), archive=early, keep=stays)

    def copies(self, view: CacheView, times: list[int], period: int) -> Sums | None:
        """Archived frames at the times of others."""
        if not times:
            return None
        tokens, aside = view.geometry.tokens, view.archive
        order = (aside.frame_id.long() * tokens + aside.raster).argsort(-1)  # by frame and place
        frames = upload([played(time, period) for time in times], order, torch.int64)
        frames = frames.repeat_interleave(tokens).unsqueeze(0)
        place = torch.arange(tokens, device=view.device).repeat(len(times)).unsqueeze(0)
        source = len(view) + order.gather(1, frames * tokens + place)
        target = torch.arange(source.shape[1], device=view.device).unsqueeze(0)
        at = upload(times, order, torch.float32).repeat_interleave(tokens).unsqueeze(0)
        spots = view.geometry.places(view.device).float().repeat(len(times), 1).unsqueeze(0)
        return Sums(source, target, torch.ones_like(at), frames, at, spots)
