"""What is read stands side by side, right before the current chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.host import upload
from lightning_kv.cache.plan import masks
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import PositionsPart


@dataclass(frozen=True)
class ContiguousRead(PositionsPart):
    """The frames that are read stand side by side, right before the current chunk.

    The positions of Relax Forcing (arXiv 2603.21366). Where query frames read differently, each
    meets its own row of frames; the scores that choose them see all held frames side by side.
    """

    name: ClassVar[str] = "contiguous-read"
    depends: ClassVar[bool] = True

    def lags(self, view: CacheView, state: Any, selection: Selection | None = None) -> Tensor:
        """The frame's rank among those that are read, counted from the newest."""
        read = view.present.unsqueeze(1)
        if selection is not None and (held := masks(selection, view)[0]) is not None:
            read = view.by_frame(held.float(), "max") > 0
        rank = view.at_rows(read.flip(2).cumsum(2).flip(2)).float()
        if rank.shape[1] == 1:
            return rank
        times = view.step.query_times
        later = upload([time - times[0] for time in times], rank, rank.dtype)
        return rank + later.unsqueeze(1)
