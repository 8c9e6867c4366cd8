"""Do the losses of heads add up: true losses of whole budget tables on the sums of their curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import linregress

from lightning_kv.stats.bootstrap import Array, finite
from lightning_kv.utilities.formatting import number, percent, several

SLOPES = (0.8, 1.25)
"""Slopes in between, ends included, let curves be added."""
FIT = 0.8
"""The least share of the variance that the line explains."""


@dataclass(frozen=True)
class Additivity:
    """The line of log true losses on log predicted ones.

    Args:
        tables: Number of budget tables.
        slope: Of the line; 1 where losses add up, None where all predictions are the same.
        intercept: Of the line, in logs; 0 where they also have the right size.
        fit: Share of the variance that the line explains (R²); None as the slope.
        worst: Place of the table furthest from the line; None as the slope.
        worst_factor: Its true loss ÷ that on the line.
        holds: Whether the curves may be added.
        words: What was found and what follows.
    """

    tables: int
    slope: float | None
    intercept: float | None
    fit: float | None
    worst: int | None
    worst_factor: float | None
    holds: bool
    words: str


def additivity(
    true: Sequence[float], predicted: Sequence[float], groups: Sequence[int] = ()
) -> Additivity:
    """Whether the sum of the heads' losses says what a whole table of budgets loses.

    Least squares in logs. Curves may be added where the slope is in [0.8, 1.25] and R² is 0.8 or
    more. Tables should differ widely in what they lose: R² of much alike ones is that of noise.

    Args:
        true: Measured loss of each table, all of its budgets in force, on prompts that did not
            choose it.
        predicted: Sum over heads of the curves at each table's budgets, same order.
        groups: What tables are alike in, such as their mean budget, same order: they are only
            compared with those of their own group, as the choice of a table does. One where empty.

    Raises:
        ValueError: There are fewer than 3 tables, the lengths differ, or a loss is not finite and
            above 0.

    Example:
        >>> found = additivity([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
        >>> round(found.slope, 6), round(found.fit, 6), found.holds
        (1.0, 1.0, True)
    """
    y, x = logs(true, "true"), logs(predicted, "predicted")
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(
            f"A line needs pairs of losses, but there are {len(y)} true and {len(x)} predicted "
            "ones. Pass both for 3 tables or more, in the same order."
        )
    for group in set(groups):
        own = np.array([each == group for each in groups])
        x[own], y[own] = x[own] - x[own].mean(), y[own] - y[own].mean()
    if np.ptp(x) <= 1e-12 * max(1.0, np.abs(x).max()):
        why = (
            f"The same loss is predicted for all of {several(len(x), 'table')}, so nothing can be "
            "said about adding up: measure tables of different totals."
        )
        return Additivity(len(x), None, None, None, None, None, False, why)
    line = linregress(x, y)
    slope, intercept = float(line.slope), float(line.intercept)
    off = y - intercept - slope * x
    # True losses that are all the same are explained by a flat line, or rather: nothing is to be.
    fit = float(line.rvalue**2) if np.ptp(y) > 1e-12 else 0.0
    worst = int(np.argmax(np.abs(off)))
    holds = SLOPES[0] <= slope <= SLOPES[1] and fit >= FIT
    return Additivity(
        len(x),
        slope,
        intercept,
        fit,
        worst,
        math.exp(off[worst]),
        holds,
        words(len(x), slope, fit, math.exp(off[worst]), len(set(groups))),
    )


def logs(losses: Sequence[float], which: str) -> Array:
    """Logarithms of losses.

    Raises:
        ValueError: One is not finite and above 0.
    """
    data = finite(losses)
    if (data <= 0).any():
        place = int(np.argmax(data <= 0))
        raise ValueError(
            f"Logarithms need losses above 0, but the {which} loss of table {place} is "
            f"{number(float(data[place]))}. Leave out tables that lose nothing, such as the full "
            "cache."
        )
    return np.log(data)


def words(tables: int, slope: float, fit: float, factor: float, groups: int = 0) -> str:
    """The finding and its consequence in plain sentences."""
    low, high = SLOPES
    compared = ", each against those of its mean" if groups > 1 else ""
    found = (
        f"Over {several(tables, 'table')}{compared}, true losses follow the sums of curves with a "
        "slope of "
        f"{number(slope)} in logs and R² {number(fit)}; the worst is {number(factor)} times what "
        "the line says. "
    )
    if low <= slope <= high and fit >= FIT:
        return found + "Curves may be added."
    broken = [] if low <= slope <= high else [f"the slope is not in [{low}, {high}]"]
    broken += [] if fit >= FIT else [f"the line explains less than {percent(FIT)}"]
    return found + (
        f"Curves do not add up ({' and '.join(broken)}): what they predict of a table is a guide, "
        "and only losses of the whole table, such as these, tell which is better."
    )
