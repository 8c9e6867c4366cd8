"""Frames for each head from what it loses without them, as `calibrate` has measured it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor

from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.allocation import UNMEASURED, Heads, Knobs, allocate, check_rule
from lightning_kv.policies.budget.adaptive import shared
from lightning_kv.policies.budgets import Amount
from lightning_kv.policies.cache_spec import CacheSpec
from lightning_kv.policies.checks import between, choice
from lightning_kv.policies.curve_statistics import OBJECTIVES
from lightning_kv.policies.curve_tables import AUTO_CURVES, CurveTable, Reading
from lightning_kv.policies.head_curves import CURVE, METRICS
from lightning_kv.policies.part import PARTS, BudgetPart, Part


@dataclass(frozen=True)
class Calibrated(BudgetPart):
    """More frames for the heads that lose most without them, by measured curves and a rule.

    One file serves every amount and every rule: they are solved when the policy meets its model
    (:mod:`lightning_kv.policies.allocation`). All rules but ``focused`` give exactly the amount on
    average.

    Args:
        amount: Mean over all heads of the model, in frames (``5f``) or tokens (``8424t``); what is
            kept is whole frames in either. With ``rule: focused`` the most.
        heads: File of head curves (.safetensors), or ``auto``, the one shipped for the model. The
            rules uniform, pyramid and pyramid-reversed need none.
        rule: ``uniform``; ``pyramid`` or ``pyramid-reversed`` over layers; by importance
            ``focused``, ``focused-matched``, ``published`` (as uneven as Focused Forcing's own: a
            control), ``proportional`` or ``log``; by curves ``optimal`` (exact), ``greedy``,
            ``levels`` (few different budgets) or ``shuffled`` (the optimal ones given to other
            heads: a control).
        scorer: What kept frames where curves were measured: ``mass``, ``recency``, or a part. Where
            None the part that this budget belongs to; of ``top-attention`` ``mass``, of ``window``
            ``recency``.
        metric: How loss was measured: ``mass``, ``output``, ``gn`` or ``exact``.
        objective: ``mean`` over prompts, or ``cvar``: the worst quarter of them.
        importance: What rules by importance look at: one in the file, or ``curve``, the loss at
            the smallest budget.
        shrink: Take the noise out of the curves first.
        least: Frames that every head gets (``4f``): where None the smallest that was measured, or
            what the part protects if that is more; without a file the newest chunk.
        most: Frames that no head exceeds; the largest that was measured where None.
        gamma: Of the focused rules: above 1, the middle heads come closer to the least.
        beta: Of the pyramids: the last layer gets 1 / ``beta`` of the mean beside the least.
        levels: Of ``levels``: how many different budgets at most, 2 or 3.
        seed: Of ``shuffled``.
        transfer: Take curves that were measured with another chunk, token grid or cache.
    """

    name: ClassVar[str] = "calibrated"
    heads: CurveTable = AUTO_CURVES
    rule: str = "optimal"
    scorer: str | None = None
    metric: str = "gn"
    objective: str = "mean"
    importance: str = CURVE
    shrink: bool = True
    least: str | None = None
    most: str | None = None
    gamma: float = 2.0
    beta: float = 20.0
    levels: int = 3
    seed: int = 0
    transfer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if Amount.parse(self.amount).unit not in "ft":
            raise ValueError(
                f"The budget part {self.name!r} divides a number of frames that stays the same, "
                f"and {self.amount} was given. Give frames, such as 9f, or tokens, such as 9360t."
            )
        check_rule(self.rule)
        choice(self, metric=METRICS, objective=OBJECTIVES)
        for name in ("least", "most"):
            value = getattr(self, name)
            if value is not None and Amount.parse(value).unit != "f":
                raise ValueError(
                    f"{name}={value!r} of the budget part {self.name!r} is no number of frames. "
                    "Give one, such as 4f."
                )
        self.knobs  # noqa: B018  refuses what no rule can use
        heads = CurveTable.of(self.heads)
        object.__setattr__(self, "heads", heads.chosen(self.reading) if self.scorer else heads)

    def of(self, part: Part) -> Calibrated:
        """With the curves of the part, unless others were asked for."""
        return self if self.scorer else replace(self, scorer=scorer_of(part.name))

    @property
    def knobs(self) -> Knobs:
        """Settings of the rules."""
        return Knobs(self.gamma, self.beta, self.levels, self.seed)

    @property
    def reading(self) -> Reading:
        """Which of the file's curves are meant."""
        return Reading(self.scorer, self.metric, self.objective, self.shrink, self.importance)

    def check(self, geometry: Geometry, least: int) -> None:
        """The curves are of this model, reach the amount, and no head gets too little.

        Raises:
            ValueError: Something of that is not so.
        """
        if self.mean(geometry) < least:
            return  # said of every budget
        if table := self.table(geometry):
            table.check(geometry, self.transfer)
        given = min(map(min, self.solved(geometry)))
        if given < least:
            raise ValueError(
                f"Some head gets {given} frames of a calibrated budget of {self.amount}, but "
                f"{least} are protected in every head. Give least: {least}f."
            )

    def check_cache(self, geometry: Geometry, cache: CacheSpec, history: int) -> None:
        """The curves were measured with such a cache, unless another one is allowed.

        Raises:
            ValueError: They were not.
        """
        table = self.table(geometry)
        if table and not self.transfer:
            table.check_cache(cache, history)

    def table(self, geometry: Geometry) -> CurveTable | None:
        """The curves that it looks at; None where its rule needs none and no file is given.

        Raises:
            ValueError: There are none of this model.
        """
        if self.rule in UNMEASURED and self.heads.file == "auto":
            return None
        return self.heads.for_model(geometry, self.reading)

    def mean(self, geometry: Geometry) -> float:
        """The amount in frames."""
        own = Amount.parse(self.amount)
        return own.value / (geometry.tokens if own.unit == "t" else 1)

    def allowed(self, view: CacheView) -> tuple[float, ...] | None:
        """The layer's row of what was solved."""
        return tuple(map(float, self.solved(view.geometry)[view.layer]))

    def solved(self, geometry: Geometry) -> tuple[tuple[int, ...], ...]:
        """Frames of every head, a row per layer.

        Raises:
            ValueError: There are no curves of this model, or they do not reach the amount.
        """
        return _solved(self, geometry, geometry.model)

    def limits(self, geometry: Geometry) -> Heads:
        """What the rule may look at."""
        least, most = (
            None if own is None else int(Amount.parse(own).value) for own in (self.least, self.most)
        )
        if table := self.table(geometry):
            if least is None:
                least = max(table.budgets[0], least_of(self.scorer, geometry.chunk))
            return table.limited(least, most)
        mean = self.mean(geometry)
        least = min(geometry.chunk, math.floor(mean)) if least is None else least
        most = max(1, 2 * math.ceil(mean)) if most is None else most
        return Heads(geometry.layers, geometry.heads, least, most)


