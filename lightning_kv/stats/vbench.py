"""VBench's quality score out of its dimensions (Huang et al., arXiv 2311.17982)."""

from __future__ import annotations

import math
from collections.abc import Mapping

SCALES: dict[str, tuple[float, float, float]] = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
}
"""Lowest and highest score, and weight, of each dimension of quality."""

METRICS = {
    "subject_consistency": "subject_consistency/dino-vitb16",
    "background_consistency": "background_consistency/clip-vit-b32",
    "temporal_flickering": "temporal_flicker",
    "motion_smoothness": "motion_smoothness/amt-s",
    "dynamic_degree": "dynamic_degree/raft-large",
    "aesthetic_quality": "aesthetic_quality/clip-vit-l14",
    "imaging_quality": "imaging_quality/musiq-spaq",
}
"""The metric that computes each dimension on VBench's networks."""


def vbench_quality(scores: Mapping[str, float], flickering: bool = True) -> float:
    """Weighted mean of the dimensions of quality, each on its own scale.

    With seven dimensions it is VBench's quality score. VBench gives prompts of one's own no
    flickering score; the mean of the other six is another number and must not be compared with it.

    Args:
        scores: Score of each dimension in [0, 1], by VBench's name.
        flickering: Whether ``temporal_flickering`` is one of them.

    Raises:
        ValueError: A dimension is missing, none of VBench's, or out of range.

    Example:
        >>> scores = dict.fromkeys(SCALES, 0.95) | {"dynamic_degree": 0.6}
        >>> round(vbench_quality(scores), 4)
        0.8886
    """
    wanted = [name for name in SCALES if flickering or name != "temporal_flickering"]
    missing = [name for name in wanted if name not in scores]
    others = [name for name in scores if name not in wanted]
    if missing or others:
        raise ValueError(
            f"The quality score is a mean of {len(wanted)} dimensions: "
            f"{', '.join(missing) or 'none'} missing, {', '.join(others) or 'none'} too many. "
            f"Pass exactly {', '.join(wanted)}; flickering=False leaves temporal_flickering out."
        )
    broken = {name: scores[name] for name in wanted if not 0 <= scores[name] <= 1}
    if broken:
        raise ValueError(
            f"Scores are out of range: {broken}. Pass shares from 0 to 1; divide percentages by "
            "100."
        )
    terms = [
        weight * (scores[name] - low) / (high - low)
        for name, (low, high, weight) in SCALES.items()
        if name in wanted
    ]
    return math.fsum(terms) / math.fsum(SCALES[name][2] for name in wanted)
