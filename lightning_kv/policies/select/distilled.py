"""Read what a scorer that was taught by hindsight ranks highest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_kv.cache.decisions import Event
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.base import SelectPart
from lightning_kv.policies.checks import choice
from lightning_kv.policies.part import Preset
from lightning_kv.policies.scorer.artifact import ScorerFile
from lightning_kv.policies.scorer.running import check_scorer, look, scores_of
from lightning_kv.policies.scorer.seen import forget_prompt


@dataclass(frozen=True)
class DistilledReads(SelectPart):
    """Read the frames that a scorer ranks highest, and the last chunk.

    The scorer of ``distilled``, which was taught what to keep, decides what is read: once a chunk,
    by the clean pass over the chunk before, so no query of the chunk is looked at. All that is held
    is looked at in that pass. Over ``retain: distilled`` the clean pass is looked at twice, once
    for each part.

    Args:
        scorer: File (.safetensors), or ``auto``: the one that is shipped for the model.
        transfer: Take a scorer that was taught with another chunk or token grid.
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
    scorer: ScorerFile = ScorerFile()  # noqa: RUF009  frozen
    transfer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, refresh=("chunk",))  # in a pass nothing new is seen
        object.__setattr__(self, "scorer", ScorerFile.of(self.scorer))

    @property
    def comparable(self) -> bool:
        """Ranks within a head are all that it was taught."""
        return False

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """The scorer is of such a model."""
        check_scorer(self, geometry)

    def observe(self, view: PassView, state: Any) -> None:
        """What the frames that become final look at."""
        look(self, view, state)

    def event(self, event: Event, views: list[CacheView], state: Any) -> None:
        """A prompt switch forgets the queries of the old prompt."""
        if event.kind == "prompt_switch":
            forget_prompt(state)

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