def scorer_of(part: str) -> str:
    """The scorer whose curves are those of a retain or select part."""
    return {"top-attention": "mass", "window": "recency"}.get(part, part)


def least_of(scorer: str | None, chunk: int) -> int:
    """Frames that a part protects in every head, as it comes, by the scorer of its curves.

    Args:
        scorer: A part's name, or another scorer: then 0.
        chunk: Frames of a chunk.
    """
    name = {"mass": "top-attention", "recency": "window"}.get(scorer, scorer)
    cls = PARTS["retain"].get(name) or PARTS["select"].get(name)
    return cls().smallest(chunk) if cls is not None else 0


@lru_cache(maxsize=64)
def _solved(part: Calibrated, geometry: Geometry, model: str) -> tuple[tuple[int, ...], ...]:
    """Frames of every head: asked for in every layer of every chunk, solved once for a model."""
    made = allocate(part.rule, part.mean(geometry), part.limits(geometry), part.knobs)
    return tuple(map(tuple, made.tolist()))


@dataclass(frozen=True)
class CalibratedLayers(Calibrated):
    """What measured curves give a layer, shared by its heads: what scores best over them is kept.

    The ``dynamic + table`` rule: ``calibrated`` fixes the total of each layer, and its heads share
    it by their scores, as in ``adaptive`` (Ada-KV, arXiv 2407.11550). Scores must be comparable
    between heads.

    Args:
        safe: Share of the layer's mean that every head gets, at least what is protected.
    """

    name: ClassVar[str] = "calibrated-layers"
    compares: ClassVar[bool] = True
    safe: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0, 1, "safe")

    def allowed(self, view: CacheView) -> None:
        """It depends on scores."""
        return

    def layer_mean(self, view: CacheView) -> float:
        """What the curves give the layer, for each of its heads."""
        return sum(self.solved(view.geometry)[view.layer]) / view.heads

    def lengths(
        self,
        views: Sequence[CacheView],
        scores: Sequence[Tensor],
        sizes: Sequence[Tensor],
        protected: Sequence[Tensor],
        state: dict[Any, Any],
    ) -> list[Tensor]:
        """Rows of each head: its own among the best of its layer."""
        out = []
        for view, *own in zip(views, scores, sizes, protected, strict=True):
            mean = self.layer_mean(view) * view.geometry.tokens
            total, safe = round(mean * view.heads), round(self.safe * mean)
            out += shared([view], total, safe, *([each] for each in own))
        return out
