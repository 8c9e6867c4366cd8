"""Read the frames that hold the largest softmax mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_kv.cache.view import PassView
from lightning_kv.policies.base import SelectPart
from lightning_kv.policies.part import Preset


@dataclass(frozen=True)
class TopAttention(SelectPart):
    """Read, in each head, the frames with the largest softmax mass.

    The mass is exact: the queries meet every held key once to find it, which
    ``kv_scored_fraction`` shows. So this is a strong and simple yardstick for cheaper scores. It is
    the frame-wise form of the oracle in Quest (arXiv 2406.10774).

    Args:
        per_query_frame: Choose for each query frame instead of for the whole chunk.
    """

    name: ClassVar[str] = "top-attention"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "top-attention",
            "Keep everything, read the frames with the largest softmax mass, per head.",
            saves=("reads",),
            parts={"select": {"part": "top-attention", "budget": "9f"}},
        ),
    )
    per_query_frame: bool = False
    refresh: str = "pass"

    def scores(self, view: PassView, state: Any) -> Tensor:
        """Softmax mass of each frame."""
        return view.by_frame(view.attention(self.per_query_frame)[0])
