"""What is compared: budgets by many rules of one total, all read by the same select part.

Conditions are called ``RULE@MEANf``, such as ``optimal@6f``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.passes import Geometry
from lightning_kv.policies.base import CachePolicy, SelectPart
from lightning_kv.policies.budget.adaptive import Adaptive
from lightning_kv.policies.budget.calibrated import Calibrated, CalibratedLayers, scorer_of
from lightning_kv.policies.curve_statistics import loss_of
from lightning_kv.policies.curve_tables import CurveTable, Reading, file_of_curves
from lightning_kv.policies.head_curves import CURVE, HeadCurves
from lightning_kv.policies.part import BudgetPart
from lightning_kv.policies.registry import build_part, part_class, preset
from lightning_kv.utilities.files import checksum

TABLES = (
    *("uniform", "pyramid", "pyramid-reversed", "focused-matched", "proportional"),
    *("log", "optimal", "levels"),
)
"""Rules that fix what each head gets, whatever the input."""
ONLINE: dict[str, type[BudgetPart]] = {"dynamic": Adaptive, "dynamic-table": CalibratedLayers}
"""Rules that divide by the scores of each input."""
NEARLY_UNIFORM = "published-zero"
BY_ZERO = {"focused-matched-zero": "focused-matched", NEARLY_UNIFORM: "published"}
"""Rules on Focused Forcing's own measure, whole heads taken away, where the file has it."""
SHUFFLED = "shuffled-"
JUDGED, UNIFORM = "optimal", "uniform"
SHUFFLES = 5
SHARES = (1 / 4, 3 / 8, 1 / 2)
"""Means where none are given, as shares of the reach."""


