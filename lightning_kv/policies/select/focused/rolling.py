"""Focused reading where several chunks are in flight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.host import upload
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.checks import between
from lightning_kv.policies.focus import final_frames, shared
from lightning_kv.policies.scored import top_units
from lightning_kv.policies.select.focused.chunkwise import Focused
from lightning_kv.policies.statistics import earliest


@dataclass(frozen=True)
class FocusedRolling(Focused):
    """Focused reading where several chunks are in flight, at different noise levels.

    Focused Forcing (arXiv 2605.18346), the form for rolling-window models. What may be read is what
    shares a reach with the query, and while denoising the first held frames. A denoising query
    frame reads the best of these, itself, and the frames with the highest attention, shared between
    the other held frames and the other frames in flight in proportion to their numbers. A commit
    pass follows the rule for chunk-wise models, standardised over its own frames too.

    Ours: the release knows a reach of exactly 21 frames; here a short video selects from what there
    is, a budget beyond the reach widens it, and a head that may read all there is reads all.

    Args:
        denoise_start: First chunk whose denoising passes select.
        commit_start: First chunk whose commit pass selects.
        reach: Frames that attention spans, first frames and query included; None for all held.
    """

    name: ClassVar[str] = "focused-rolling"
    attention_weight: float = 0.46
    standardise: str = "all"
    denoise_start: int = 2
    commit_start: int = 6
    reach: int | None = 21

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0, None, "denoise_start", "commit_start")
        if self.reach is not None:
            between(self, 1, None, "reach")
        fixed = {"score": "logit", "per_query_frame": True, "refresh": "pass", "start": "budget"}
        for name, only in fixed.items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no meaning for a focused-rolling "
                    f"selection, which ranks frames in flight too. Use {name}: {only}."
                )

    def pick(self, view: PassView, state: Any) -> Selection | None:
        """One rule for denoising, another for the commit pass; all in reach before they start."""
        denoise = view.step.phase == "denoise"
        first = self.denoise_start if denoise else self.commit_start
        if not len(view) or self.budget is None or view.step.chunk < first:
            read = self._reached(view)
            return None if len(read) == len(view.frames) else Selection(frames=read)
        if denoise:
            return self._denoise(view, state)
        return Selection(frames=self.choose([view], state)[0])

    def fits(self, view: CacheView) -> bool:
        """What is out of reach is left out whatever the budget."""
        return False

    def sizes(self, view: CacheView) -> Tensor:
        """No rows where a frame is out of reach."""
        return super().sizes(view) * self.near(view).unsqueeze(1)

    def near(self, view: CacheView) -> Tensor:
        """What is in reach, bool ``[1, F]``."""
        read = self._reached(view)
        return upload([f in read for f in view.frames], view.query, torch.bool).unsqueeze(0)

    def _reached(self, view: CacheView) -> tuple[int, ...]:
        """Frames that share the reach with the query; while denoising, the first ones too."""
        if self.reach is None:
            return view.frames
        rows = None if self.budget is None else self.rows(view)
        most = max(rows) // view.geometry.tokens + final_frames(view) if rows else 0
        first = self.anchors if view.step.phase == "denoise" else 0
        room = max(0, max(self.reach, most) - view.query_frames - first)
        return tuple(
            f for f in view.frames if f >= view.step.start - room or f in view.frames[:first]
        )

    def _denoise(self, view: PassView, state: Any) -> Selection:
        scores, flight = self.attention(view, state, flight=True), view.query_frames
        held = self.there(view).unsqueeze(1).expand(len(scores), -1, -1)
        past = held.shape[-1]
        anchor = self.protected(view, scores[..., :past])
        middle = held & ~earliest(held, self.anchors)  # the first frames have had their turn
        now = torch.ones_like(scores[..., past:], dtype=torch.bool)
        itself = torch.eye(flight, dtype=torch.bool, device=scores.device).expand_as(now)
        may, first = self._frames(view), anchor.sum(-1, keepdim=True)
        need = (may - first - 1).clamp_min(0)
        from_middle, from_tail = shared(need, middle.sum(-1, keepdim=True), flight - 1)
        size = (middle | anchor).expand(-1, flight, -1).long()
        frames = top_units(scores[..., :past], (from_middle + first)[..., 0], anchor, size)
        current = top_units(scores[..., past:], (from_tail + 1)[..., 0], itself, now.long())
        every = may >= held.sum(-1, keepdim=True) + flight  # a head that may read all
        return Selection(frames=frames | (every & held), current=current | every)

    def _frames(self, view: PassView) -> Tensor:
        """The budget in frames, those that become final next included, int64 ``[1 or H, 1, 1]``."""
        rows = self.rows(view)
        if rows is None:
            raise ValueError(
                f"The budget part {self.budget.name!r} depends on scores, which a focused-rolling "
                "selection splits between two regions. Use uniform, table or importance."
            )
        frames = [own // view.geometry.tokens + final_frames(view) for own in rows]
        return upload(frames, view.query, torch.int64).view(-1, 1, 1)
