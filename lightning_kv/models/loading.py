"""Models by name: presets, building, and the embedded model's weights in and out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_kv.models.codec import PatchCodec, PhraseEncoder
from lightning_kv.models.wan import CausalWan, WanConfig

WEIGHTS = Path(__file__).parent.parent / "weights"

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
        train_horizon=72,
        latent_size=(4, 4),
        timesteps=(1000.0, 750.0, 500.0, 250.0),
    ),
    "wan-1.3b": WanConfig(dim=1536, ffn_dim=8960, layers=30, heads=12),
    "wan-14b": WanConfig(dim=5120, ffn_dim=13824, layers=40, heads=40),
}


@dataclass
class EmbeddedModel:
    """A network with everything needed to go from a prompt to pixels.

    Args:
        network: The diffusion transformer.
        codec: Latents to pixels and back.
        encoder: Prompts to text states.
    """

    network: CausalWan
    codec: PatchCodec
    encoder: PhraseEncoder


def save_embedded(path: Path, model: EmbeddedModel, metadata: dict[str, str]) -> None:
    """Write network (float16), codec and text table (float32) into one safetensors file."""
    tensors = {f"network.{k}": v.half() for k, v in model.network.state_dict().items()}
    for name in ("codec", "encoder"):
        tensors |= {f"{name}.{k}": v for k, v in getattr(model, name).state_dict().items()}
    config = json.dumps(model.network.config.to_dict())
    phrases = json.dumps(list(model.encoder.phrases))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, {"config": config, "phrases": phrases, **metadata})
