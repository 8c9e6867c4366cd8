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


@dataclass(frozen=True)
class Memory:
    """A scorer that is a memory, and the budgets at which it is looked up.

    A memory cannot be smaller than what its policy protects; at budgets below that the newest
    frames are held. At those between two that are looked up, heads hold what they do at the smaller
    one, and of what they hold at the larger one beside that, the newest.

    Args:
        policy: Whose memory, see :func:`~lightning_kv.calibration.scorers.scorer_of`.
        budgets: The grid of the curves, history frames per head.
        chunk: Frames of a chunk.
        every: It is looked up at every so many frames of the grid, and at its end.
    """

    policy: CachePolicy
    budgets: tuple[int, ...]
    chunk: int
    every: int

    @property
    def looked_up(self) -> tuple[int, ...]:
        """The budgets at which it is looked up."""
        able = [own for own in self.budgets if own >= self.policy.retain.smallest(self.chunk)]
        return tuple(sorted({*able[:: self.every], *able[-1:]}))

    def held(
        self,
        model: VideoModel,
        chunks: Sequence[int],
        key: str,
        prompt: str,
        latents: Tensor,
        progress: Callable[[], None] | None = None,
        **settings: Any,
    ) -> Held:
        """What it would hold when some chunks begin, at every budget of the grid.

        For each budget the clip goes through the model once, a clean pass over each chunk, with all
        heads at that budget; so what was dropped early is missing later, and what a head holds
        depends on what it and the layers below had left.

        Args:
            model: The model.
            chunks: Which.
            key: Of the clip.
            prompt: What the model is told.
            latents: ``[F, C, h, w]`` of the clip, the reference's own.
            progress: Told after every budget that is looked up.
            settings: Of the rollout: seed, latent size, negative, backend.

        Raises:
            ValueError: It merges frames, or holds parts of them.
        """
        given, found = latents[: (max(chunks) + 1) * self.chunk].unsqueeze(0), {}
        for budget in self.looked_up:
            found[budget] = watch = _Watch(chunks)
            rollout(
                model,
                self.policy.budgeted(f"{budget}f"),
                prompt,
                given.shape[1] + self.chunk,
                keys=[key],
                context=given,
                sampler=only_given,
                decode=False,
                watch=watch,
                **settings,
            )
            if progress:
                progress()
        layers = range(model.network.config.layers)
        return {
            chunk: [
                self._filled({b: own.held[chunk][n] for b, own in found.items()}) for n in layers
            ]
            for chunk in chunks
        }

    def _filled(self, found: dict[int, Tensor]) -> Tensor:
        """Of one layer at one chunk, from some budgets to all of the grid, ``[N, H, S]``.

        Args:
            found: By budget, bool ``[H, S]``.
        """
        looked, rows = self.looked_up, []
        for budget in self.budgets:
            below = max((own for own in looked if own <= budget), default=None)
            above = min(own for own in looked if own >= budget)
            held = torch.zeros_like(found[above]) if below is None else found[below]
            more = torch.ones_like(held) if below is None else found[above] & ~held
            newest = more.long().flip(-1).cumsum(-1).flip(-1) <= budget - (below or 0)
            rows.append(held | (more & newest))
        return torch.stack(rows)


def only_given(
    plan: ChunkPlan, timesteps: tuple[float, ...], noise: Noise, context: Tensor | None
) -> Steps:
    """A sampler that makes nothing: clean passes over what is given."""
    yield from prefill(plan, context)
