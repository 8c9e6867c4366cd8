"""Read the frames that the queries look at and that are unlike the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.base import SelectPart
from lightning_kv.policies.checks import between, choice
from lightning_kv.policies.part import Preset
from lightning_kv.policies.statistics import (
    diversity,
    earliest,
    pooled_keys,
    pooled_logits,
    standardised,
)

SCORES = ("logit", "lse", "mass")
WINDOW = 21  # frames: the window whose filling starts the paper's selection


@dataclass(frozen=True)
class Focused(SelectPart):
    """Read the frames that the queries look at and that are unlike the rest.

    Focused Forcing (arXiv 2605.18346), the form for chunk-wise models: per head and query frame,
    ``λ · attention + (1 - λ) · diversity``, both standardised over the history. The best of the
    first frames (the anchor) and the current chunk are always read.

    Args:
        score: What attention means: the ``logit`` between pooled tokens (the paper's, cheap), the
            log-sum-exp of all logits of a frame (``lse``) or its softmax ``mass`` (both meet every
            key once more, see ``kv_scored_fraction``).
        attention_weight: λ, from 0 (only diversity) to 1 (only attention).
        groups: Token groups per frame that are pooled; one for each row of the grid where None.
        mean_share: Of the pooling: the share of the mean, the rest is the maximum.
        per_query_frame: Choose for each query frame; once for the whole chunk otherwise.
        anchors: First held frames, the best of which is always read; 0 for none.
        start: ``budget`` starts when the history exceeds the budget; ``paper`` when a window of 21
            frames is full; a number at that chunk. Before it, everything is read.
    """

    name: ClassVar[str] = "focused"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "focused-forcing",
            "Keep everything, read what is looked at and diverse, per head and query frame.",
            "Focused Forcing, arXiv 2605.18346",
            ("reads",),
            {"select": {"part": "focused", "budget": "9f"}},
        ),
    )
    score: str = "logit"
    attention_weight: float = 0.5
    groups: int | None = None
    mean_share: float = 0.5
    per_query_frame: bool = True
    anchors: int = 3
    start: str | int = "budget"
    refresh: str = "pass"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, score=SCORES)
        between(self, 0, 1, "attention_weight", "mean_share")
        between(self, 0, None, "anchors")
        if self.groups is not None:
            between(self, 1, None, "groups")
        if isinstance(self.start, str) and self.start not in ("budget", "paper"):
            raise ValueError(
                f"A focused selection cannot start at {self.start!r}. "
                "Give budget, paper, or the number of a chunk."
            )
        if not isinstance(self.start, str):
            between(self, 0, None, "start")

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """There are no more groups than tokens."""
        if self.groups is not None:
            between(self, 1, geometry.tokens, "groups")

    def pick(self, view: PassView, state: Any) -> Selection | None:
        """Everything before the start; the shared flow from there on."""
        chunk = view.geometry.chunk or view.query_frames
        first = {"budget": 0, "paper": WINDOW // chunk - 1}.get(self.start, self.start)
        return None if view.step.chunk < first else super().pick(view, state)

    def scores(self, view: PassView, state: Any) -> Tensor:
        """``[H, Q, F]``; what depends on the history alone is found once for it."""
        present, weight = view.present.unsqueeze(1), self.attention_weight
        total = torch.zeros(1, 1, 1, device=view.device)
        if weight > 0:
            total = total + weight * standardised(self.attention(view, state), present)
        if weight < 1:
            total = total + (1 - weight) * self.remembered(
                "diversity",
                view,
                state,
                lambda own: standardised(diversity(own).unsqueeze(1), present),
            )
        return total

    def attention(self, view: PassView, state: Any) -> Tensor:
        """How much the queries look at each frame, ``[H, 1 or Q, F]``."""
        if self.score == "lse":
            return view.frame_logits(self.per_query_frame)
        if self.score == "mass":
            return view.by_frame(view.attention(self.per_query_frame)[0])
        keys = self.remembered(
            "pooled", view, state, lambda own: pooled_keys(own, self.groups, self.mean_share)
        )
        each = self.per_query_frame
        view.scored += keys.shape[0] * keys.shape[1] * (view.query_frames if each else 1)
        return pooled_logits(view, keys, self.groups, self.mean_share, each)

    def remembered(
        self, name: str, view: PassView, state: Any, make: Callable[[PassView], Tensor]
    ) -> Tensor:
        """What was made for this memory, and is made anew when it has changed."""
        stamp, found = state.get((name, view.layer), (None, None))
        if stamp != view.stamp:
            found = make(view)
            state[name, view.layer] = view.stamp, found
        return found

    def protected(self, view: CacheView, scores: Tensor) -> Tensor:
        """The anchor."""
        first = earliest(view.present.unsqueeze(1), self.anchors)
        best = scores.masked_fill(~first, -torch.inf).argmax(-1, keepdim=True)
        return (torch.arange(scores.shape[-1], device=best.device) == best) & first
