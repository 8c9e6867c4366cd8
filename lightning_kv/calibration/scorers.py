"""What decides which frames a head keeps; a curve holds for the one it was measured with.

Shapes: H heads, F held frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from lightning_kv.cache.view import PassView
from lightning_kv.policies.base import CachePolicy, SelectPart
from lightning_kv.policies.part import PARTS
from lightning_kv.policies.registry import discover, load_policy, preset, presets
from lightning_kv.utilities.nearest import unknown

Scorer = Callable[[PassView, Tensor], Tensor]
"""``(view, mass [H, F])`` to scores ``[H, F]``: higher is kept longer."""

SCORERS: dict[str, Scorer] = {
    "mass": lambda view, mass: mass,
    "recency": lambda view, mass: view.frame_ids.double().expand(view.heads, -1),
}
"""``mass``: what the queries of this very pass look at; ``recency``: the newest first."""


def scorer_of(name: str) -> Scorer | CachePolicy:
    """What a scorer's name means.

    Args:
        name: One of :data:`SCORERS`; a select part, or a preset that reads frames by score; or a
            retain part, or a preset, that keeps whole frames in memory.

    Returns:
        Scores of what is read; or the policy, whose memory at each budget is looked up
        (:mod:`lightning_kv.calibration.memory`).

    Raises:
        ValueError: No scorer of that name, or the part cannot be one.
    """
    if name in SCORERS:
        return SCORERS[name]
    discover()
    if scorer := _select_scorer(name):
        return scorer
    if name not in PARTS["retain"] and name not in presets(any_model=True):
        raise ValueError(unknown("frame scorer", name, scorer_names()))
    policy = load_policy(name)
    why = _not_memory(policy)
    if why:
        raise ValueError(
            f"{name!r} is no frame scorer: {why}. Use one that reads whole frames by score, or "
            f"keeps them: {', '.join(scorer_names())}."
        )
    return policy


def canonical(name: str) -> str:
    """A scorer by the name under which budgets look for its curves: a preset's by that of its part.

    Args:
        name: See :func:`scorer_of`.

    Raises:
        ValueError: As there.
    """
    scorer = scorer_of(name)
    if not isinstance(scorer, CachePolicy):
        return name
    part = PARTS["retain"][scorer.retain.name]
    plain = replace(scorer.retain, budget=None) == replace(part(), budget=None)
    return scorer.retain.name if plain else name


def _select_scorer(name: str) -> Scorer | None:
    """Scores of a select part, or of a preset's."""
    part = PARTS["select"][name]() if name in PARTS["select"] else None
    if part is None and name in presets(any_model=True):
        part = preset(name).select
    scores = part is not None and type(part).scores is not SelectPart.scores
    if not scores or part.unit != "frame" or part.needs or part.observes:
        return None  # one that has looked at earlier passes says nothing of this one alone

    def scored(view: PassView, mass: Tensor) -> Tensor:
        found = part.scores(view, part.fresh())  # a pass at a time: nothing is remembered
        return found.double().mean(1).expand(view.heads, -1)

    return scored


def _not_memory(policy: CachePolicy) -> str | None:
    """Why a policy's memory cannot be looked up at a budget; None where it can."""
    if policy.needs or policy.inputs:
        return f"it needs {', '.join([*policy.needs, *policy.inputs])}"
    if not policy.retain.limited:
        return "its memory has no budget"
    if policy.retain.unit != "frame":
        return "it keeps single rows"
    others = (policy.select, policy.positions, policy.precision)
    usual = load_policy("full")
    if others != (usual.select, usual.positions, usual.precision):
        return "it does more than keep frames"
    if "closing" in policy.retain.moments:
        return "its chunks are decided about before they are complete"
    return None


def scorer_names() -> list[str]:
    """Every name that :func:`scorer_of` takes, but for presets of two parts."""
    discover()
    kinds = {
        name
        for name in PARTS["retain"]
        if PARTS["retain"][name]().limited and _not_memory(load_policy(name)) is None
    }
    return [
        *SCORERS,
        *sorted(name for name in PARTS["select"] if _select_scorer(name)),
        *sorted(kinds),
    ]
