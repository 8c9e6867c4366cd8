"""What the query frames of a chunk read under Pyramid Forcing, and at which times.

Shapes: H heads, Q query frames, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.host import upload
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.base import PositionsPart, SelectPart
from lightning_kv.policies.checks import between
from lightning_kv.policies.retain.pyramid.kinds import PyramidHeads


@dataclass(frozen=True)
class PyramidReads(PyramidHeads, SelectPart):
    """Wave heads read the frames in phase with a query frame; others all of their middle frames.

    Pyramid Forcing (arXiv 2605.13111). Every query frame reads the sink, the newest frames and the
    chunk, and of the middle frames and blocks those that end before its own ``recent`` frames;
    wave heads only those that are a multiple of ``period`` back.

    Ours: where the release reads frames twice, or shares the phase of a chunk's first frame, each
    frame reads its own phase, and each row once.
    """

    name: ClassVar[str] = "pyramid-reads"
    limited: ClassVar[bool] = False
    waits: ClassVar[bool] = True

    def pick(self, view: PassView, state: Any) -> Selection:
        """Rows that each query frame reads."""
        ids, merged = view.frame_id.unsqueeze(1), self.merged(view).unsqueeze(1)
        query = upload(view.step.frames, view._like, torch.int64).view(1, -1, 1)
        sinks, far = self.sinks(view).unsqueeze(1), query - self.recent
        ways = {
            "wave": ((query - ids) % self.period == 0) & (ids <= far),
            "anchor": (ids % self.stride == 0) & (ids <= far),
            "veil": merged & ((ids // self.block + 1) * self.block - 1 <= far),
        }
        rows = [self.of(view, kind).unsqueeze(1) & own for kind, own in ways.items()]
        near = self.near(view, view.step.start).unsqueeze(1)
        read = torch.stack(rows).any(0) | ((ids < sinks) & ~merged) | near
        return Selection(rows=read & view.valid.unsqueeze(1))


@dataclass(frozen=True)
class PyramidTimes(PyramidHeads, PositionsPart):
    """Sink and middle frames appear at one time, in reach; the newest frames at their own.

    Pyramid Forcing (arXiv 2605.13111): at the start of the video, or ``lag`` frames before the
    query frame where that is later. Blocks of veil heads appear at their middle frame, no further
    back than ``lag`` (ours: the release does not clamp them).

    Args:
        lag: Largest distance to the query frame; the model's training horizon where None (21 in the
            paper).
    """

    name: ClassVar[str] = "pyramid-times"
    lag: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag is not None:
            between(self, 1, None, "lag")

    def lags(self, view: CacheView, state: Any, selection: Selection | None = None) -> Tensor:
        """Against each query frame."""
        most = self.lag or view.geometry.train_horizon
        query = upload(view.step.query_times, view._like, torch.float32).view(1, -1, 1)
        own = query - view.time.unsqueeze(1)
        moved = torch.where(self.merged(view).unsqueeze(1), own, query).clamp_max(most)
        near = self.near(view, view.step.start).unsqueeze(1)
        return torch.where(near, own, moved)
