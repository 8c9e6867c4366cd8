"""Orders in which a head would keep frames; a curve holds for the order it was measured in.

Shapes: H heads, F held frames.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_kv.cache.view import PassView
from lightning_kv.policies.base import SelectPart
from lightning_kv.policies.part import PARTS
from lightning_kv.policies.registry import preset, presets
from lightning_kv.utilities.nearest import unknown

Scorer = Callable[[PassView, Tensor], Tensor]
"""``(view, mass [H, F])`` to scores ``[H, F]``: higher is kept longer."""

SCORERS: dict[str, Scorer] = {
    "mass": lambda view, mass: mass,
    "recency": lambda view, mass: view.frame_ids.double().expand(view.heads, -1),
}
"""``mass``: what the queries of this very pass look at; ``recency``: the newest first."""


def scorer_of(name: str) -> Scorer:
    """A scorer by its name.

    Args:
        name: One of :data:`SCORERS`, or a select part or a preset that reads frames by score.

    Raises:
        ValueError: No scorer of that name.
    """
    if name in SCORERS:
        return SCORERS[name]
    part = PARTS["select"][name]() if name in PARTS["select"] else None
    if part is None and name in presets(any_model=True):
        part = preset(name).select
    scores = part is not None and type(part).scores is not SelectPart.scores
    if not scores or part.unit != "frame" or part.needs:
        known = [*SCORERS, *sorted(PARTS["select"])]
        raise ValueError(unknown("frame scorer", name, known))

    def scored(view: PassView, mass: Tensor) -> Tensor:
        found = part.scores(view, part.fresh())  # a pass at a time: nothing is remembered
        return found.double().mean(1).expand(view.heads, -1)

    return scored
