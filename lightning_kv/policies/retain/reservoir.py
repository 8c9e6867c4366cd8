"""Keep the first frames and the newest, as many as a fixed number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_kv.cache.decisions import Retention
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import RetainPart
from lightning_kv.policies.checks import between


@dataclass(frozen=True)
class Reservoir(RetainPart):
    """Keep the first frames and the newest, as many as a fixed number with the chunk to come.

    The memory from which Relax Forcing (arXiv 2603.21366) reads a few frames. It has no budget:
    that of a policy says what is read.

    Args:
        frames: Held, the chunk to come and the first frames included.
        sink: First frames of the video that are never dropped.
    """

    name: ClassVar[str] = "reservoir"
    limited: ClassVar[bool] = False
    frames: int = 120
    sink: int = 2

    def __post_init__(self) -> None:
        between(self, 0, None, "sink")
        between(self, self.sink + 1, None, "frames")

    def commit(self, views: list[CacheView], state: Any) -> list[Retention | None]:
        """The same for all layers and heads."""
        return [self.keep(view, state) for view in views]

    def keep(self, view: CacheView, state: Any) -> Retention | None:
        """What a chunk of the next length leaves room for; at least the newest frame."""
        coming = view.step.next_chunk or view.geometry.chunk
        later = [f for f in view.frames if f >= self.sink]
        old = later[: -max(1, self.frames - self.sink - coming)]
        return Retention(keep=view.rows_from(set(view.frames) - set(old))) if old else None
