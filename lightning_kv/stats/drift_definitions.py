"""How a score changes from the start of a rollout to its end, by every definition in use.

All functions read the curve of one score of one clip, of which high is good: a sequence of numbers,
None or NaN where a frame does not count. Missing values are left out, so "the first 15 %" are the
first 15 % of the values that count; only the slope and the times know where they were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

Curve = Sequence["float | None"] | np.ndarray
"""Values of the frames of one clip, None or NaN where a frame does not count."""

SHARE = 15  # per cent of the values that are the start, and the end
SECONDS = 5.0  # of the windows of the quality drift
PARTS = 10  # of a curve, for the drift error

NOISE_FLOOR = 2 / math.sqrt(math.pi)
"""Mean of |a - b| for a and b normal with deviation 1: what no drift at all looks like."""


class NotComputable(ValueError):
    """A curve has no drift of this definition."""


def start_end(curve: Curve) -> float:
    """Mean of the first 15 % of the values minus that of the last 15 %; positive where it fell.

    Its absolute value is the drift of FramePack (arXiv 2504.12626). A part has the number of
    values rounded down, and at least one.

    Raises:
        NotComputable: Fewer than two values count.

    Example:
        >>> round(start_end([0.8, 0.7, None, 0.5, 0.6]), 3)
        0.2
    """
    first, last = _ends(curve)
    return float(first.mean() - last.mean())


def start_end_corrected(curve: Curve) -> float:
    """``|start_end|`` minus what it comes to on average where there is noise and no drift.

    If both means have an error of deviation s, their absolute difference is 1.1284 s on average.
    Here s is the standard error of the two means, pooled, frames taken as independent: where
    neighbours are alike it is too small. The result is negative where the contrast is less than
    noise makes it, so that without drift clips average to zero.

    Raises:
        NotComputable: A part has fewer than two values, so the noise is unknown.

    Example:
        >>> noisy = [0.5, 0.7] * 20
        >>> round(abs(start_end(noisy)), 4), round(start_end_corrected(noisy), 4)
        (0.0, -0.0505)
    """
    first, last = _ends(curve)
    if len(first) < 2:
        raise NotComputable(
            f"The noise of a start of {len(first)} value is unknown. "
            f"Pass a curve of at least {math.ceil(200 / SHARE)} values."
        )
    variance = (first.var(ddof=1) + last.var(ddof=1)) / 2 / len(first)
    return float(abs(first.mean() - last.mean()) - NOISE_FLOOR * math.sqrt(variance))


def quality_drift(curve: Curve, fps: float, seconds: float = SECONDS) -> float:
    """Mean of the first 5 seconds minus that of the last 5; positive where it fell.

    The definition of Rolling Forcing (arXiv 2509.25161), on windows that share no value.

    Args:
        curve: Of a score.
        fps: Values of the curve per second.
        seconds: Length of a window.

    Raises:
        NotComputable: The clip is shorter than two windows.

    Example:
        >>> quality_drift([1.0] * 5 + [0.5] * 6, fps=1)
        0.5
    """
    values = _values(curve)
    width = max(1, round(seconds * checked_rate(fps)))
    if len(values) < 2 * width:
        raise NotComputable(
            f"{len(values)} values at {fps:g} per second hold no two windows of {seconds:g} s. "
            f"Pass a clip of at least {2 * seconds:g} s."
        )
    return float(values[:width].mean() - values[-width:].mean())


def theil_sen(curve: Curve, fps: float, level: float = 0.95) -> tuple[float, float, float]:
    """Median of the slopes between all pairs of values, per second, and its interval.

    Theil (1950) and Sen (1968), the interval from Kendall's tau: one bad frame moves neither.
    Negative where the score falls.

    Args:
        curve: Of a score.
        fps: Values of the curve per second, missing ones included.
        level: Of the interval.

    Returns:
        Slope, lower and upper end.

    Raises:
        NotComputable: Fewer than three values count, or they are too few for the level.

    Example:
        >>> slope, low, high = theil_sen([1.0, 0.9, None, 0.7, 0.6, 0.5], fps=2)
        >>> round(slope, 6)
        -0.2
    """
    from scipy.stats import theilslopes

    values = _values(curve)
    if len(values) < 3:
        raise NotComputable(
            f"A slope with an interval needs three values, and {len(values)} count. "
            "Pass a longer curve."
        )
    found = theilslopes(values, _times(curve, fps), alpha=level)
    ends = float(found.slope), float(found.low_slope), float(found.high_slope)
    if not all(math.isfinite(end) for end in ends):
        raise NotComputable(
            f"{len(values)} values are too few for an interval of {level:.0%}. Pass a longer curve."
        )
    return ends


def windowed_minimum(curve: Curve, fps: float, seconds: float = 1.0) -> float:
    """Lowest mean of any so many seconds in a row.

    Args:
        curve: Of a score.
        fps: Values of the curve per second.
        seconds: Length of a window; one value at least.

    Raises:
        NotComputable: The clip is shorter than a window.

    Example:
        >>> windowed_minimum([1.0, 0.2, 0.4, 1.0], fps=2)
        0.30000000000000004
    """
    values = _values(curve)
    width = max(1, round(seconds * checked_rate(fps)))
    if len(values) < width:
        raise NotComputable(
            f"{len(values)} values at {fps:g} per second hold no window of {seconds:g} s. "
            "Pass a longer clip or a shorter window."
        )
    return float(np.lib.stride_tricks.sliding_window_view(values, width).mean(1).min())


def time_to_fraction(curve: Curve, fps: float, fraction: float = 0.9) -> float:
    """Seconds until a value is below a fraction of the start, counted from the first that counts.

    Args:
        curve: Of a score.
        fps: Values of the curve per second, missing ones included.
        fraction: Of the mean of the first 15 % of the values.

    Raises:
        NotComputable: It never falls so low, or the start is not positive.

    Example:
        >>> time_to_fraction([None, 1.0, 0.95, 0.92, 0.8, 0.95], fps=2)
        1.5
    """
    first, _ = _ends(curve)
    start = float(first.mean())
    if start <= 0:
        raise NotComputable(
            f"A fraction of a start of {start:g} says nothing. Pass a score that starts positive."
        )
    times = _times(curve, fps)
    below = np.flatnonzero(_values(curve) < fraction * start)
    if not len(below):
        raise NotComputable(
            f"It never falls below {fraction:g} of its start, {start:g}. "
            "Pass a longer curve or a larger fraction."
        )
    return float(times[below[0]] - times[0])


def vde(parts: Sequence[float], weights: Literal["linear", "log", "late"] = "linear") -> float:
    """Video drift error: weighted sum of |m_i - m_1| / m_1 over the parts after the first.

    BlockVid (arXiv 2511.22973) has N = 10 equal parts and the weights N - i + 1 (``linear``) or
    log(N - i + 1) (``log``), which fall with time: a collapse of the last part counts once, or not
    at all. ``late`` weighs part i with i - 1, and divides by the sum of the weights.

    Args:
        parts: Means m_1 to m_N of the score in equal parts of the clip.
        weights: Which weights.

    Raises:
        NotComputable: There is one part, or the first mean is not positive.
        ValueError: There are no such weights.

    Example:
        >>> [round(vde([1, 0.9, 0.8], weights), 4) for weights in ("linear", "log", "late")]
        [0.4, 0.0693, 0.1667]
    """
    means = np.asarray(parts, dtype=np.float64)
    if len(means) < 2 or not means[0] > 0:
        raise NotComputable(
            f"The drift error of {len(means)} parts, the first {means[:1].tolist()}, is not "
            "defined. Pass at least two, the first positive."
        )
    falling = np.arange(len(means) - 1, 0, -1.0)
    if weights not in ("linear", "log", "late"):
        raise ValueError(f"There are no weights '{weights}'. Pass 'linear', 'log' or 'late'.")
    if weights == "late":
        weight = falling[::-1] / falling.sum()
    else:
        weight = falling if weights == "linear" else np.log(falling)
    return float((weight * np.abs(means[1:] - means[0])).sum() / means[0])


def equal_parts(curve: Curve, parts: int = PARTS) -> list[float]:
    """Means of equal parts of a curve; where that does not come out even, early ones are longer.

    Raises:
        NotComputable: There are fewer values than parts.

    Example:
        >>> equal_parts([1.0, 3.0, None, 5.0], parts=2)
        [2.0, 5.0]
    """
    values = _values(curve)
    if len(values) < parts:
        raise NotComputable(
            f"{len(values)} values cannot be cut into {parts} parts. Pass at least {parts}."
        )
    return [float(part.mean()) for part in np.array_split(values, parts)]


def prefix_curve(curve: Curve, step: int = 50) -> list[float]:
    """Means of the first 50 values, the first 100, and so on; the last is of all of them.

    That last one is what others call terminal drift. It is the mean of the clip, so it dilutes the
    end: nine good parts at 0.7 and a collapsed one at 0.3 read 0.66.

    Raises:
        NotComputable: No value counts.

    Example:
        >>> [round(mean, 2) for mean in prefix_curve([0.7] * 90 + [0.3] * 10, step=50)]
        [0.7, 0.66]
    """
    values = _values(curve)
    if not len(values):
        raise NotComputable("No value of the curve counts. Pass a curve with numbers in it.")
    sums = values.cumsum()
    counts = [*range(step, len(values), step), len(values)]
    return [float(sums[count - 1] / count) for count in counts]


def _array(curve: Curve) -> np.ndarray:
    """All values in float64, NaN where one is missing."""
    if isinstance(curve, np.ndarray):
        return curve.astype(np.float64)
    return np.array([math.nan if value is None else value for value in curve], dtype=np.float64)


def _values(curve: Curve) -> np.ndarray:
    """The values that count.

    Raises:
        ValueError: One of them is infinite.
    """
    values = _array(curve)
    if np.isinf(values).any():
        raise ValueError(
            f"A curve must be finite: value {int(np.isinf(values).argmax())} is infinite. "
            "Pass None where a frame does not count."
        )
    return values[~np.isnan(values)]


def _times(curve: Curve, fps: float) -> np.ndarray:
    """Seconds of the values that count."""
    return np.flatnonzero(~np.isnan(_array(curve))) / checked_rate(fps)


def _ends(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last 15 % of the values that count."""
    values = _values(curve)
    if len(values) < 2:
        raise NotComputable(
            f"A start and an end need two values, and {len(values)} count. Pass a longer curve."
        )
    width = max(1, len(values) * SHARE // 100)
    return values[:width], values[-width:]


def checked_rate(fps: float) -> float:
    """The rate.

    Raises:
        ValueError: It is not positive and finite.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"A curve has no {fps} values per second. Pass a positive rate.")
    return float(fps)
