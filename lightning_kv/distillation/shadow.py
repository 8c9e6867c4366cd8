"""What a cache that drops nothing would have looked at, on latents that another policy led to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from lightning_kv.cache.passes import CONDITIONAL
from lightning_kv.models.samplers import ChunkPlan, Noise, Steps, clean
from lightning_kv.models.video import VideoModel
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.registry import preset
from lightning_kv.rollout import Rollout, rollout


def shadow_tables(
    model: VideoModel,
    latents: Tensor,
    key: str,
    prompt: str,
    record: Mapping[str, Mapping[str, Any]],
    **settings: Any,
) -> dict[str, Any]:
    """Tables of the dense cache that goes with the latents of a clip, however they were made.

    DAgger (arXiv 1011.0686): a student's own rollout is labelled as its teacher would have decided
    there. Every chunk goes through the model once, clean, and reads all chunks before it; so a
    table has one pass for each chunk, which counts as a whole.

    Args:
        model: The model.
        latents: ``[F, C, h, w]`` of the clip.
        key: Of the clip.
        prompt: What the model is told.
        record: Tables to make, by name, with settings. ``queries`` is how many of a chunk are
            asked, where a rollout asks as many in each of its passes.
        settings: Of the rollout that made the clip: seed, events, latent size, negative, backend.

    Returns:
        One table by name.
    """
    made = pushed_through(model, preset("full"), latents, key, prompt, record=record, **settings)
    return {name: own[0] for name, own in made.tables.items()}


def pushed_through(
    model: VideoModel,
    policy: CachePolicy,
    latents: Tensor,
    key: str,
    prompt: str,
    **settings: Any,
) -> Rollout:
    """A rollout that makes nothing: each chunk of a clip goes through the model once, clean.

    Args:
        model: The model.
        policy: What it reads and keeps on the way.
        latents: ``[F, C, h, w]`` of the clip.
        key: Of the clip.
        prompt: What the model is told.
        settings: Of :func:`~lightning_kv.rollout.rollout`.
    """
    like = next(model.network.parameters())
    branches = model.network.config.geometry().branches
    return rollout(
        model,
        policy,
        prompt,
        len(latents),
        keys=[key],
        sampler=partial(_clean_passes, latents=latents.to(like), branches=branches),
        decode=False,
        **settings,
    )


def _clean_passes(
    plan: ChunkPlan,
    timesteps: tuple[float, ...],
    noise: Noise,
    context: Tensor | None,
    latents: Tensor,
    branches: int,
) -> Steps:
    """A sampler that makes nothing: one clean pass over each chunk of what there is."""
    for index in range(plan.count):
        frames = plan.ids(index)
        given = latents[frames[0] : frames[-1] + 1].unsqueeze(0)
        for namespace in (CONDITIONAL, "uncond")[:branches]:
            step = clean("prefill", frames, index, plan.after(index), opens=True)
            yield replace(step, namespace=namespace), given
