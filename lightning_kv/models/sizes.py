"""The sizes that causal Wan comes in, by name."""

from __future__ import annotations

import math

import torch

from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.utilities.nearest import unknown

PRESETS: dict[str, WanConfig] = {
    "panorama": WanConfig(
        dim=96,
        ffn_dim=288,
        layers=6,
        heads=4,
        patch=(1, 1, 1),
        text_dim=25,
        text_len=4,
        rope_theta=(1000.0, 50.0, 50.0),
        prediction="x0",
        short_last=False,
        train_horizon=72,
        latent_size=(4, 4),
        stride=(1, 8),
        fps=8,
        timesteps=(1000.0, 750.0, 500.0, 250.0),
    ),
    "wan-1.3b": WanConfig(dim=1536, ffn_dim=8960, layers=30, heads=12),
    "wan-14b": WanConfig(dim=5120, ffn_dim=13824, layers=40, heads=40),
}


def models() -> dict[str, WanConfig]:
    """Model presets by name."""
    return dict(PRESETS)


def build_model(preset: str, device: str = "cpu") -> CausalWan:
    """A network of a preset's size with fresh weights (``device="meta"`` allocates nothing).

    Raises:
        ValueError: Unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(unknown("model", preset, PRESETS))
    with torch.device(device):
        return CausalWan(PRESETS[preset])


def parameters(config: WanConfig) -> int:
    """Number of weights of a network, counted without making one: that takes seconds."""

    def linear(inner: int, outer: int) -> int:
        return outer * (inner + 1)

    dim, patch = config.dim, math.prod(config.patch) * config.channels
    attention = 4 * linear(dim, dim) + 2 * dim  # of which a block has two
    mlp = linear(dim, config.ffn_dim) + linear(config.ffn_dim, dim)
    block = 2 * attention + mlp + (2 + 6) * dim  # a norm with bias, and the modulation
    embeddings = linear(config.text_dim, dim) + linear(config.freq_dim, dim) + 2 * linear(dim, dim)
    ends = linear(patch, dim) + linear(dim, patch) + 2 * dim
    return config.layers * block + embeddings + linear(dim, 6 * dim) + ends
