"""May a cheap measure of head curves stand in for the exact one: the gate, as data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from lightning_kv.stats.bootstrap import Array, finite
from lightning_kv.stats.reliability import (
    Correlation,
    Reliability,
    disattenuated,
    rank_correlation,
    split_half,
)
from lightning_kv.utilities.formatting import number, several

EVERYTHING = 0.9
"""The lower bound of the rank correlation from which the cheap measure is used for everything."""
SCREEN = 0.7
"""The lower bound from which it still says which heads to measure exactly."""

GateVerdict = Literal["gn", "screen", "exact"]


@dataclass(frozen=True)
class LogRatio:
    """How far apart two measures are at one budget, whatever the sign.

    Args:
        budget: History frames per head.
        median: Of ``|log(first / second)|`` over heads, of means over prompts; None without heads.
        heads: Number of heads that it is the median of.
        left_out: Number of heads of which a mean is at the floor, so that there is no ratio.
    """

    budget: int
    median: float | None
    heads: int
    left_out: int


@dataclass(frozen=True)
class Gate:
    """What the cheap measure may be used for.

    Args:
        verdict: ``gn``: for everything; ``screen``: to find the heads that decide, which are then
            measured exactly; ``exact``: for nothing.
        bound: The lower bound that decided; None where there is none.
        reason: In one sentence.
    """

    verdict: GateVerdict
    bound: float | None
    reason: str


@dataclass(frozen=True)
class Agreement:
    """All that is known about a cheap measure against the exact one.

    Args:
        history: Rank correlation of the losses at the smallest budget: the history masked.
        budgets: The same at each budget, in the order of the grid.
        cheap: Reliability of the cheap measure, history masked.
        exact: That of the exact one.
        corrected: Correlation of the measures without the noise of either; see
            :func:`disattenuated`.
        ratios: Distance of the two at each budget.
        gate: What the cheap measure may be used for.
    """

    history: Correlation
    budgets: tuple[Correlation, ...]
    cheap: Reliability
    exact: Reliability
    corrected: float | None
    ratios: tuple[LogRatio, ...]
    gate: Gate


def budget_ratios(
    first: ArrayLike, second: ArrayLike, budgets: Sequence[int], floor: float = 0.0
) -> tuple[LogRatio, ...]:
    """How far two measures of curves are apart, budget by budget.

    Args:
        first: Losses ``[P, M, Bn]``.
        second: The same by another measure.
        budgets: The grid: Bn numbers of history frames.
        floor: Means at or below it are no loss (the numerical floor of the exact measure).

    Raises:
        ValueError: The shapes do not fit, or a value is not finite.

    Example:
        >>> budget_ratios([[[2.0, 0.0]]], [[[1.0, 0.0]]], [4, 8])[0].median
        0.6931471805599453
    """
    x, y = (side.mean(0) for side in curves_of(first, second, budgets))
    found = []
    for place, budget in enumerate(budgets):
        there = (x[:, place] > floor) & (y[:, place] > floor)
        gaps = np.abs(np.log(x[there, place] / y[there, place]))
        median = float(np.median(gaps)) if len(gaps) else None
        found.append(LogRatio(int(budget), median, len(gaps), int((~there).sum())))
    return tuple(found)


def curves_of(first: ArrayLike, second: ArrayLike, budgets: Sequence[int]) -> tuple[Array, Array]:
    """Both sets of curves as arrays.

    Raises:
        ValueError: The shapes are not the same ``[P, M, Bn]``, or a value is not finite.
    """
    x, y = finite(first), finite(second)
    if x.shape != y.shape or x.ndim != 3 or not x.size or x.shape[2] != len(budgets):
        raise ValueError(
            f"Curves of shapes {list(x.shape)} and {list(y.shape)} on {len(budgets)} budgets "
            "cannot be compared. Pass [prompts, heads, budgets] twice, the same in each."
        )
    return x, y


def gate(found: Correlation) -> Gate:
    """What a measure may be used for whose ranks agree so well with the exact ones.

    >>> gate(Correlation(4, 48, 0.95, 0.95, 0.85, 0.97, "")).verdict
    'screen'
    """
    if found.low is None:
        reason = f"There is no lower bound of the rank correlation: {found.why}. "
        return Gate("exact", None, reason + "Only exact masking counts.")
    bound = math.floor(1000 * found.low) / 1000  # 0.8999 shall not look like 0.9
    seen = (
        f"Across {several(found.heads, 'head')} the ranks by Gauss-Newton and by exact masking "
        f"correlate with {number(found.estimate)}, at least {number(bound)} as far as "
        f"{several(found.prompts, 'prompt')} can tell"
    )
    if found.low >= EVERYTHING:
        return Gate("gn", found.low, f"{seen}: {EVERYTHING} or more, so Gauss-Newton is enough.")
    if found.low >= SCREEN:
        rest = (
            f"{seen}: below {EVERYTHING}, so Gauss-Newton screens, and heads near the threshold of "
            "the allocation are measured exactly."
        )
        return Gate("screen", found.low, rest)
    return Gate("exact", found.low, f"{seen}: below {SCREEN}, so only exact masking counts.")


def agreement(
    cheap: ArrayLike,
    exact: ArrayLike,
    budgets: Sequence[int],
    floor: float = 0.0,
    resamples: int = 2000,
    seed: int = 0,
) -> Agreement:
    """A cheap measure of head curves against the exact one, and what follows for its use.

    Args:
        cheap: Losses ``[P, M, Bn]``; the first budget is the history masked.
        exact: The same prompts, heads and budgets, measured exactly.
        budgets: The grid: Bn numbers of history frames, ascending.
        floor: Losses at or below it are none, see :func:`budget_ratios`.
        resamples: Number of bootstrap samples.
        seed: The same seed gives the same intervals.

    Raises:
        ValueError: The shapes do not fit, or a value is not finite.
    """
    x, y = curves_of(cheap, exact, budgets)
    each = tuple(
        rank_correlation(x[:, :, place], y[:, :, place], resamples=resamples, seed=seed)
        for place in range(len(budgets))
    )
    repeats = [split_half(side[:, :, 0], seed=seed) for side in (x, y)]
    return Agreement(
        history=each[0],
        budgets=each,
        cheap=repeats[0],
        exact=repeats[1],
        corrected=disattenuated(each[0], *repeats),
        ratios=budget_ratios(x, y, budgets, floor),
        gate=gate(each[0]),
    )
