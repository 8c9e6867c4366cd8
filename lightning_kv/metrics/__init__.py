"""Metrics of a clip, each a torchmetrics metric with one exact recipe, and statistics."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from lightning_kv.metrics.base import Clip, ClipMetric, clip_value
from lightning_kv.metrics.fidelity import PSNR, SSIM, LatentMSE
from lightning_kv.metrics.panorama import (
    CameraRule,
    Recall,
    RecallFar,
    RevisitError,
    RulerError,
    Scene,
)

METRICS: dict[str, type[ClipMetric]] = {
    metric.name: metric
    for metric in (
        PSNR,
        SSIM,
        LatentMSE,
        RevisitError,
        Recall,
        RecallFar,
        RulerError,
        CameraRule,
    )
}
"""Every metric of a clip, by its name in results."""

__all__ = ["METRICS", "Clip", "ClipMetric", "Scene", "clip_value", "metric_by_name"]


def metric_by_name(names: Iterable[str]) -> dict[str, ClipMetric]:
    """A fresh metric for each name, in the order given.

    Raises:
        ValueError: A name is unknown.

    Example:
        >>> {name: metric.unit for name, metric in metric_by_name(["psnr", "recall"]).items()}
        {'psnr': 'dB', 'recall': 'share'}
    """
    names = list(names)
    for name in names:
        if name not in METRICS:
            nearest = get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"There is no metric '{name}'; {', '.join(names)} were asked for. "
                f"Did you mean '{nearest}'? There are: {', '.join(METRICS)}."
            )
    return {name: METRICS[name]() for name in names}
