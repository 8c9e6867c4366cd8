"""A network small enough for a probe in every coordinate."""

import torch

from lightning_kv.models.wan import WanConfig

TINY = WanConfig(
    dim=48,
    ffn_dim=48,
    layers=3,
    heads=2,
    channels=1,
    text_dim=10,
    text_len=7,
    latent_size=(2, 6),
    train_horizon=21,
    timesteps=(1000.0, 600.0),
)


def encoder(prompts):
    return (
        10 * torch.randn(len(prompts), 3, 10, generator=torch.Generator().manual_seed(3)).double()
    )