@dataclass(frozen=True)
class Source:
    """A file of head curves, and which of them are meant.

    Args:
        path: Of the file.
        curves: What it holds.
        scorer: Of the curves.
        metric: Of the curves.
    """

    path: Path
    curves: HeadCurves
    scorer: str
    metric: str

    @classmethod
    def of(
        cls, heads: str | Path, model: str, select: str, scorer: str | None, metric: str
    ) -> Source:
        """Find the file, and its curves for a select part.

        Args:
            heads: Path, or ``auto``: the file that is shipped for the model.
            model: What budget parts call the model.
            select: Name of the part.
            scorer: Of the curves; of top-attention ``mass``, else the part itself where None.
            metric: Of the curves.

        Raises:
            ValueError: There is no such file, or no such curves.
        """
        path = file_of_curves(heads, model)
        curves = HeadCurves.load(path)
        scorer = scorer or scorer_of(select)
        curves.prompts(scorer, metric)
        return cls(path, curves, scorer, metric)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Keys of those that were measured."""
        return tuple(self.curves.about.get("data", {}).get("prompts", ()))

    def reading(self, importance: str = CURVE) -> Reading:
        """Which curves, and by which importance."""
        return Reading(self.scorer, self.metric, "mean", True, importance)

    def table(self, importance: str = CURVE) -> CurveTable:
        """What budget parts hold of it."""
        return CurveTable.read(self.path, "heads").chosen(self.reading(importance))

    def describe(self) -> dict[str, Any]:
        """What tells it from others."""
        return {"sha256": checksum(self.path), "reading": self.reading().words}


def select_part(name: str) -> SelectPart:
    """A select part that chooses whole frames, without a budget so far.

    Raises:
        ValueError: There is none of this name, or it does not choose so.
    """
    cls = part_class("select", name)
    part = build_part("select", name) if cls.limited else None
    if part is None or part.unit != "frame" or part.needs or part.inputs:
        raise ValueError(
            f"The select part {name!r} cannot be judged: it takes no budget, reads single rows, or "
            "needs what is not known beforehand. Use one that reads whole frames by score, such as "
            "top-attention or focused."
        )
    return part


@dataclass(frozen=True)
class Design:
    """The conditions of a proof.

    Args:
        source: The curves.
        select: What chooses the frames that are read.
        means: Frames per head on average.
        geometry: Of the model.
        shuffles: How many times the optimal budgets are dealt to other heads.
        weights: What tells the weights of the model from others.
    """

    source: Source
    select: SelectPart
    means: tuple[int, ...]
    geometry: Geometry
    shuffles: int = SHUFFLES
    weights: str = ""

    def __post_init__(self) -> None:
        low, reach = self.least, self.source.curves.reach
        given = self.means or usual_means(reach, low)
        wrong = [mean for mean in given if not low <= mean < reach]
        if wrong or not given:
            shown = ", ".join(f"{mean}f" for mean in wrong) or "none"
            raise ValueError(
                f"Means of {shown} cannot be compared: {low} history frames are protected in every "
                f"head, and at {reach}, the reach of these curves, there is nothing to divide. "
                "Give means from the former on and below the latter."
            )
        object.__setattr__(self, "means", tuple(sorted(set(given))))

    @property
    def least(self) -> int:
        """Frames that every head gets."""
        own = self.select.smallest(self.geometry.chunk)
        return max(self.source.curves.budgets[0], own)

    @property
    def note(self) -> str:
        """What differs from the measurement of the curves; nothing where nothing does."""
        sink = self.source.curves.about.get("cache", {}).get("sink", 0)
        said = [self._tables[CURVE].foreign(self.geometry.model, self.weights)]
        if sink > getattr(self.select, "sink", 0):
            said.append(
                f"Curves were measured with the first {sink} frames always read, and "
                f"{self.select.name} may leave them out."
            )
        return " ".join(filter(None, said))

    @property
    def rules(self) -> tuple[str, ...]:
        """Of the conditions, in the order of the table."""
        return tuple(rule for rule in self.every if rule not in self.absent)

    @property
    def shuffled(self) -> tuple[str, ...]:
        """The shuffles among the rules."""
        return tuple(rule for rule in self.rules if rule.startswith(SHUFFLED))

    @property
    def every(self) -> tuple[str, ...]:
        """All rules, also those that cannot be here."""
        shuffles = (f"{SHUFFLED}{n}" for n in range(1, self.shuffles + 1))
        return (*TABLES, *BY_ZERO, *ONLINE, *shuffles)

    @cached_property
    def absent(self) -> dict[str, str]:
        """Rules that cannot be here, and why."""
        found = {}
        if "zero" not in self.source.curves.importance:
            why = "no prompt was measured with whole heads taken away"
            found |= dict.fromkeys(BY_ZERO, why)
        if not self.select.comparable:
            why = f"scores of {self.select.name} only rank within a head"
            found |= dict.fromkeys(ONLINE, why)
        for rule in (*TABLES, *BY_ZERO):
            try:
                if rule not in found:
                    self.budgets(rule, self.means[0])
            except ValueError as error:
                if rule in (UNIFORM, JUDGED):
                    raise
                found[rule] = str(error)
        return found

    @cached_property
    def _tables(self) -> Mapping[str, CurveTable]:
        names = [CURVE, *(["zero"] if "zero" in self.source.curves.importance else [])]
        return {name: self.source.table(name) for name in names}

    def budget(self, rule: str, mean: int) -> BudgetPart:
        """The budget part of a condition."""
        amount, importance = f"{mean}f", "zero" if rule in BY_ZERO else CURVE
        if rule == "dynamic":
            return Adaptive(amount)
        seed, name = 0, BY_ZERO.get(rule, rule)
        if rule.startswith(SHUFFLED):
            name, seed = "shuffled", int(rule.removeprefix(SHUFFLED))
        kind = CalibratedLayers if rule == "dynamic-table" else Calibrated
        return kind(
            amount,
            self._tables[importance],
            JUDGED if rule == "dynamic-table" else name,
            self.source.scorer,
            self.source.metric,
            importance=importance,
            least=f"{self.least}f" if self.least else None,
            seed=seed,
            transfer=True,  # the cache is that of the file; what else differs is in the note
        )

    def parts(self) -> dict[str, SelectPart]:
        """What chooses in each condition, by its name."""
        return {
            f"{rule}@{mean}f": replace(self.select, budget=self.budget(rule, mean))
            for mean in self.means
            for rule in self.rules
        }

    def policies(self) -> list[CachePolicy]:
        """The conditions as policies, for checks that look at such."""
        full = preset("full")
        return [replace(full, name=name, select=part) for name, part in self.parts().items()]

    def budgets(self, rule: str, mean: int) -> Tensor | None:
        """Frames of each head, int64 ``[L, H]``; None where they depend on the input.

        Raises:
            ValueError: They cannot be solved.
        """
        if rule in ONLINE:
            return None
        return torch.tensor(self.budget(rule, mean).solved(self.geometry))

    def predicted(self, rule: str, mean: int) -> float | None:
        """Sum of what heads lose by the curves, a squared error; None as in :meth:`budgets`."""
        budgets = self.budgets(rule, mean)
        if budgets is None:
            return None
        of = self._tables[CURVE].limited(self.least, None)
        return loss_of(of.curves, budgets, self.least)

    def describe(self) -> dict[str, Any]:
        """What the losses depend on."""
        return {
            "heads": self.source.describe(),
            "select": repr(replace(self.select, budget=None)),
            "means": list(self.means),
            "rules": list(self.rules),
        }


def usual_means(reach: int, low: int) -> tuple[int, ...]:
    """Means of about 25, 35 and 50 % of the reach.

    >>> usual_means(24, 1), usual_means(6, 1)
    ((6, 9, 12), (2, 3))
    """
    every = {max(low, round(share * reach)) for share in SHARES}
    return tuple(sorted(mean for mean in every if mean < reach))
