"""Latents on disk: a rollout now, its pixels later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lightning_kv.models.embedded import read_weights
from lightning_kv.utilities.files import replacing

SUFFIX = ".safetensors"


def write_latents(path: Path, latents: Tensor, fps: float, about: dict[str, str]) -> None:
    """Write one clip's latents; a whole file or none.

    Args:
        path: File to write.
        latents: ``[F, C, h, w]``, in the dtype that they keep.
        fps: Pixel frames per second.
        about: What it is: prompt, model, policy, seed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        # one entry, because several have no fixed order in a file
        words = json.dumps({"fps": fps, **about})
        save_file({"latents": latents.cpu().contiguous()}, temporary, {"about": words})


def read_latents(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Latents ``[F, C, h, w]`` of a clip, and what it is.

    Raises:
        ValueError: No such file, a damaged one, or one of something else.
    """
    tensors, metadata = read_weights(path)
    latents = tensors.get("latents")
    about = _about(metadata)
    if set(tensors) != {"latents"} or latents.ndim != 4 or about is None:
        raise ValueError(
            f"{path} holds no latents of a clip: it has {', '.join(sorted(tensors)[:4])}. "
            f"Give a file that `lightning-kv generate ... -o clip{SUFFIX}` or "
            "`lightning-kv evaluate --latents true` wrote."
        )
    if not bool(latents.isfinite().all()):
        first = int((~latents.isfinite()).flatten(1).any(1).float().argmax())
        raise ValueError(
            f"The latents in {path} are not finite from frame {first} on: the rollout broke down. "
            "Generate them again, under another policy or budget."
        )
    return latents, about


def _about(metadata: dict[str, str]) -> dict[str, Any] | None:
    """What a clip is; None where a file does not say."""
    try:
        about = json.loads(metadata["about"])
        return about if about["fps"] > 0 and isinstance(about["model"], str) else None
    except (KeyError, TypeError, ValueError):
        return None
