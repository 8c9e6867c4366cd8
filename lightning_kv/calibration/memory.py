"""What the memory of a policy would hold at each budget, had it seen the reference's own clip.

Shapes: L layers, H heads, N budgets, S frames before a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.passes import CONDITIONAL
from lightning_kv.cache.view import PassView
from lightning_kv.models.samplers import ChunkPlan, Noise, Steps, prefill
from lightning_kv.models.video import VideoModel
from lightning_kv.policies.base import CachePolicy
from lightning_kv.rollout import rollout

Held = dict[int, list[Tensor]]
"""By chunk, of each layer the frames that heads hold, bool ``[N, H, S]``."""


@dataclass
class _Watch:
    """Notes which frames each head holds when a chunk begins: ``rollout(..., watch=...)``.

    Args:
        chunks: Which.

    Attributes:
        held: By chunk, of each layer bool ``[H, S]``.
    """

    chunks: Sequence[int]
    held: Held = field(default_factory=dict)

    def __call__(self, view: PassView) -> None:
        """Note it, if this pass is over such a chunk."""
        step = view.step
        if step.chunk in self.chunks and step.namespace == CONDITIONAL and not step.rebuild:
            self.held.setdefault(step.chunk, []).append(frames_held(view))


def frames_held(view: PassView) -> Tensor:
    """The frames that each head holds of all before the pass, bool ``[H, S]``.

    Raises:
        ValueError: What is held is not whole frames as they were made.
    """
    frame, tokens = view.frame_id.long().expand(view.heads, -1), view.geometry.tokens
    there = view.valid.expand_as(frame)
    count = torch.zeros(view.heads, view.step.start, dtype=torch.int64, device=frame.device)
    count.scatter_add_(1, frame, there.long())
    plain = (view.weight == 1) & (view.read_time == view.frame_id)
    if bool(((count > 0) & (count < tokens)).any()) or not bool((plain | ~there).all()):
        raise ValueError(
            f"The memory of a scorer does not hold whole frames as they were made in layer "
            f"{view.layer} before chunk {view.step.chunk}: it merged rows, moved them or keeps "
            "parts of frames. Use a scorer that keeps or drops whole frames, such as snap-kv."
        )
    return count > 0


def held_by(
    model: VideoModel,
    policy: CachePolicy,
    budgets: Sequence[int],
    chunks: Sequence[int],
    key: str,
    prompt: str,
    latents: Tensor,
    progress: Callable[[], None] | None = None,
    **settings: Any,
) -> Held:
    """What a policy would hold when some chunks begin, at every budget.

    For each budget the clip goes through the model once, a clean pass over each chunk, with all
    heads at that budget; so what was dropped early is missing later, and what a head holds depends
    on what it and the layers below had left. A memory cannot be smaller than what its policy
    protects; at budgets below that the newest frames are held.

    Args:
        model: The model.
        policy: Whose memory, see :func:`~lightning_kv.calibration.scorers.scorer_of`.
        budgets: History frames per head.
        chunks: Which.
        key: Of the clip.
        prompt: What the model is told.
        latents: ``[F, C, h, w]`` of the clip, the reference's own.
        progress: Told after every budget.
        settings: Of the rollout: seed, latent size, negative, backend.

    Raises:
        ValueError: It merges frames, or holds parts of them.
    """
    chunk, last = model.network.config.chunk, max(chunks)
    given = latents[: (last + 1) * chunk].unsqueeze(0)
    least, found = policy.retain.smallest(chunk), []
    for budget in budgets:
        if budget < least:
            found.append({own: newest_frames(model, budget, own * chunk) for own in chunks})
        else:
            watch = _Watch(chunks)
            rollout(
                model,
                policy.budgeted(f"{budget}f"),
                prompt,
                given.shape[1] + chunk,
                keys=[key],
                context=given,
                sampler=only_given,
                decode=False,
                watch=watch,
                **settings,
            )
            found.append(watch.held)
        if progress:
            progress()
    return {
        own: [torch.stack(x) for x in zip(*(f[own] for f in found), strict=True)] for own in chunks
    }


def only_given(
    plan: ChunkPlan, timesteps: tuple[float, ...], noise: Noise, context: Tensor | None
) -> Steps:
    """A sampler that makes nothing: clean passes over what is given."""
    yield from prefill(plan, context)


def newest_frames(model: VideoModel, budget: int, frames: int) -> list[Tensor]:
    """The last of so many frames, alike in every layer and head, ``[H, S]`` of each layer."""
    config = model.network.config
    new = torch.arange(frames, device=next(model.network.parameters()).device) >= frames - budget
    return [new.expand(config.heads, -1)] * config.layers
