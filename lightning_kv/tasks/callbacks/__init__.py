"""What happens beside the measuring: records, videos, traces, progress, policies while training.

All but the last hang on the ordinary batch hooks, and read ``outputs["clips"]`` of the step.
"""

from lightning_kv.tasks.callbacks.policy_evaluation import PolicyEvaluation
from lightning_kv.tasks.callbacks.progress import (
    FrameProgressBar,
    RolloutProgressBar,
    TrainingProgressBar,
)
from lightning_kv.tasks.callbacks.records import RecordWriter
from lightning_kv.tasks.callbacks.traces import TraceWriter
from lightning_kv.tasks.callbacks.videos import ComparisonVideos, PairVideos

__all__ = [
    "ComparisonVideos",
    "FrameProgressBar",
    "PairVideos",
    "PolicyEvaluation",
    "RecordWriter",
    "RolloutProgressBar",
    "TraceWriter",
    "TrainingProgressBar",
]
