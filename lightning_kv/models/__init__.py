"""What generates: causal Wan at any size, samplers, checkpoints in and out."""

from lightning_kv.models.loading import load_model
from lightning_kv.models.sizes import build_model, models
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig

__all__ = ["CausalWan", "VideoModel", "WanConfig", "build_model", "load_model", "models"]
