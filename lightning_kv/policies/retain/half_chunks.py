"""Keep one frame of each old chunk, and what is unlike it of the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Retention
from lightning_kv.cache.rotary import wide
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.checks import between


@dataclass(frozen=True)
class HalfChunks(RetainPart):
    """Keep one frame of each old chunk, and what is unlike it of the others.

    The storage of WorldKV (arXiv 2605.22718). The first frame of a chunk stays whole; of the others
    the tokens stay whose keys, all heads together and as read, are least alike to its mean key. A
    layer chooses for itself; chunks shorter than usual stay whole. Nothing is ever forgotten.

    Ours: chosen when a chunk is old enough to be read in this form only, from the same keys.

    Args:
        ratio: Share of the tokens of each other frame that stay, rounded up.
        sink: First frames of the video; chunks that begin among them stay whole.
        recent: Newest frames that stay whole, those of the next chunk included.
    """

    name: ClassVar[str] = "half-chunks"
    limited: ClassVar[bool] = False
    ratio: float = 0.5
    sink: int = 3
    recent: int = 6

    def __post_init__(self) -> None:
        between(self, 0, 1, "ratio")
        between(self, 0, None, "sink", "recent")

    def commit(self, views: list[CacheView], state: Any) -> list[Retention | None] | None:
        """Halve the chunks that are old now, from the second on."""
        step = views[0].step
        end, size = step.final[-1] + 1, views[0].geometry.chunk or len(step.final)
        chunks = [*state.get("whole", []), (step.final[0], end)]
        old = [c for c in chunks if c[1] <= end - max(self.recent - size, 0)]
        old = [c for c in old if c[0] >= self.sink]
        state["begun"] = state.get("begun", False) or len(old) > 1
        if not state["begun"]:
            state["whole"] = chunks
            return None
        state["whole"] = [c for c in chunks if c not in old]
        old = [c for c in old if c[1] - c[0] == size > 1]
        return [self.halved(view, old, end) for view in views] if old else None

    def halved(self, view: CacheView, chunks: list[tuple[int, int]], end: int) -> Retention:
        """Rows of some whole chunks that stay; what follows them is whole too."""
        keep = torch.ones(1, len(view), dtype=torch.bool, device=view.device)
        tokens, keys = view.geometry.tokens, wide(view.keys("read"))
        for low, high in chunks:
            first, last = (len(view) - (end - frame) * tokens for frame in (low, high))
            keep[:, first + tokens : last] = self.unlike(keys[:, first:last], tokens)
        view.scored += view.heads * sum(high - low for low, high in chunks) * tokens
        return Retention(keep=keep)

    def unlike(self, keys: Tensor, tokens: int) -> Tensor:
        """Which tokens after the first frame stay, bool ``[n]``, of keys ``[H, T + n, D]``."""
        every = keys.transpose(0, 1).flatten(1)  # [T + n, H * D]
        mean, others = every[:tokens].mean(0), every[tokens:]
        alike = others @ mean / (others.norm(dim=1) * mean.norm() + 1e-8)
        count = math.ceil(self.ratio * tokens) * (len(others) // tokens)
        stay = torch.zeros(len(others), dtype=torch.bool, device=keys.device)
        return stay.scatter(0, alike.argsort(stable=True)[:count], True)
