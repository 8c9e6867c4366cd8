"""Read what a scorer that was taught by hindsight ranks highest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.base import SelectPart
from lightning_kv.policies.checks import choice
from lightning_kv.policies.part import Preset
from lightning_kv.policies.scorer.running import RanksByScorer, scores_of


@dataclass(frozen=True)
class DistilledReads(RanksByScorer, SelectPart):
    """Read the frames that a scorer ranks highest, and the last chunk.

    The scorer of ``distilled``, which was taught what to keep, decides what is read: once a chunk,
    by the clean pass over the chunk before, so no query of the chunk is looked at. All that is held
    is looked at in that pass. Over ``retain: distilled`` the clean pass is looked at twice, once
    for each part.
    """

    name: ClassVar[str] = "distilled-reads"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "distilled-reads",
            "Keep everything, read the frames that a small scorer, taught by hindsight, ranks "
            "highest, and the last chunk.",
            saves=("reads",),
            parts={"select": {"part": "distilled-reads", "budget": "9f"}},
        ),
    )
    observes: ClassVar[tuple[str, ...]] = ("prefill", "commit", "rebuild")

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, refresh=("chunk",))  # in a pass nothing new is seen

    def scores(self, view: PassView, state: Any) -> Tensor:
        """What the scorer says of each frame."""
        return scores_of(self, [view], state)[0]

    def protected(self, view: CacheView, scores: Tensor) -> Tensor:
        """The chunk before this one."""
        first = view.step.start - (view.geometry.chunk or view.query_frames)
        return (view.frame_ids >= first).view(1, 1, -1)

    def smallest(self, chunk: int) -> int:
        """The chunk before."""
        return chunk
