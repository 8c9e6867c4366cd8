"""What happens beside the measuring: records, videos, traces, progress, policies while training.

All but the last hang on the ordinary batch hooks, and read ``outputs["clips"]`` of the step.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_kv.tasks.callbacks.curves import CurveWriter
    from lightning_kv.tasks.callbacks.policy_evaluation import PolicyEvaluation
    from lightning_kv.tasks.callbacks.progress import (
        CalibrationProgressBar,
        FrameProgressBar,
        RolloutProgressBar,
        TrainingProgressBar,
    )
    from lightning_kv.tasks.callbacks.proof import ProofWriter, ScorerProofWriter
    from lightning_kv.tasks.callbacks.records import RecordWriter
    from lightning_kv.tasks.callbacks.traces import TraceWriter
    from lightning_kv.tasks.callbacks.videos import ComparisonVideos, PairVideos

_HOMES = {
    "CalibrationProgressBar": "progress",
    "ComparisonVideos": "videos",
    "CurveWriter": "curves",
    "FrameProgressBar": "progress",
    "PairVideos": "videos",
    "PolicyEvaluation": "policy_evaluation",
    "ProofWriter": "proof",
    "RecordWriter": "records",
    "RolloutProgressBar": "progress",
    "ScorerProofWriter": "proof",
    "TraceWriter": "traces",
    "TrainingProgressBar": "progress",
}

__all__ = [
    "CalibrationProgressBar",
    "ComparisonVideos",
    "CurveWriter",
    "FrameProgressBar",
    "PairVideos",
    "PolicyEvaluation",
    "ProofWriter",
    "RecordWriter",
    "RolloutProgressBar",
    "ScorerProofWriter",
    "TraceWriter",
    "TrainingProgressBar",
]


def __getattr__(name: str) -> Any:
    """Load what is asked for: a training needs one progress bar, and none of the metrics."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
