"""The embedded model's weights in and out: network, codec and text table in one file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_kv.models.codec import PatchCodec, PhraseEncoder
from lightning_kv.models.sizes import PRESETS
from lightning_kv.models.video import VideoModel
from lightning_kv.models.wan import CausalWan, WanConfig
from lightning_kv.utilities.files import checksum

WEIGHTS = Path(__file__).parent.parent / "weights"

UNSAID = {"short_last": False, "stride": (1, 8), "fps": 8}
"""What holds for the panorama, and files from before these settings do not say."""


def shipped() -> list[str]:
    """Names of the models whose weights are in this package."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors") if path.stem in PRESETS)


def save_embedded(path: Path, model: VideoModel, metadata: dict[str, str]) -> None:
    """Write network (float16), codec and text table (float32) into one safetensors file."""
    tensors = {f"network.{k}": v.half() for k, v in model.network.state_dict().items()}
    for name in ("codec", "encoder"):
        tensors |= {f"{name}.{k}": v for k, v in getattr(model, name).state_dict().items()}
    config = json.dumps(model.network.config.to_dict())
    phrases = json.dumps(list(model.encoder.phrases))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, {"config": config, "phrases": phrases, **metadata})


def load_embedded(path: Path, device: str | torch.device, precision: str) -> VideoModel:
    """Read what :func:`save_embedded` has written; weights are stored in float16.

    Raises:
        ValueError: Missing, truncated or foreign weights, or an unknown precision.
    """
    tensors, metadata = read_weights(path)
    try:
        config = WanConfig.from_dict(UNSAID | json.loads(metadata["config"]))
        config = replace(config, model=path.stem if path.parent == WEIGHTS else "")
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
    network.cast(precision).eval().requires_grad_(False)
    source = {
        "weights": checksum(path),
        "precision": precision,
    }
    return VideoModel(network.to(device), codec.to(device), encoder.to(device), source)


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
