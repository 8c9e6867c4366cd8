"""Models by name: presets, building, and the embedded model's weights in and out."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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
    "wan-1.3b": WanConfig(dim=1536, ffn_dim=8960, layers=30, heads=12, short_last=True),
    "wan-14b": WanConfig(dim=5120, ffn_dim=13824, layers=40, heads=40, short_last=True),
}


class Codec(Protocol):
    """Latents to pixels."""

    stride: tuple[int, int]
    """Pixel frames per latent frame (after the first), and pixels per latent row and column."""

    def pixel_frames(self, frames: int) -> int:
        """Pixel frames of so many latent frames."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``[B, F, C, h, w]`` to pixels ``[B, F', 3, H, W]`` in [0, 1]."""
        ...

    def stream(self, latents: Tensor) -> Iterator[Tensor]:
        """The same for one clip ``[F, C, h, w]``, piece by piece ``[n, 3, H, W]``."""
        ...


Encoder = Callable[[list[str]], Tensor]
"""Prompts to text states ``[B, at most text_len, text_dim]``."""


@dataclass
class VideoModel:
    """A network with what is needed to go from a prompt to pixels.

    Args:
        network: The diffusion transformer.
        codec: Latents to pixels; None where only latents are wanted.
        encoder: Prompts to text states.
    """

    network: CausalWan
    codec: Codec | None
    encoder: Encoder


def save_embedded(path: Path, model: VideoModel, metadata: dict[str, str]) -> None:
    """Write network (float16), codec and text table (float32) into one safetensors file."""
    tensors = {f"network.{k}": v.half() for k, v in model.network.state_dict().items()}
    for name in ("codec", "encoder"):
        tensors |= {f"{name}.{k}": v for k, v in getattr(model, name).state_dict().items()}
    config = json.dumps(model.network.config.to_dict())
    phrases = json.dumps(list(model.encoder.phrases))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, {"config": config, "phrases": phrases, **metadata})


def models() -> dict[str, WanConfig]:
    """Model presets by name."""
    return dict(PRESETS)


def build_model(preset: str, device: str = "cpu") -> CausalWan:
    """A network of a preset's size with fresh weights (``device="meta"`` allocates nothing).

    Raises:
        ValueError: Unknown preset.
    """
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"No model {preset!r}.{hint} Known: {', '.join(PRESETS)}.")
    with torch.device(device):
        return CausalWan(PRESETS[preset])


def load_model(name: str = "panorama", device: str | torch.device = "cpu") -> VideoModel:
    """The embedded model by name, or another weights file of its format by path.

    Args:
        name: ``panorama``, or a ``.safetensors`` file written by ``lightning-kv pretrain``.
        device: Where to put it; weights are stored in float16 and used in float32.

    Raises:
        ValueError: Unknown name, or missing, truncated or foreign weights.
    """
    path = Path(name) if name.endswith(".safetensors") else WEIGHTS / f"{name}.safetensors"
    if not name.endswith(".safetensors") and not path.is_file():
        build_model(name, "meta")  # an unknown name is said first
        raise ValueError(
            f"The weights of {name!r} are not in this installation. "
            "Models that ship with weights: "
            f"{', '.join(sorted(p.stem for p in WEIGHTS.glob('*.safetensors'))) or 'none'}."
        )
    tensors, metadata = read_weights(path)
    try:
        config = WanConfig.from_dict(json.loads(metadata["config"]))
        phrases = json.loads(metadata["phrases"])
        network = CausalWan(config)
        parts = {
            prefix: {
                k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(prefix)
            }
            for prefix in ("network", "codec", "encoder")
        }
        network.load_state_dict(parts["network"], strict=True)
        codec = PatchCodec(**parts["codec"])
        encoder = PhraseEncoder(phrases, parts["encoder"]["states"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{path} is no weights file of the embedded model: {error}. "
            "Files written by `lightning-kv pretrain` have the keys network.*, codec.*, encoder.* "
            "and the metadata config and phrases."
        ) from error
    network.float().eval().requires_grad_(False)
    return VideoModel(network.to(device), codec.to(device), encoder.to(device))


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: No such file, or it is truncated or no safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"No weights file {path}. Give an existing .safetensors file.")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path} ({size} bytes) cannot be read as safetensors: {error}. "
            "It may be cut off: copy it again, or train it again with `lightning-kv pretrain`."
        ) from error
