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
from lightning_kv.policies.focus import final_frames, in_proportion
from lightning_kv.policies.part import Preset
from lightning_kv.policies.select.focused.chunkwise import Focused
from lightning_kv.policies.select.focused.scores import by_importance
from lightning_kv.policies.statistics import earliest


@dataclass(frozen=True)
class FocusedRolling(Focused):
    """Focused reading where several chunks are in flight, at different noise levels.

    Focused Forcing (arXiv 2605.18346), the form for rolling-window models. Read is what shares a
    reach with the query, and while denoising the first held frames. A denoising query frame reads
    the best of these, itself, and what has the highest attention, shared between the other held
    frames and the others in flight by their numbers. A commit follows the chunk-wise rule.

    Ours: the release knows 21 frames in reach, no other number; here a short video selects from
    what there is, a budget beyond it widens the reach, and a head that may read all reads all.

    Args:
        denoise_start: First chunk whose denoising passes select.
        commit_start: First chunk whose commit pass selects.
        reach: Frames that attention spans, first frames and query included; None for all held.
    """

    name: ClassVar[str] = "focused-rolling"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "focused-forcing-paper-rolling",
            "As published for Rolling Forcing: memory and positions as there; read 4 to 12 frames "
            "of history and flight by the importance of the head.",
            "Focused Forcing, arXiv 2605.18346",
            ("memory", "reads"),
            {
                "retain": {"part": "window", "sink": 3, "budget": "21f"},
                "select": {"part": "focused-rolling", "budget": by_importance("9f")},
                "positions": {"part": "sink-lag", "sink": 3, "lag": 21, "to": "end"},
            },
            "reach 21, sink 3; 1f to 9f read beside the chunk that becomes final next",
        ),
    )
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
        """One rule for denoising, another for the commit pass; everything before they start."""
        denoise = view.step.phase == "denoise"
        first = self.denoise_start if denoise else self.commit_start
        if not len(view) or self.budget is None or view.step.chunk < first:
            return None
        frames = None if denoise else self.choose([view], state)[0]
        return self._denoise(view, state) if denoise else Selection(frames=frames)

    def fits(self, view: CacheView) -> bool:
        """What is out of reach is left out whatever the budget."""
        return False

    def sizes(self, view: CacheView) -> Tensor:
        """No rows where a frame is out of reach."""
        near, own = self.near(view), super().sizes(view)
        return own if near is None else own * near.unsqueeze(1)

    def near(self, view: CacheView) -> Tensor | None:
        """What shares the reach with the query; while denoising, the first frames too."""
        if self.reach is None:
            return None
        rows, first = self.rows(view), self.anchors if view.step.phase == "denoise" else 0
        most = max(rows) // view.geometry.tokens + final_frames(view) if rows else 0
        room = max(0, max(self.reach, most) - view.query_frames - first)
        late, early = view.step.start - room, view.frames[:first]
        near = [f >= late or f in early for f in view.frames]
        return upload(near, view.query, torch.bool).unsqueeze(0)

    def _denoise(self, view: PassView, state: Any) -> Selection:
        scores, held = self.attention(view, state, flight=True), self.there(view).unsqueeze(1)
        anchor = self.protected(view, scores[..., : held.shape[-1]])
        middle = held & ~earliest(held, self.anchors)  # the first frames have had their turn
        frames, current = in_proportion(scores, held, anchor, middle, self._frames(view))
        return Selection(frames=frames, current=current)

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
