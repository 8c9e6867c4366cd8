"""What a run is about, dealt out to ranks: prompts and their rollouts, videos, pairs of videos."""

from lightning_kv.data.datamodule.distribution import balanced, dealt, dealt_by_bytes
from lightning_kv.data.datamodule.pairs import PIECE, VideoPairDataModule
from lightning_kv.data.datamodule.prompts import (
    PromptDataModule,
    RolloutItem,
    each_sample,
    in_batches,
)
from lightning_kv.data.datamodule.videos import VideoDataModule
from lightning_kv.data.shards import PromptSample
from lightning_kv.data.video_clips import VideoClip

__all__ = [
    "PIECE",
    "PromptDataModule",
    "PromptSample",
    "RolloutItem",
    "VideoClip",
    "VideoDataModule",
    "VideoPairDataModule",
    "balanced",
    "dealt",
    "dealt_by_bytes",
    "each_sample",
    "in_batches",
]
