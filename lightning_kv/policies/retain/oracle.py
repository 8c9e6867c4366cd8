"""Keep what will be looked at: an upper bound that knows the future."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import UnitPart
from lightning_kv.policies.checks import between, choice
from lightning_kv.policies.hindsight import OBJECTIVES, TABLES, Place, coming_mass, greedy_order
from lightning_kv.policies.part import Preset


@dataclass(frozen=True)
class Oracle(UnitPart):
    """Keep the frames that the reference rollout of this very clip attends to later.

    Hindsight: no policy that must decide when a chunk is made can know it, so this is the yardstick
    for those that can, and their teacher. It is best for attention on the reference's trajectory,
    which the policy's own rollout leaves.

    Args:
        objective: ``mass``: the softmax mass to come, frame by frame. ``output``: frames in the
            order in which they bring the heads' outputs to come nearest to the reference's, which
            wants only one of two frames that say the same.
        discount: What each later chunk counts of the one before.
        horizon: Chunks ahead that count; all where None.
        queries: Queries of each pass that the objective ``output`` looks at.
    """

    name: ClassVar[str] = "oracle"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "oracle",
            "Keep what the reference rollout of the same clip attends to later, drop the rest: an "
            "upper bound.",
            saves=("memory", "reads"),
            parts={"retain": {"part": "oracle", "budget": "9f"}},
        ),
        Preset(
            "oracle-mass",
            "Keep what the reference rollout of the same clip attends to later, by softmax mass "
            "alone: of two frames that say the same both rank high.",
            saves=("memory", "reads"),
            parts={"retain": {"part": "oracle", "objective": "mass", "budget": "9f"}},
        ),
    )
    objective: str = "output"
    discount: float = 0.8
    horizon: int | None = None
    queries: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, objective=OBJECTIVES, granularity=("frame",))
        between(self, 0, 1, "discount")
        between(self, 1, None, "queries")
        if self.horizon is not None:
            between(self, 1, None, "horizon")

    @property
    def comparable(self) -> bool:
        """Mass is; ranks are not."""
        return self.objective == "mass"

    @property
    def needs(self) -> dict[str, dict[str, Any]]:
        """The table of its objective."""
        name = TABLES[self.objective]
        return {name: {"queries": self.queries} if name == "outputs" else {}}

    def scores(self, view: CacheView, state: Any) -> Tensor:
        """By the chunks that come after this one; there is nothing to choose behind the last."""
        table, place = view.tables[TABLES[self.objective]], Place.of(view)
        last = table.clip.chunks
        if self.horizon is not None:
            last = min(last, view.step.chunk + 1 + self.horizon)
        chunks = range(view.step.chunk + 1, last)
        if not chunks:
            return super().scores(view, state)
        if self.objective == "mass":
            return coming_mass(table, place, chunks, self.discount)
        guard = self.protected(view, view.frame_ids)[:, 0]
        return greedy_order(table, place, chunks, self.discount, guard, self.most(view))
