"""Read a few frames in three roles: an anchor, some history, continuity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.host import upload
from lightning_kv.cache.rotary import wide
from lightning_kv.cache.table import summed
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.base import SelectPart
from lightning_kv.policies.checks import between
from lightning_kv.policies.part import Preset
from lightning_kv.policies.statistics import in_order


@dataclass(frozen=True)
class RelaxForcing(SelectPart):
    """Read the first frames, the newest, and history that is like the first, unlike the newest.

    Relax Forcing (arXiv 2603.21366). Candidates are spread over the later half of what lies
    between. The mean key before rotation of each, over tokens and heads of the first layer, is
    compared with those of the first and of the newest frames, for all layers and heads.

    Ours: a larger budget reads more history, of as many more candidates, the newest others where
    the later half has too few. Each sample decides (in the release the first does for all).

    Args:
        sink: First held frames, always read.
        tail: Newest held frames, always read.
        candidates: Frames that are compared for each one of history that is read.
        tail_weight: λ of ``like the first - λ · like the newest``, both as cosines.
    """

    name: ClassVar[str] = "relax-forcing"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "relax-forcing",
            "Keep up to 120 frames; read the first 2, the newest and one between, side by side.",
            "Relax Forcing, arXiv 2603.21366",
            ("reads",),
            {
                "retain": {"part": "reservoir", "sink": 2, "frames": 120},
                "select": {"part": "relax-forcing", "budget": "4f"},
                "positions": {"part": "contiguous", "of": "read"},
            },
            "4f: 2 first frames, 1 of 4 candidates, the newest; 120f held",
        ),
    )
    sink: int = 2
    tail: int = 1
    candidates: int = 4
    tail_weight: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0, None, "sink", "tail", "tail_weight")
        between(self, 1, None, "candidates")

    def check(self, *_: Any) -> None:
        """All heads read the same frames."""
        self.evenly()

    def smallest(self, chunk: int) -> int:
        """The first frames and the newest."""
        return max(1, self.sink + self.tail)

    def pick(self, view: PassView, state: Any) -> Selection | None:
        """What the first layer has decided in this pass."""
        if view.layer == 0 or "read" not in state:
            state["read"] = self._decided(view), view.frames
        if (chosen := state["read"][0]) is None:
            return None
        read = (view.frame_ids.unsqueeze(1) == chosen).any(1).view(1, 1, -1)
        known = view.frames == state["read"][1] and in_order(view)
        return Selection(frames=read, count=len(chosen) if known else None)

    def _decided(self, view: PassView) -> Tensor | None:
        """Ids of the frames to read, int64; everything where None."""
        held, rows = view.frames, self.rows(view) if self.budget is not None else None
        may = max(rows[0] // view.geometry.tokens, self.smallest(0)) if rows else len(held)
        if len(held) <= may:
            return None
        history, end = may - self.sink - self.tail, len(held) - self.tail
        offered = candidates(end - self.sink, self.candidates * history, history)
        index = upload([self.sink + i for i in offered], view.query, torch.int64)
        if len(offered) > history:
            scores = self._scores(view, index, end)
            index = index[scores.argsort(descending=True, stable=True)[:history]]
        ids = view.frame_ids
        return torch.cat([ids[: self.sink], ids[index], ids[end:]])

    def _scores(self, view: CacheView, index: Tensor, end: int) -> Tensor:
        """How like the first frames and unlike the newest some are, ``[n]``."""
        keys, view.scored = wide(view.keys("raw")), view.scored + sum(view.lengths)
        bucket = torch.where(view.valid, view.frame_index, -1)
        total = summed(keys, bucket, len(view.frames)).sum(0)  # a mean is as long as it likes
        first, newest = (total[own].sum(0) for own in (slice(self.sink), slice(end, None)))
        wanted = normalize(first, dim=0) - self.tail_weight * normalize(newest, dim=0)
        return normalize(total[index], dim=1) @ wanted


def candidates(middle: int, most: int, least: int) -> list[int]:
    """Which of the frames between are compared: starts of equal steps through the later half.

    At most ``most``; the newest of the others where that makes fewer than ``least``.
    """
    half, last = middle // 2, middle - 1
    most = min(most, middle - half)
    found = {half + (last - half) * i // most for i in range(most)}
    found -= {last} if most > 1 else set()
    others = [i for i in range(middle) if i not in found]
    return sorted(found.union(others[len(others) - max(0, least - len(found)) :]))
