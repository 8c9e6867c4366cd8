"""Keep the newest frames, and the first ones as a sink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import RetainPart


@dataclass(frozen=True)
class Everything(RetainPart):
    """Keep every row (the full cache, and the reference)."""

    name: ClassVar[str] = "everything"


@dataclass(frozen=True)
class Window(RetainPart):
    """Keep the newest frames, and the first ones as a sink.

    Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453); without a sink it
    is the rolling cache of Self Forcing (arXiv 2506.08009).

    Args:
        sink: First frames of the video that are never dropped; they count in the budget.
    """

    name: ClassVar[str] = "window"
    sink: int = 0

    def protected(self, view: CacheView, scores: Tensor) -> Tensor:
        """The sink."""
        return (view.frame_ids < self.sink).view(1, 1, -1)

    def smallest(self, chunk: int) -> int:
        """The sink and one frame."""
        return self.sink + 1
