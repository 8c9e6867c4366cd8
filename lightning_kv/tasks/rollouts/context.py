"""From a prompt of the data to what a rollout starts from and what metrics know of its world."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kv.data.datamodule import PromptSample
from lightning_kv.data.panorama import VISIBLE, World, column_tiles, ruler, world_for
from lightning_kv.metrics import Scene
from lightning_kv.models.codec import PatchCodec
from lightning_kv.models.video import Codec


@dataclass(frozen=True)
class Start:
    """Where a clip starts.

    Args:
        sample: Prompt and key.
        scene: What metrics may know of its world; None outside the panorama.
        context: Given latents ``[context_frames, C, 4, 4]``; None in free generation.
        truth: Pixels of the world ``[F, 3, 32, 32]`` for the moving pictures; None without context.
    """

    sample: PromptSample
    scene: Scene | None = None
    context: Tensor | None = None
    truth: Tensor | None = None


def start_of(sample: PromptSample, codec: Codec | None, frames: int, context: int) -> Start:
    """The start of a prompt: in the panorama its world, elsewhere the prompt alone."""
    if isinstance(codec, PatchCodec):
        return panorama_start(sample, codec, frames, context)
    return Start(sample)


def panorama_start(sample: PromptSample, codec: PatchCodec, frames: int, context: int) -> Start:
    """Draw the world of a prompt and look at its first frames.

    Args:
        sample: Prompt and world seed.
        codec: Of the model.
        frames: Latent frames of the clip.
        context: How many of them are given; 0 for free generation, where no truth exists.
    """
    world = world_for(sample.prompt, sample.world_seed)
    codes, rulers = code_latents(world, codec)
    known = context > 0 or world.prompt.start == "left"
    positions = world.positions(frames).to(codes.device) if known else None
    if not context:
        return Start(sample, Scene(codes, rulers, world.prompt.size, positions), None, None)
    pixels = world.render(frames)
    latents = codec.encode(pixels.to(codec.mean.device))
    truth = codec.decode(latents)  # what a perfect model could show: the codec's error is not its
    scene = Scene(codes, rulers, world.prompt.size, positions, truth, latents)
    return Start(sample, scene, latents[:context], pixels)


def code_latents(world: World, codec: PatchCodec) -> tuple[Tensor, Tensor]:
    """Latents of each column code ``[26, C, 3]`` and of the ground per position ``[n, C, 4]``."""
    device = codec.mean.device
    codes = codec.encode(column_tiles(world.prompt.palette).to(device)).squeeze(-1)
    ground = codec.encode(ruler(world.prompt.columns).to(device)).squeeze(-2)  # [C, columns]
    views = ground.unfold(1, VISIBLE, world.prompt.stride)  # [C, n, 4]
    return codes, views.permute(1, 0, 2).contiguous()


def stack_context(starts: list[Start]) -> Tensor | None:
    """Contexts of a batch, ``[B, context_frames, C, 4, 4]``, or None."""
    return None if starts[0].context is None else torch.stack([s.context for s in starts])
