"""Is a learned ranking better than those made by hand, on prompts that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightning_kv.stats.bootstrap import expanded_interval, finite, resample_counts
from lightning_kv.stats.comparison import WORTH, prompts_planned
from lightning_kv.stats.inference import deviation
from lightning_kv.stats.proof import ALPHA
from lightning_kv.stats.score_proof import Difference

State = Literal["better", "no better", "undecided"]
RESAMPLES = 2000


@dataclass(frozen=True)
class Quotient:
    """A ratio of two means over the same prompts.

    Args:
        value: None where the lower mean is not above 0.
        low: Lower end of its 95 % interval, by the bootstrap over prompts; None where it has none.
        high: Upper end.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


def quotient(above: Sequence[float], below: Sequence[float], seed: int = 0) -> Quotient:
    """The mean of some values over that of others, one of each per prompt.

    Args:
        above: One number per prompt.
        below: The same prompts, in the same order.
        seed: The same seed gives the same interval.

    Raises:
        ValueError: A value is not finite, or there are not as many of both.

    Example:
        >>> quotient([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
        Quotient(value=0.5, low=0.5, high=0.5)
        >>> quotient([1.0, 2.0], [0.0, 0.0])
        Quotient(value=None, low=None, high=None)
    """
    x, y = finite(above), finite(below)
    if len(x) != len(y):
        raise ValueError(
            f"Means cannot be compared over the same prompts: there are {len(x)} and {len(y)} "
            "values. Pass one of each per prompt."
        )
    if not len(x) or y.mean() <= 0:
        return Quotient(None)
    value = float(x.mean() / y.mean())
    if len(x) < 2:
        return Quotient(value)
    counts = resample_counts(len(x), RESAMPLES, seed)
    lower = counts @ y
    if (lower <= 0).any():
        return Quotient(value)
    low, high = expanded_interval(counts @ x / lower, len(x))
    return Quotient(value, float(low), float(high))


def gap_closed(
    own: Sequence[float], best: Sequence[float], bound: Sequence[float], seed: int = 0
) -> Quotient:
    """The share of the way from the best of others to a bound that is gone, ratio of means.

    Args:
        own: What is judged, one number per prompt; whether more is better does not matter.
        best: The best of the others.
        bound: What nobody can be better than.
        seed: As in :func:`quotient`.

    Example:
        >>> gap_closed([0.9, 0.9], [0.7, 0.7], [1.0, 1.0]).value.__round__(6)
        0.666667
    """
    x, y, z = finite(own), finite(best), finite(bound)
    sign = 1.0 if z.mean() >= y.mean() else -1.0
    return quotient(sign * (x - y), sign * (z - y), seed)


def state_of(found: Difference, adjusted: float, gap: Quotient) -> State:
    """What a comparison with the best of others says.

    Args:
        found: The comparison.
        adjusted: Its p value.
        gap: Of it; a tenth that is excluded is no gain worth having.
    """
    if adjusted <= ALPHA:
        return "better" if found.gain > 0 else "no better"
    if gap.high is not None and gap.high < WORTH:
        return "no better"
    return "undecided"


def prompts_that_show(differences: Sequence[float], fewest: int) -> int | None:
    """Prompts on which such differences would be seen, if they go on so; None where none would do.

    Args:
        differences: One number per prompt; above 0 is better.
        fewest: That a test needs, whatever the effect.

    Example:
        >>> prompts_that_show([0.1, 0.3, 0.2, 0.0], 7), prompts_that_show([-0.1, 0.0], 7)
        (8, None)
    """
    data = finite(differences)
    if not len(data) or data.mean() <= 0:
        return None
    spread = deviation(data)
    planned = prompts_planned(spread, float(data.mean())) + 2 if spread else 2
    return max(planned, fewest)


def mean_of_worst(above: Sequence[float], below: Sequence[float], share: float) -> float | None:
    """Mean of the highest ratios, of one at least; None where there are none.

    >>> mean_of_worst([1.0, 2.0, 3.0], [2.0, 2.0, 0.0], 0.5)
    1.0
    """
    x, y = finite(above), finite(below)
    ratios = np.sort(x[y > 0] / y[y > 0])
    return float(ratios[-math.ceil(share * len(ratios)) :].mean()) if len(ratios) else None
