"""How much frames look like those before them: consistency over time, and at a distance.

High is not always good: a frozen or looping video is the most consistent of all. Read these
numbers beside one that measures motion.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from lightning_kv.metrics.base import Reader
from lightning_kv.metrics.features import FeatureMetric
from lightning_kv.metrics.functional.consistency import (
    check_lag,
    consistency,
    cosine,
    directions,
    lag_coherence,
    similarity,
)


class _Consistency(FeatureMetric):
    """VBench's formula, a few frames at a time."""

    unit = ""
    higher_is_better = True
    recipe = (
        "mean over frames after the context of 1/2 [max(0, cos(previous)) + max(0, cos(first))], "
        "where first is the first frame shown, of the context if there is one; a frozen video is "
        "1, so read it beside a measure of motion"
    )
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """Consistency of every frame; NaN in the first."""
        kept: list[Tensor] = []  # features of the first frame and of the last one shown

        def read(pixels: Tensor, reference: Tensor | None) -> Tensor:
            features = directions(self.backbone.features(pixels))
            if not kept:
                kept[:] = [features[0], features[-1]]
                return consistency(features).value
            first, last = kept
            before = torch.cat([last[None], features[:-1]])
            kept[1] = features[-1]
            pair = (cosine(features, other).clamp_min(0) for other in (before, first))
            return sum(pair) / 2

        return read


class SubjectConsistency(_Consistency):
    """Whether the subject stays the same: VBench's formula on DINO.

    See :func:`~lightning_kv.metrics.functional.consistency`.

    Example:
        >>> colour = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> red, green = torch.eye(3)[:2].view(2, 3, 1, 1).expand(2, 3, 8, 8)
        >>> metric = SubjectConsistency(colour)
        >>> metric.curve(torch.stack([red, green, red])).tolist()
        [nan, 0.0, 0.5]
        >>> metric.name
        'subject_consistency/sequential'
    """

    name = "subject_consistency"
    backbones = ("dino-vitb16", "dinov2-vitb14", "panorama-encoder")


class BackgroundConsistency(_Consistency):
    """Whether the scene stays the same: VBench's formula on CLIP.

    See :func:`~lightning_kv.metrics.functional.consistency`.

    Example:
        >>> colour = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> BackgroundConsistency(colour).curve(torch.ones(2, 3, 8, 8))[1].item()
        1.0
    """

    name = "background_consistency"
    backbones = ("clip-vit-b32", "panorama-encoder")


class LagCoherence(FeatureMetric):
    """How like frames are that lie far apart.

    See :func:`~lightning_kv.metrics.functional.lag_coherence`.

    Args:
        backbone: As for every :class:`FeatureMetric`.
        lag: Distance in pixel frames, at least 1; it is part of the recipe.
        kwargs: As for every :class:`FeatureMetric`.

    Raises:
        ValueError: The lag is below 1, or the backbone does not fit.

    Example:
        >>> colour = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> metric = LagCoherence(colour, lag=2)
        >>> metric.curve(torch.ones(3, 3, 8, 8)).round(decimals=6).tolist()
        [nan, nan, 1.0]
    """

    name = "lag_coherence"
    unit = ""
    higher_is_better = True
    recipe = (
        "mean over frames after the context of the cosine with the frame {lag} pixel frames "
        "earlier, of the context too; a frozen video is 1, so read it beside a measure of motion"
    )
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0
    backbones = ("dinov2-vitb14", "dino-vitb16", "clip-vit-b32", "panorama-encoder")

    def __init__(self, backbone: Any = None, lag: int = 20, **kwargs: Any) -> None:
        check_lag(lag)
        super().__init__(backbone, **kwargs)
        self.lag = lag
        self.recipe = self.recipe.replace("{lag}", str(lag))

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """Cosine of every frame with an earlier one; NaN where there is none."""
        kept: deque[Tensor] = deque(maxlen=self.lag)

        def read(pixels: Tensor, reference: Tensor | None) -> Tensor:
            known = len(kept)
            features = torch.cat([*kept, directions(self.backbone.features(pixels))])
            kept.extend(features[known:].split(1))
            return lag_coherence(features, self.lag)[known:]

        return read


class FeatureSimilarity(FeatureMetric):
    """How like the reference rollout a frame is to a network, at the same time.

    Example:
        >>> colour = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> grey = torch.full((2, 3, 8, 8), 0.5)
        >>> FeatureSimilarity(colour).curve(grey, grey / 2).round(decimals=6).tolist()
        [1.0, 1.0]
    """

    name = "semantic_similarity"
    unit = ""
    higher_is_better = True
    recipe = (
        "against the reference: mean over frames after the context of the cosine of the "
        "features of both at the same time"
    )
    paired = True
    identical = 1.0
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0
    backbones = ("dino-vitb16", "dinov2-vitb14", "clip-vit-b32", "panorama-encoder")

    def frame_values(self, preds: Tensor, target: Tensor | None = None) -> Tensor:
        """Cosine of every frame with that of the reference."""
        return similarity(*(self.backbone.features(block) for block in (preds, target)))
