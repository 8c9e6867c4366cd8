"""Focused reading where several chunks are in flight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.host import upload
from lightning_kv.cache.view import PassView
from lightning_kv.policies.checks import between
from lightning_kv.policies.scored import top_units
from lightning_kv.policies.select.focused import Focused
from lightning_kv.policies.statistics import earliest, pooled_flight, pooled_logits


@dataclass(frozen=True)
class FocusedRolling(Focused):
    """Focused reading where several chunks are in flight, at different noise levels.

    Focused Forcing (arXiv 2605.18346), the form for rolling-window models. A denoising query frame
    reads the best of the first frames, itself, and the frames with the highest attention, shared
    between held frames and other frames in flight in proportion to their numbers. A commit pass
    follows the rule for chunk-wise models, and reads the last frames in flight.

    Args:
        denoise_start: First chunk whose denoising passes select.
        commit_start: First chunk whose commit pass selects.
    """

    name: ClassVar[str] = "focused-rolling"
    attention_weight: float = 0.46
    denoise_start: int = 2
    commit_start: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0, None, "denoise_start", "commit_start")
        fixed = {"score": "logit", "per_query_frame": True, "refresh": "pass", "start": "budget"}
        for name, only in fixed.items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no meaning for a focused-rolling "
                    f"selection, which ranks frames in flight too. Use {name}: {only}."
                )

    def pick(self, view: PassView, state: Any) -> Selection | None:
        """One rule for denoising, another for the commit pass."""
        denoise = view.step.phase == "denoise"
        first = self.denoise_start if denoise else self.commit_start
        if view.step.chunk < first or self.fits(view):
            return None
        if denoise:
            return self._denoise(view, state)
        frames = self.choose([view], state)[0]
        if frames is None:
            return None
        flight = view.query_frames
        last = torch.arange(flight, device=frames.device) >= flight - own_frames(view)
        return Selection(frames=frames, current=last.view(1, 1, -1))

    def _denoise(self, view: PassView, state: Any) -> Selection:
        scores = torch.cat([self.attention(view, state), self._in_flight(view)], -1)
        held, flight = view.present.unsqueeze(1), view.query_frames
        held = held.expand(len(scores), -1, -1)
        past = held.shape[-1]
        anchor = self.protected(view, scores[..., :past])
        middle = held & ~earliest(held, self.anchors)  # the first frames have had their turn
        now = torch.ones_like(scores[..., past:], dtype=torch.bool)
        itself = torch.eye(flight, dtype=torch.bool, device=scores.device).expand_as(now)
        lengths, first = self._frames(view), anchor.sum(-1, keepdim=True)
        need = (lengths + own_frames(view) - first - 1).clamp_min(0)
        from_middle, from_tail = shared(need, middle.sum(-1, keepdim=True), flight - 1)
        size = (middle | anchor).expand(-1, flight, -1).long()
        frames = top_units(scores[..., :past], (from_middle + first)[..., 0], anchor, size)
        current = top_units(scores[..., past:], (from_tail + 1)[..., 0], itself, now.long())
        fits = lengths >= held.sum(-1, keepdim=True)  # a head that may read all
        return Selection(frames=frames | (fits & held), current=current | fits)

    def _frames(self, view: PassView) -> Tensor:
        """The budget in frames, int64 ``[1 or H, 1, 1]``."""
        rows = self.rows(view)
        if rows is None:
            raise ValueError(
                f"The budget part {self.budget.name!r} depends on scores, which a focused-rolling "
                "selection splits between two regions. Use uniform, table or importance."
            )
        frames = [own // view.geometry.tokens for own in rows]
        return upload(frames, view.query, torch.int64).view(-1, 1, 1)

    def _in_flight(self, view: PassView) -> Tensor:
        """Pooled logits of the query frames against the frames in flight, ``[H, Q, Q]``."""
        key = pooled_flight(view, view.own_keys(), self.groups, self.mean_share)
        return pooled_logits(view, key, self.groups, self.mean_share, True)


def own_frames(view: PassView) -> int:
    """Frames of the chunk that becomes final next; the paper counts them in its budgets."""
    step = view.step
    return len(step.final) or step.next_chunk or view.query_frames


def shared(need: Tensor, middle: Tensor, tail: int) -> tuple[Tensor, Tensor]:
    """Split a need between two regions by their sizes; what one cannot give, the other does."""
    part = (need * middle // (middle + tail).clamp_min(1)).minimum(middle)
    return part, (need - part).clamp_max(tail)
