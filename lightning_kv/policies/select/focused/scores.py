"""How Focused Forcing scores frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.base import SelectPart
from lightning_kv.policies.checks import between, choice
from lightning_kv.policies.focus import pooled_attention, remembered
from lightning_kv.policies.statistics import diversity, earliest, standardised

SCORES = ("logit", "lse", "mass")
OVER = ("history", "all")


def by_importance(most: str) -> dict[str, str]:
    """The published budget: 1 history frame to ``most`` by the authors' head importances."""
    table = "focused-forcing-wan-1.3b"
    return {"part": "importance", "amount": most, "least": "1f", "importance": table}


@dataclass(frozen=True)
class FocusedScores(SelectPart):
    """``λ · attention + (1 - λ) · diversity`` per head and query frame, both standardised.

    Args:
        score: What attention means: the ``logit`` between pooled tokens (the paper's, cheap), the
            log-sum-exp of all logits of a frame (``lse``) or its softmax ``mass`` (both meet every
            key once more, see ``kv_scored_fraction``).
        attention_weight: λ, from 0 (only diversity) to 1 (only attention).
        groups: Token groups per frame that are pooled; one for each row of the grid where None.
        mean_share: Of the pooling: the share of the mean, the rest is the maximum.
        per_query_frame: Choose for each query frame; once for the whole chunk otherwise.
        anchors: First held frames, the best of which is always read; 0 for none.
        standardise: Over the ``history``; or over ``all`` frames, those in flight too, which also
            belong to the average that diversity is measured against, anew in each pass.
    """

    score: str = "logit"
    attention_weight: float = 0.5
    groups: int | None = None
    mean_share: float = 0.5
    per_query_frame: bool = True
    anchors: int = 3
    standardise: str = "history"
    refresh: str = "pass"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, score=SCORES, standardise=OVER)
        between(self, 0, 1, "attention_weight", "mean_share")
        between(self, 0, None, "anchors")
        if self.groups is not None:
            between(self, 1, None, "groups")
        if self.standardise == "all" and self.score != "logit":
            raise ValueError(
                f"standardise='all' with score={self.score!r} does not work: frames in flight are "
                "scored by pooled logits alone. Use score: logit, or standardise: history."
            )

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """There are no more groups than tokens."""
        if self.groups is not None:
            between(self, 1, geometry.tokens, "groups")

    def near(self, view: CacheView) -> Tensor | None:
        """Frames that may be read, bool ``[1, F]``; all that are held where None."""
        return None

    def there(self, view: CacheView) -> Tensor:
        """Frames that a head holds and may read, bool ``[1 or H, F]``."""
        near = self.near(view)
        return view.present if near is None else view.present & near

    def scores(self, view: PassView, state: Any) -> Tensor:
        """``[H, Q, F]``; what depends on the history alone is found once for it."""
        weight, flight = self.attention_weight, self.standardise == "all"
        there, near = self.there(view).unsqueeze(1), self.near(view)
        there = pad(there, (0, view.query_frames), value=True) if flight else there
        own = view.own_keys() if flight else None

        def unlike(view: PassView) -> Tensor:
            return standardised(diversity(view, near, own).unsqueeze(1), there)

        total = torch.zeros(1, 1, 1, device=view.device)
        if weight > 0:
            total = total + weight * standardised(self.attention(view, state, flight), there)
        if weight < 1:
            found = unlike(view) if flight else remembered("diversity", view, state, unlike)
            total = total + (1 - weight) * found
        return total[..., : len(view.frames)]

    def attention(self, view: PassView, state: Any, flight: bool = False) -> Tensor:
        """How much the queries look at each frame, ``[H, 1 or Q, F]``; then at those in flight."""
        each = self.per_query_frame
        if self.score == "lse":
            return view.frame_logits(each)
        if self.score == "mass":
            return view.by_frame(view.attention(each)[0])
        return pooled_attention(view, state, self.groups, self.mean_share, each, flight)

    def protected(self, view: CacheView, scores: Tensor) -> Tensor:
        """The anchor."""
        first = earliest(self.there(view).unsqueeze(1), self.anchors)
        best = scores.masked_fill(~first, -torch.inf).argmax(-1, keepdim=True)
        return (torch.arange(scores.shape[-1], device=best.device) == best) & first
