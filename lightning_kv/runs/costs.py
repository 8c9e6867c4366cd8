"""What a policy costs, from its records: the only place where bytes, rows and seconds are joined.

Bytes at their peak are the largest of all clips; seconds are those of all chunks of all clips.
Whatever is a mean is one over units, see :mod:`lightning_kv.runs.units`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

import numpy as np

from lightning_kv.runs.directory import Record
from lightning_kv.runs.units import Clips, Value, mean_of, unit_means

MEANS = ("kv_bytes_mean", "kv_read_fraction", "kv_scored_fraction", "kv_kept_fraction")
"""Costs of a clip that are averaged; the last is unknown to older records."""


def policy_cost(clips: Sequence[Record], reference: Sequence[Record]) -> dict[str, float | None]:
    """Bytes, rows and seconds of one policy; speed against the reference on the same clips.

    Args:
        clips: Records of the policy.
        reference: Records of the reference.
    """
    chunks = seconds_of(clips)
    common = {clip["key"] for clip in clips} & {clip["key"] for clip in reference}
    own, other = (
        percentile(seconds_of(clip for clip in side if clip["key"] in common), 50)
        for side in (clips, reference)
    )
    peaks = (clip["cost"]["kv_bytes_peak"] for clip in clips)
    return {
        "kv_bytes_peak": max((peak for peak in peaks if peak is not None), default=None),
        **{name: mean_of([*unit_means(clips, cost_of(name)).values()]) for name in MEANS},
        "seconds_per_chunk_p50": percentile(chunks, 50),
        "seconds_per_chunk_p95": percentile(chunks, 95),
        "speedup": other / own if own and other else None,
    }


def cost_by_unit(own: Clips, axis: str) -> dict[str, float]:
    """What a policy cost on each prompt, where that differs between prompts; else nothing.

    A peak is the largest of all clips, so it is one number.

    Args:
        own: Records of the policy.
        axis: Name of a cost of :func:`policy_cost`.
    """
    if axis == "kv_bytes_peak":
        return {}
    if axis == "seconds_per_chunk_p50":
        return unit_means(own.values(), lambda clip: percentile(seconds_of([clip]), 50))
    return unit_means(own.values(), cost_of(axis))


def chunk_medians(clips: Iterable[Record]) -> list[float | None]:
    """Median over clips of the seconds of every chunk; empty where none are known."""
    each = (clip["cost"].get("seconds_per_chunk") or () for clip in clips)
    return [
        percentile([second for second in chunk if second is not None], 50)
        for chunk in zip_longest(*each)
    ]


def cost_of(name: str) -> Value:
    """Reads a cost off a record."""
    return lambda clip: clip["cost"].get(name)


def seconds_of(clips: Iterable[Record]) -> list[float]:
    """Seconds of every chunk of every clip."""
    every = (second for clip in clips for second in clip["cost"]["seconds_per_chunk"] or ())
    return [second for second in every if second is not None]


def percentile(values: Sequence[float], share: float) -> float | None:
    """A percentile; None without values."""
    return float(np.percentile(values, share)) if values else None
