"""What the parts of Pyramid Forcing share: the kinds of heads, and where a row belongs.

Shapes: H heads, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.checks import between, same
from lightning_kv.policies.labels import heads_of, labelled
from lightning_kv.policies.part import Part
from lightning_kv.policies.tables import AUTO, HeadTable

if TYPE_CHECKING:
    from lightning_kv.policies.base import CachePolicy

KINDS = {"wave": -1, "anchor": 1, "veil": 2}


@dataclass(frozen=True)
class PyramidHeads(Part):
    """What the parts of Pyramid Forcing share: the kinds of heads, and where a row belongs.

    Args:
        wave_sink: First frames that wave heads keep.
        sink: First frames that anchor and veil heads keep.
        recent: Newest frames that all read, the current chunk included.
        period: Frames between two that a wave head reads.
        stride: Frames between two that an anchor head keeps.
        block: Frames that veil heads merge, 2 or more.
        slots: Middle frames of an anchor head and of each phase of a wave head, and blocks of a
            veil head.
        labels: ``wave`` (-1), ``anchor`` (1) or ``veil`` (2) for each head; ``auto``: those of the
            model.
    """

    wave_sink: int = 1
    sink: int = 3
    recent: int = 4
    period: int = 6
    stride: int = 6
    block: int = 4
    slots: int = 4
    labels: HeadTable = AUTO

    def __post_init__(self) -> None:
        between(self, 0, None, "wave_sink", "sink")
        between(self, 1, None, "recent", "period", "stride", "slots")
        between(self, 2, None, "block")
        object.__setattr__(self, "labels", labelled(self, KINDS, method="pyramid-forcing"))

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """Refuse labels of another model."""
        self.labels.check_heads(geometry, "head labels", "pyramid-forcing")

    def suits(self, policy: CachePolicy) -> None:
        """All parts of the method have the same settings of these."""
        for other in policy.parts:
            if isinstance(other, PyramidHeads):
                same(self, other, *(own.name for own in fields(PyramidHeads)))

    def of(self, view: CacheView, kind: str) -> Tensor:
        """Heads of a kind, bool ``[H, 1]``."""
        return heads_of(view, self.labels, kind)

    def sinks(self, view: CacheView) -> Tensor:
        """First frames that each head keeps, ``[H, 1]``."""
        return torch.where(self.of(view, "wave"), self.wave_sink, self.sink)

    def merged(self, view: CacheView) -> Tensor:
        """Rows that stand for a block, bool ``[1 or H, N]``."""
        return view.weight > 1.5

    def near(self, view: CacheView, start: int) -> Tensor:
        """Rows that are read whatever the phase, the sink left out, bool ``[H, N]``.

        Args:
            view: Of one layer.
            start: First frame of the current chunk.
        """
        chunk = view.geometry.chunk or view.query_frames
        ids, old = view.frame_id, max(0, self.recent - chunk)
        return (ids >= start - old) & (ids >= self.sinks(view)) & ~self.merged(view)
