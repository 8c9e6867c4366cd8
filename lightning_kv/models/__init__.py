"""What generates: causal Wan at any size, samplers, checkpoints in and out."""

from lightning_kv.models.loading import VideoModel, build_model, load_model, models
from lightning_kv.models.wan import CausalWan, WanConfig

__all__ = ["CausalWan", "VideoModel", "WanConfig", "build_model", "load_model", "models"]
