"""Latents on disk: a rollout now, its pixels later."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lightning_kv.models.embedded import read_weights
from lightning_kv.report.records import replacing

SUFFIX = ".safetensors"


def write_clip(path: Path, latents: Tensor, fps: float, about: dict[str, str]) -> None:
    """Write one clip's latents; a whole file or none.

    Args:
        path: File to write.
        latents: ``[F, C, h, w]``, in the dtype that they keep.
        fps: Pixel frames per second.
        about: What it is: prompt, model, policy, seed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file({"latents": latents.cpu().contiguous()}, temporary, {"fps": f"{fps:g}", **about})


def read_clip(path: Path) -> tuple[Tensor, dict[str, str]]:
    """Latents ``[F, C, h, w]`` of a clip, and what it is.

    Raises:
        ValueError: No such file, a damaged one, or one of something else.
    """
    tensors, about = read_weights(path)
    latents = tensors.get("latents")
    if set(tensors) != {"latents"} or latents.ndim != 4 or "fps" not in about:
        raise ValueError(
            f"{path} holds no latents of a clip: it has {', '.join(sorted(tensors)[:4])}. "
            f"Give a file that `lightning-kv generate ... -o clip{SUFFIX}` or "
            "`lightning-kv evaluate --latents true` wrote."
        )
    return latents, about
