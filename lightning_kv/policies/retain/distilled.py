"""Keep what a scorer that was taught by hindsight ranks highest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_kv.cache.decisions import Retention
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import UnitPart
from lightning_kv.policies.checks import choice
from lightning_kv.policies.part import Preset
from lightning_kv.policies.scorer.running import RanksByScorer, scores_of


@dataclass(frozen=True)
class Distilled(RanksByScorer, UnitPart):
    """Keep the frames that a scorer ranks highest, and the newest chunk.

    The scorer was taught offline, by ``lightning-kv distill``, which frames a reference rollout
    looks at later. It looks at each frame once a chunk, when the chunk is committed, with a sample
    of the queries of the clean pass; denoising passes cost nothing. One order serves all budgets.
    Its weights, and what it remembers of each frame, count as bytes of the cache.
    """

    name: ClassVar[str] = "distilled"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "distilled",
            "Keep the frames that a small scorer, taught by hindsight, ranks highest; drop the "
            "others.",
            saves=("memory", "reads"),
            parts={"retain": {"part": "distilled", "budget": "9f"}},
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, granularity=("frame",))

    def commit(self, views: list[CacheView], state: Any) -> list[Retention | None]:
        """All layers at once: the scorer runs once a chunk."""
        todo = [view for view in views if not self.fits(view)]
        found = scores_of(self, todo, state)
        state["scores"] = {view.layer: own for view, own in zip(todo, found, strict=True)}
        return super().commit(views, state)

    def scores(self, view: CacheView, state: Any) -> Tensor:
        """What the scorer says of each frame."""
        found = state.get("scores", {}).pop(view.layer, None)
        return scores_of(self, [view], state)[0] if found is None else found
