"""Read what will be looked at: an upper bound that knows where attention goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.view import PassView
from lightning_kv.policies.base import SelectPart
from lightning_kv.policies.checks import between, choice
from lightning_kv.policies.hindsight import OBJECTIVES, TABLES, Place, coming_mass, greedy_order
from lightning_kv.policies.part import Preset


@dataclass(frozen=True)
class OracleReads(SelectPart):
    """Read the frames that the reference rollout of this very clip attends to in this chunk.

    Keeps everything and scores nothing: what a perfect guess without looking would read.

    Args:
        objective: ``mass``: the softmax mass of the chunk's queries, frame by frame; ``output``:
            the frames that bring the heads' outputs nearest to the reference's.
        queries: Queries of each pass that the objective ``output`` looks at.
    """

    name: ClassVar[str] = "oracle-reads"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "oracle-reads",
            "Keep everything, read what the reference rollout of the same clip attends to: an "
            "upper bound.",
            saves=("reads",),
            parts={"select": {"part": "oracle-reads", "budget": "9f"}},
        ),
    )
    objective: str = "output"
    queries: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, objective=OBJECTIVES)
        between(self, 1, None, "queries")

    @property
    def comparable(self) -> bool:
        """Mass is; ranks are not."""
        return self.objective == "mass"

    @property
    def needs(self) -> dict[str, dict[str, Any]]:
        """The table of its objective."""
        name = TABLES[self.objective]
        return {name: {"queries": self.queries} if name == "outputs" else {}}

    def scores(self, view: PassView, state: Any) -> Tensor:
        """By what this chunk attends to."""
        table, place = view.tables[TABLES[self.objective]], Place.of(view)
        chunk = (view.step.chunk,)
        if self.objective == "mass":
            return coming_mass(table, place, chunk)
        guard = torch.zeros(1, len(view.frames), dtype=torch.bool, device=view.device)
        return greedy_order(table, place, chunk, 1.0, guard, self.most(view))
