"""How sure are we: intervals and percentiles over clips."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap


def bca_interval(
    values: Sequence[float], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """Confidence interval of the mean by the BCa bootstrap (Efron, 1987).

    Args:
        values: One finite number per clip; clips are independent.
        level: Chance that the interval holds the true mean, between 0 and 1.
        resamples: Number of bootstrap samples.
        seed: The same seed gives the same interval.

    Returns:
        Lower and upper end. ``(v, v)`` where all values are v; None for fewer than two values.

    Raises:
        ValueError: A value is not finite, or the level is not between 0 and 1.

    Example:
        >>> low, high = bca_interval([1.0, 2.0, 3.0, 4.0, 5.0])
        >>> low < 3.0 < high
        True
        >>> bca_interval([2.0, 2.0, 2.0])
        (2.0, 2.0)
        >>> bca_interval([2.0]) is None
        True
    """
    data = _finite(values)
    if not 0 < level < 1:
        raise ValueError(
            f"A confidence level of {level} makes no interval. Pass a number between 0 and 1, "
            "such as 0.95."
        )
    if len(data) < 2:
        return None
    start, span = data.min(), np.ptp(data)
    if span == 0:
        return float(start), float(start)
    # The mean scales with its data, the cubes inside BCa underflow: bring them to [0, 1].
    result = bootstrap(
        ((data - start) / span,),
        np.mean,
        n_resamples=resamples,
        confidence_level=level,
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return float(start + span * low), float(start + span * high)


def paired_interval(
    a: Sequence[float],
    b: Sequence[float],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Confidence interval of the mean of ``a - b``, clip by clip; see :func:`bca_interval`.

    Args:
        a: One number per clip.
        b: The same clips, in the same order.
        level: As in :func:`bca_interval`.
        resamples: As in :func:`bca_interval`.
        seed: As in :func:`bca_interval`.

    Raises:
        ValueError: The lengths differ, or a value is not finite.

    Example:
        >>> paired_interval([2.0, 4.0, 9.0], [1.0, 3.0, 8.0])
        (1.0, 1.0)
    """
    if len(a) != len(b):
        raise ValueError(
            f"Values cannot be paired: there are {len(a)} and {len(b)}. "
            "Pass the same clips in the same order on both sides."
        )
    return bca_interval(_finite(a) - _finite(b), level, resamples, seed)


def confidence_below(
    values: Sequence[float], bound: float, resamples: int = 10_000, seed: int = 0
) -> float | None:
    """How sure it is that the mean lies at or below a bound: a one-sided bootstrap over clips.

    The share of resampled sets of clips whose mean does, and never more than :func:`ceiling`: a
    few clips that happen to agree are no proof.

    Args:
        values: One finite number per clip, such as the loss against the reference.
        bound: In the unit of the values.
        resamples: Number of bootstrap samples.
        seed: The same seed gives the same confidence.

    Returns:
        Between 0 and 1; None without values.

    Raises:
        ValueError: A value is not finite.

    Example:
        >>> confidence_below([0.0] * 4, 0.02), confidence_below([1.0] * 4, 0.02)
        (0.9375, 0.0)
    """
    data = _finite(values)
    if not len(data):
        return None
    rng = np.random.default_rng(seed)
    means = data[rng.integers(0, len(data), (resamples, len(data)))].mean(1)
    rounding = 1e-12 * max(1.0, float(np.abs(data).max()))
    share = float((means <= bound + rounding).mean())
    return min(share, ceiling(len(data)))


def ceiling(clips: int) -> float:
    """The most confidence that so many clips can give, ``1 - 0.5**n``.

    If half of all clips lay above a bound, n clips in a row would still all lie below it with a
    chance of ``0.5**n`` (the sign test). So 95 % need 5 clips or more.

    >>> [ceiling(n) for n in (0, 1, 4, 5)]
    [0.0, 0.5, 0.9375, 0.96875]
    """
    return 1 - 0.5**clips


def _finite(values: Sequence[float]) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if not np.isfinite(data).all():
        raise ValueError(
            f"Statistics need finite numbers, but {int((~np.isfinite(data)).sum())} of "
            f"{data.size} are not. Leave out the clips that have no value."
        )
    return data
