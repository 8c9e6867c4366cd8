"""Metrics of clips and of sets of clips, each with one exact recipe; and statistics."""

from __future__ import annotations

from lightning_kv.metrics.base import Clip, ClipMetric, PixelMetric, clip_value
from lightning_kv.metrics.panorama import Scene
from lightning_kv.metrics.suite import METRICS, SETS, Choice, Suite, metric_by_name

__all__ = [
    "METRICS",
    "SETS",
    "Choice",
    "Clip",
    "ClipMetric",
    "PixelMetric",
    "Scene",
    "Suite",
    "clip_value",
    "metric_by_name",
]
