"""Quality against cost: the front, how sure it is, and the distance between two curves.

A point is (quality, cost). Less cost is always better; ``higher_is_better`` speaks of the quality.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from lightning_kv.stats.bootstrap import Array, finite, resample_counts

Point = tuple[float, float]


def front(points: Mapping[str, Point], higher_is_better: bool = True) -> list[str]:
    """Names of the points that no other beats: none is better in one way and as good in the other.

    Equal points do not beat each other, so ties stay.

    Args:
        points: Quality and cost by name.
        higher_is_better: Whether more quality is better.

    Returns:
        From the cheapest to the dearest.

    Raises:
        ValueError: A number is not finite.

    Example:
        >>> front({"full": (1.0, 9.0), "half": (0.9, 4.0), "poor": (0.8, 5.0)})
        ['half', 'full']
    """
    if not points:
        return []
    quality, cost = finite(list(points.values())).T
    on = unbeaten(quality[:, None] if higher_is_better else -quality[:, None], cost[:, None])
    names = [name for name, stays in zip(points, on[:, 0], strict=True) if stays]
    return sorted(names, key=lambda name: points[name][1])


def front_probability(
    values: Mapping[str, Mapping[str, float]],
    costs: Mapping[str, float | Mapping[str, float]],
    higher_is_better: bool = True,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """How often each policy is on the front when the prompts are drawn anew.

    A joint bootstrap: every resample takes the same prompts for all policies, so what prompts have
    in common drops out.

    Args:
        values: Quality by policy and prompt. Prompts that not all policies have are left out.
        costs: By policy: one number, or one for each prompt, which is resampled too.
        higher_is_better: Whether more quality is better.
        resamples: Number of bootstrap samples.
        seed: The same seed gives the same shares.

    Returns:
        Between 0 and 1, by policy.

    Raises:
        ValueError: The policies share no prompt, one has no cost, or a number is not finite.

    Example:
        >>> quality = {"full": {"a": 0.9, "b": 0.8}, "half": {"a": 0.9, "b": 0.7}}
        >>> front_probability(quality, {"full": 2.0, "half": 1.0})["half"]
        1.0
    """
    if not values:
        return {}
    shared = sorted(set.intersection(*(set(own) for own in values.values())))
    if not shared:
        raise ValueError(
            f"The {len(values)} policies share no prompt, so they cannot be compared. "
            "Evaluate them on the same prompts."
        )
    quality = finite([[own[prompt] for prompt in shared] for own in values.values()])
    cost = finite([prices(costs, name, shared) for name in values])
    counts = resample_counts(len(shared), resamples, seed).T / len(shared)
    on = unbeaten((quality if higher_is_better else -quality) @ counts, cost @ counts)
    return dict(zip(values, on.mean(1).tolist(), strict=True))


def prices(
    costs: Mapping[str, float | Mapping[str, float]], name: str, prompts: Sequence[str]
) -> list[float]:
    """A policy's cost for each prompt.

    Raises:
        ValueError: There is none.
    """
    own = costs.get(name)
    found = [own.get(prompt) if isinstance(own, Mapping) else own for prompt in prompts]
    if None in found:
        raise ValueError(
            f"The policy {name!r} has a cost for {len(found) - found.count(None)} of "
            f"{len(found)} prompts. Give one number, or one for each prompt."
        )
    return found


def unbeaten(quality: Array, cost: Array) -> NDArray[np.bool_]:
    """Which points are on the front of their column.

    Args:
        quality: Shape [points, columns], higher is better.
        cost: The same shape.
    """
    # Equal sums round apart; what differs by so little counts as equal.
    more, less = (1e-12 * np.abs(x).max() for x in (quality, cost))
    on = np.empty(quality.shape, dtype=bool)
    for point in range(len(quality)):
        gain, saving = quality - quality[point], cost[point] - cost
        as_good = (gain >= -more) & (saving >= -less)
        on[point] = ~(as_good & ((gain > more) | (saving > less))).any(0)
    return on


def quality_gap(own: Sequence[Point], other: Sequence[Point]) -> float | None:
    """Mean quality of one curve above another's at equal cost.

    Bjontegaard, "Calculation of average PSNR differences between RD-curves", VCEG-M33, 2001, with
    monotone piecewise cubics (PCHIP) in place of one cubic, as in later video coding tests: the
    mean over the logarithm of the cost, where both curves have one.

    Args:
        own: Two or more points, in any order, costs above 0 and no two the same.
        other: Those of the other curve.

    Returns:
        In the unit of the quality, positive where ``own`` lies higher; None where the ranges of
        cost do not overlap.

    Raises:
        ValueError: A curve has fewer than two points, two at one cost, or a cost that is not
            above 0; or a number is not finite.

    Example:
        >>> quality_gap([(0.5, 1.0), (1.0, 4.0)], [(0.25, 1.0), (0.75, 4.0)])
        0.25
    """
    curves = [curve(points) for points in (own, other)]
    low, high = (float(pick(c.x[end] for c in curves)) for pick, end in ((max, 0), (min, -1)))
    if low >= high:
        return None
    first, second = (float(c.integrate(low, high)) / (high - low) for c in curves)
    return first - second


def curve(points: Sequence[Point]) -> PchipInterpolator:
    """Quality over the logarithm of the cost.

    Raises:
        ValueError: The points make no curve.
    """
    costs = [cost for _, cost in points]
    if len(set(costs)) < max(2, len(costs)) or not all(0 < cost < math.inf for cost in costs):
        raise ValueError(
            f"Points at costs of {costs} make no curve. Pass two or more, each at a cost of its "
            "own, above 0; of points at one cost, keep the best."
        )
    quality, cost = finite(sorted(points, key=lambda point: point[1])).T
    return PchipInterpolator(np.log(cost), quality)
