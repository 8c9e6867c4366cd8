"""Drift of a score over a rollout: all definitions at once, against the reference, averaged.

The definitions themselves are in :mod:`lightning_kv.stats.drift_definitions`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_kv.stats.drift_definitions import (
    Curve,
    NotComputable,
    checked_rate,
    equal_parts,
    prefix_curve,
    quality_drift,
    start_end,
    start_end_corrected,
    theil_sen,
    time_to_fraction,
    vde,
    windowed_minimum,
)


@dataclass(frozen=True)
class Drift:
    """Drift of one curve by every definition; None where one cannot be computed.

    Args:
        start_end: See :func:`~lightning_kv.stats.drift_definitions.start_end`, and for the
            others the function of the same name.
        start_end_abs: Its absolute value.
        start_end_corrected: That, less what noise alone makes it.
        quality_drift: Of the first and last 5 seconds.
        slope: By Theil and Sen, per second.
        slope_low: Lower end of its 95 % interval.
        slope_high: Upper end.
        windowed_minimum: Of windows of a second.
        time_to_fraction: Seconds until 90 % of the start.
        vde_linear: Drift error of ten parts.
        vde_log: The same, logarithmic weights.
        vde_late: The same, late and normalised weights.
        terminal: The last value of the prefix curve.
        reasons: Why something is None, by name.
    """

    start_end: float | None = None
    start_end_abs: float | None = None
    start_end_corrected: float | None = None
    quality_drift: float | None = None
    slope: float | None = None
    slope_low: float | None = None
    slope_high: float | None = None
    windowed_minimum: float | None = None
    time_to_fraction: float | None = None
    vde_linear: float | None = None
    vde_log: float | None = None
    vde_late: float | None = None
    terminal: float | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, float | None]:
        """The numbers by name, without the reasons."""
        return {name: getattr(self, name) for name in NAMES}


NAMES = tuple(each.name for each in fields(Drift) if each.name != "reasons")
"""Every definition, by its name in results."""


def drift(curve: Curve, fps: float) -> Drift:
    """Drift of one curve by every definition.

    Args:
        curve: Of a score.
        fps: Values of the curve per second.

    Raises:
        ValueError: The rate is not positive.

    Example:
        >>> found = drift([0.8] * 10 + [0.6] * 10, fps=4)
        >>> round(found.start_end, 3), round(found.vde_late, 3), found.quality_drift
        (0.2, 0.194, None)
        >>> found.reasons["quality_drift"]
        '20 values at 4 per second hold no two windows of 5 s. Pass a clip of at least 10 s.'
    """
    checked_rate(fps)
    definitions: dict[tuple[str, ...], Callable[[], Any]] = {
        ("start_end",): lambda: start_end(curve),
        ("start_end_abs",): lambda: abs(start_end(curve)),
        ("start_end_corrected",): lambda: start_end_corrected(curve),
        ("quality_drift",): lambda: quality_drift(curve, fps),
        ("slope", "slope_low", "slope_high"): lambda: theil_sen(curve, fps),
        ("windowed_minimum",): lambda: windowed_minimum(curve, fps),
        ("time_to_fraction",): lambda: time_to_fraction(curve, fps),
        ("vde_linear",): lambda: vde(equal_parts(curve), "linear"),
        ("vde_log",): lambda: vde(equal_parts(curve), "log"),
        ("vde_late",): lambda: vde(equal_parts(curve), "late"),
        ("terminal",): lambda: prefix_curve(curve)[-1],
    }
    found, reasons = {}, {}
    for names, compute in definitions.items():
        try:
            values = compute()
        except NotComputable as reason:
            reasons |= dict.fromkeys(names, str(reason))
        else:
            found |= zip(names, values if len(names) > 1 else (values,), strict=True)
    return Drift(**found, reasons=reasons)
