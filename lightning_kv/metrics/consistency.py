"""How much frames look like those before them: consistency over time, and at a distance.

High is not always good: a frozen or looping video is the most consistent of all. Read these
numbers beside one that measures motion.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_kv.metrics.base import Reader
from lightning_kv.metrics.features import FeatureMetric, cosine, directions


@dataclass(frozen=True)
class Consistency:
    """What the features of a clip say, frame by frame.

    Args:
        previous: Cosine with the frame before, ``[F]``, negative ones as 0; NaN in the first frame.
        first: Cosine with the anchor frame, likewise.
        value: Mean of the two, ``[F]``; its mean over frames is VBench's score.
    """

    previous: Tensor
    first: Tensor
    value: Tensor


def consistency(features: Tensor, anchor: int = 0) -> Consistency:
    """How like the frame before, and the first one, every frame is (VBench, arXiv 2311.17982).

    Args:
        features: ``[F, d]``, of the frames in order.
        anchor: The frame that ``first`` compares with; VBench's is frame 0.

    Returns:
        The curves, float64.

    Raises:
        ValueError: There is no such anchor, or a feature is zero or not finite.

    Example:
        >>> there_and_back = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> consistency(there_and_back).value.tolist()
        [nan, 0.0, 0.5]
    """
    if features.ndim != 2 or not 0 <= anchor < len(features):
        raise ValueError(
            f"There is no frame {anchor} in features {tuple(features.shape)}. Pass features "
            "[frames, width] and an anchor among the frames."
        )
    features = directions(features)
    unknown = features.new_full((1,), torch.nan)
    steps = cosine(features[1:], features[:-1]).clamp_min(0)
    jumps = cosine(features[1:], features[anchor]).clamp_min(0)
    return Consistency(*(torch.cat([unknown, x]) for x in (steps, jumps, (steps + jumps) / 2)))


def lag_coherence(features: Tensor, lag: int) -> Tensor:
    """Cosine of every frame with the one ``lag`` frames earlier.

    Its mean over frames is the mean over all pairs at that distance.

    Args:
        features: ``[F, d]``, of the frames in order.
        lag: Distance in frames, at least 1.

    Returns:
        float64 ``[F]``; NaN in the first ``lag`` frames.

    Raises:
        ValueError: The lag is below 1, or a feature is zero or not finite.

    Example:
        >>> turning = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> lag_coherence(turning, 2).tolist()
        [nan, nan, -1.0]
    """
    _check_lag(lag)
    features = directions(features)
    unknown = features.new_full((min(lag, len(features)),), torch.nan)
    return torch.cat([unknown, cosine(features[lag:], features[:-lag])])


class _Consistency(FeatureMetric):
    """VBench's formula, a few frames at a time."""

    unit = ""
    higher_is_better = True
    recipe = (
        "mean over frames after the context of 1/2 [max(0, cos(previous)) + max(0, cos(first))], "
        "where first is the first frame shown, of the context if there is one; a frozen video is "
        "1, so read it beside a measure of motion"
    )

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
    """Whether the subject stays the same: VBench's formula on DINO; see :func:`consistency`.

    Example:
        >>> from lightning_kv.metrics.base import Clip
        >>> colour = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> red, green = torch.eye(3)[:2].view(2, 3, 1, 1).expand(2, 3, 8, 8)
        >>> metric = SubjectConsistency(colour)
        >>> metric.curve(Clip(pixels=torch.stack([red, green, red]))).tolist()
        [nan, 0.0, 0.5]
        >>> metric.name
        'subject_consistency/sequential'
    """

    name = "subject_consistency"
    backbones = ("dino-vitb16", "dinov2-vitb14", "panorama-encoder")


class BackgroundConsistency(_Consistency):
    """Whether the scene stays the same: VBench's formula on CLIP; see :func:`consistency`.

    Example:
        >>> from lightning_kv.metrics.base import Clip
        >>> colour = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> BackgroundConsistency(colour).curve(Clip(pixels=torch.ones(2, 3, 8, 8)))[1].item()
        1.0
    """

    name = "background_consistency"
    backbones = ("clip-vit-b32", "panorama-encoder")


class LagCoherence(FeatureMetric):
    """How like frames are that lie far apart; see :func:`lag_coherence`.

    Args:
        backbone: As for every :class:`FeatureMetric`.
        lag: Distance in pixel frames, at least 1; it is part of the recipe.
        kwargs: As for every :class:`FeatureMetric`.

    Raises:
        ValueError: The lag is below 1, or the backbone does not fit.

    Example:
        >>> from lightning_kv.metrics.base import Clip
        >>> colour = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> metric = LagCoherence(colour, lag=2)
        >>> metric.curve(Clip(pixels=torch.ones(3, 3, 8, 8))).round(decimals=6).tolist()
        [nan, nan, 1.0]
    """

    name = "lag_coherence"
    unit = ""
    higher_is_better = True
    recipe = (
        "mean over frames after the context of the cosine with the frame {lag} pixel frames "
        "earlier, of the context too; a frozen video is 1, so read it beside a measure of motion"
    )
    backbones = ("dinov2-vitb14", "dino-vitb16", "clip-vit-b32", "panorama-encoder")

    def __init__(self, backbone: Any = None, lag: int = 20, **kwargs: Any) -> None:
        _check_lag(lag)
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
        >>> from lightning_kv.metrics.base import Clip
        >>> colour = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> grey = torch.full((2, 3, 8, 8), 0.5)
        >>> clip = Clip(pixels=grey, reference_pixels=grey / 2)
        >>> FeatureSimilarity(colour).curve(clip).round(decimals=6).tolist()
        [1.0, 1.0]
    """

    name = "semantic_similarity"
    unit = ""
    higher_is_better = True
    recipe = (
        "against the reference: mean over frames after the context of the cosine of the "
        "features of both at the same time"
    )
    needs = ("pixels", "reference_pixels")
    identical = 1.0
    backbones = ("dino-vitb16", "dinov2-vitb14", "clip-vit-b32", "panorama-encoder")

    def reader(self, prompt: str | None = None, fps: float | None = None) -> Reader:
        """Cosine of every frame with that of the reference."""

        def read(pixels: Tensor, reference: Tensor | None) -> Tensor:
            if reference is None:
                raise ValueError(
                    f"The metric '{self.name}' compares with a reference, and there is none. "
                    "Pass the pixels of the reference rollout, or leave the metric out."
                )
            blocks = (pixels, reference)
            return cosine(*(directions(self.backbone.features(block)) for block in blocks))

        return read


def _check_lag(lag: int) -> None:
    if lag < 1:
        raise ValueError(
            f"A lag is a distance to an earlier frame: {lag} was given. Pass 1 or more frames."
        )
