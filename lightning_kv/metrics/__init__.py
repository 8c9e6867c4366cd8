"""Metrics of clips and of sets of clips, each with one exact recipe, as torchmetrics has them.

Classes here, functions in :mod:`lightning_kv.metrics.functional`. A metric of clips takes
``update(preds, target=None, *, prompts, fps, ids, units)``, one of sets ``update(videos, real)``.
"""

from __future__ import annotations

from lightning_kv.metrics import functional
from lightning_kv.metrics.aesthetic import (
    AestheticQuality,
)
from lightning_kv.metrics.alignment import (
    TextAlignment,
)
from lightning_kv.metrics.base import (
    ClipMetric,
    VideoMetric,
)
from lightning_kv.metrics.consistency import (
    BackgroundConsistency,
    FeatureSimilarity,
    LagCoherence,
    SubjectConsistency,
)
from lightning_kv.metrics.dynamics import (
    DynamicDegree,
    FlowMagnitude,
    MotionSmoothness,
)
from lightning_kv.metrics.fidelity import (
    MSSSIM,
    PSNR,
    SSIM,
    IdenticalFrames,
    PSNRMean,
)
from lightning_kv.metrics.imaging import (
    Brightness,
    Colourfulness,
    Contrast,
    ImagingQuality,
    Saturation,
    Sharpness,
)
from lightning_kv.metrics.latents import (
    DivergenceOnset,
    LatentCosine,
    LatentMetric,
    LatentMSE,
    LatentRelative,
    LatentShift,
    LatentSNR,
)
from lightning_kv.metrics.mechanism import (
    AttentionError,
    AttentionMetric,
    RetainedMass,
)
from lightning_kv.metrics.motion import (
    FrameChange,
    TemporalFlicker,
)
from lightning_kv.metrics.panorama import (
    CameraRule,
    Recall,
    RecallFar,
    RevisitError,
    RulerError,
    Scene,
    WorldMetric,
)
from lightning_kv.metrics.perceptual import (
    LPIPS,
)
from lightning_kv.metrics.sets import (
    FrechetVideoDistance,
    JEDi,
    SetMetric,
    SetResult,
    VideoKernelDistance,
    check_comparable,
)
from lightning_kv.metrics.suite import (
    METRICS,
    SETS,
    Choice,
    Suite,
    metric_by_name,
    set_metric,
)

__all__ = [
    "AestheticQuality",
    "AttentionError",
    "AttentionMetric",
    "BackgroundConsistency",
    "Brightness",
    "CameraRule",
    "Choice",
    "ClipMetric",
    "Colourfulness",
    "Contrast",
    "DivergenceOnset",
    "DynamicDegree",
    "FeatureSimilarity",
    "FlowMagnitude",
    "FrameChange",
    "FrechetVideoDistance",
    "IdenticalFrames",
    "ImagingQuality",
    "JEDi",
    "LPIPS",
    "LagCoherence",
    "LatentCosine",
    "LatentMSE",
    "LatentMetric",
    "LatentRelative",
    "LatentSNR",
    "LatentShift",
    "METRICS",
    "MSSSIM",
    "MotionSmoothness",
    "PSNR",
    "PSNRMean",
    "Recall",
    "RecallFar",
    "RetainedMass",
    "RevisitError",
    "RulerError",
    "SETS",
    "SSIM",
    "Saturation",
    "Scene",
    "SetMetric",
    "SetResult",
    "Sharpness",
    "SubjectConsistency",
    "Suite",
    "TemporalFlicker",
    "TextAlignment",
    "VideoKernelDistance",
    "VideoMetric",
    "WorldMetric",
    "check_comparable",
    "functional",
    "metric_by_name",
    "set_metric",
]
