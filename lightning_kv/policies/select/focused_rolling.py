"""Focused reading where several chunks are in flight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.checks import between
from lightning_kv.policies.scores import pooled_flight, standardised, top_frames
from lightning_kv.policies.select.focused import Focused


@dataclass(frozen=True)
class FocusedRolling(Focused):
    """Focused reading where several chunks are in flight, at different noise levels.

    Focused Forcing (arXiv 2605.18346), the form for rolling-window models. A denoising query frame
    reads the best of the first frames, itself, and the frames with the highest attention, shared
    between held frames and other frames in flight in proportion to their numbers. A commit pass
    follows the rule for chunk-wise models, and reads the last frames in flight.

    Args:
        own: Frames of the own chunk, which come on top of the budget (the paper counts them in).
        denoise_start: First chunk whose denoising passes select.
        commit_start: First chunk whose commit pass selects.
    """

    name: ClassVar[str] = "focused-rolling"
    attention_weight: float = 0.46
    own: int = 3
    denoise_start: int = 2
    commit_start: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 1, None, "own")
        between(self, 0, None, "denoise_start", "commit_start")
        if self.score != "logit":
            raise ValueError(
                f"score={self.score!r} of a focused-rolling selection cannot rank frames in "
                "flight. Use score: logit."
            )

    def pick(self, view: CacheView, state: Any) -> Selection | None:
        """One rule for denoising, another for the commit pass."""
        if self.budget is None or not len(view.frame_ids):
            return None
        if view.step.phase == "denoise":
            return self._denoise(view, state) if view.step.chunk >= self.denoise_start else None
        if view.step.chunk < self.commit_start:
            return None
        frames = self.choose(view, state)
        if frames is None:
            return None
        flight = view.cell.provisional // view.geometry.tokens
        last = torch.arange(flight, device=frames.device) >= flight - self.own
        shape = (view.heads, frames.shape[1], flight)
        return Selection(frames=frames, current=last.expand(shape))

    def _denoise(self, view: CacheView, state: Any) -> Selection | None:
        self.renew(view, state)
        held, flight = view.present.unsqueeze(1), view.query_frames
        scores = torch.cat([self._attention(view, state), self._in_flight(view)], -1)
        now = torch.ones(view.heads, 1, flight, dtype=torch.bool, device=scores.device)
        present = torch.cat([held, now], -1).expand(-1, flight, -1)
        scores = standardised(scores, present)
        past = held.shape[-1]
        itself = torch.eye(flight, dtype=torch.bool, device=scores.device).unsqueeze(0)
        anchor = self.protected(view, scores[..., :past])
        kept = self.budget.lengths(scores, view).unsqueeze(-1) + self.own
        need = (kept - anchor.sum(-1, keepdim=True) - 1).clamp_min(0)
        middle = (held & ~anchor).sum(-1, keepdim=True)
        tail = torch.full_like(middle, flight - 1)
        quota = need * middle // (middle + tail).clamp_min(1)
        quota = torch.maximum(quota, need - tail).minimum(middle)
        rest = (need - quota).minimum(tail)
        frames = top_frames(
            scores[..., :past],
            (quota + anchor.sum(-1, keepdim=True))[..., 0],
            anchor,
            held.expand(-1, flight, -1),
        )
        every = itself | torch.ones_like(scores[..., past:], dtype=torch.bool)
        current = top_frames(scores[..., past:], (rest + 1)[..., 0], itself.expand_as(every), every)
        return Selection(frames=frames, current=current)

    def _in_flight(self, view: CacheView) -> Tensor:
        """Pooled logits of the query frames against the frames in flight, ``[H, Q, Q]``."""
        groups = self.groups or view.geometry.grid[0]
        fresh = torch.empty_like(view.query)
        for group, keys in zip(view.groups, view.read_keys, strict=True):
            fresh[list(group.heads)] = keys[:, len(group) :]
        key = pooled_flight(view, fresh, groups, self.mean_share)
        query = pooled_flight(view, view.query, groups, self.mean_share)
        return query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
