"""How a rollout leaves its reference over time: distance on a scale, when it starts, how it grows.

Any distance does, such as :func:`lightning_kv.metrics.functional.latent_relative`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_kv.stats.drift_definitions import checked_rate

Values = NDArray[np.float64]

Distances = Sequence["float | None"] | Values
"""Distance of every frame from the reference, None or NaN where a frame does not count."""

ONSET = 0.1  # of the way from the floor to the ceiling
SATURATED = 0.5  # of the largest distance: from there on it no longer grows freely


def calibrated_divergence(distance: Distances, floor: Distances, ceiling: Distances) -> Values:
    """Where a distance lies between no difference and another sample, frame by frame.

    ``D*(t) = (d(t) - floor(t)) / (ceiling(t) - floor(t))``: 0 where the policy cannot be told from
    running the reference again, 1 where it is as far away as another seed.

    Args:
        distance: Of the policy's rollout from the reference.
        floor: Of the reference from itself, run again by another kernel or in another batch.
        ceiling: Of the reference with another seed from the reference.

    Returns:
        float64 ``[F]``; NaN where a frame does not count, or the ceiling is not above the floor,
        as in frames that were given.

    Raises:
        ValueError: The three differ in length.

    Example:
        >>> calibrated_divergence([0.0, 0.5, 1.0], [0.0, 0.25, 0.0], [0.0, 0.75, 1.0]).tolist()
        [nan, 0.5, 1.0]
    """
    curves = [_array(curve) for curve in (distance, floor, ceiling)]
    if len({curve.shape for curve in curves}) != 1:
        raise ValueError(
            "Distance, floor and ceiling differ in length: "
            f"{', '.join(str(len(curve)) for curve in curves)} frames. Pass the same number."
        )
    found, low, high = curves
    room = np.where(high > low, high - low, np.nan)
    return (found - low) / room


def divergence_onset(calibrated: Distances, rate: float, threshold: float = ONSET) -> float | None:
    """Seconds from the first frame until the calibrated divergence first exceeds a threshold.

    Args:
        calibrated: From :func:`calibrated_divergence`.
        rate: Values of the curve per second.
        threshold: What counts as diverged.

    Returns:
        Seconds; None where it never does.

    Raises:
        ValueError: The rate is not positive.

    Example:
        >>> divergence_onset([None, 0.0, 0.05, 0.2, 0.0], rate=4)
        0.75
    """
    checked_rate(rate)
    late = np.flatnonzero(_array(calibrated) > threshold)
    return float(late[0]) / rate if len(late) else None


def growth_rate(distance: Distances, rate: float, saturated: float = SATURATED) -> float | None:
    """Slope of the logarithm of the distance, per second, while it grows freely.

    Least squares over the positive distances up to the first that reaches a share of the largest;
    later ones are near the ceiling, and say nothing about growth. A distance that is multiplied by
    e every second has a rate of 1.

    Args:
        distance: Of the rollout from the reference.
        rate: Values of the curve per second.
        saturated: Share of the largest distance where growth is over, that frame included.

    Returns:
        Rate per second; None where fewer than two frames tell.

    Raises:
        ValueError: The rate is not positive, or the share is not in (0, 1].

    Example:
        >>> round(growth_rate([0.0, 1.0, 2.0, 4.0, 8.0, 8.0, 7.0], rate=1) / math.log(2), 6)
        1.0
    """
    checked_rate(rate)
    if not 0 < saturated <= 1:
        raise ValueError(
            f"Growth is not over at {saturated} of the largest distance. Pass a share above 0, "
            "and 1 at most."
        )
    values = _array(distance)
    places = np.flatnonzero(values > 0)
    if not len(places):
        return None
    positive = values[places]
    end = int(np.argmax(positive >= saturated * positive.max())) + 1
    if end < 2:
        return None
    times, logs = places[:end] / rate, np.log(positive[:end])
    times = times - times.mean()
    return float((times * logs).sum() / (times**2).sum())


def _array(curve: Distances) -> Values:
    """The curve, NaN where a value is missing."""
    return np.array([math.nan if value is None else value for value in curve], dtype=np.float64)
