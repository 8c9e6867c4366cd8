"""Read the set of frames that together tells the queries most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.rotary import wide
from lightning_kv.cache.table import summed
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.base import SelectPart
from lightning_kv.policies.checks import between
from lightning_kv.policies.focus import pooled_attention, remembered
from lightning_kv.policies.part import Preset
from lightning_kv.policies.statistics import earliest, standardised


@dataclass(frozen=True)
class Hfs(SelectPart):
    """Read the set of frames that together tells the queries most.

    HFS, holistic query-aware frame selection (arXiv 2512.11534), chooses frames of a video for a
    language model by a set-level objective that it learns. This is that objective without learning,
    greedy: the relevance of the frames read, plus how well they cover the history, minus how much
    they repeat each other.

    Ours: all of it; HFS is no cache policy. Relevance is Focused Forcing's attention between pooled
    tokens, standardised over the history. Frames are compared by their mean key, as the queries
    meet it. The first choice is the best of the first frames, as Focused Forcing's anchor.

    Args:
        coverage: Weight of ``sum over history frames of the cosine to the nearest one read``.
        redundancy: Weight of ``sum over pairs that are read of their cosine, if positive``.
        groups: Token groups per frame that are pooled; one for each row of the grid where None.
        mean_share: Of the pooling: the share of the mean, the rest is the maximum.
        per_query_frame: Choose for each query frame; once for the whole chunk otherwise.
        anchors: First held frames, among which the first choice falls; 0 for no such limit.
    """

    name: ClassVar[str] = "hfs"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "hfs",
            "Keep everything, read a set that is looked at, covers the history and repeats little.",
            "HFS (training-free adaptation), arXiv 2512.11534",
            ("reads",),
            {"select": {"part": "hfs", "budget": "9f"}},
            "no cache policy: frames chosen by a trained network, to understand videos",
        ),
    )
    coverage: float = 0.5
    redundancy: float = 0.5
    groups: int | None = None
    mean_share: float = 0.5
    per_query_frame: bool = True
    anchors: int = 3
    refresh: str = "pass"

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0, None, "coverage", "redundancy", "anchors")
        between(self, 0, 1, "mean_share")
        if self.groups is not None:
            between(self, 1, None, "groups")

    @property
    def comparable(self) -> bool:
        """Ranks mean nothing to another head."""
        return False

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """There are no more groups than tokens."""
        if self.groups is not None:
            between(self, 1, geometry.tokens, "groups")

    def scores(self, view: PassView, state: Any) -> Tensor:
        """Minus the place in the order of choice, ``[H, Q, F]``: a smaller set begins a larger."""
        how = self.groups, self.mean_share, self.per_query_frame
        there = view.present.unsqueeze(1)
        relevance = standardised(pooled_attention(view, state, *how), there)
        alike = remembered("alike", view, state, key_cosines)
        first = earliest(there, self.anchors) if self.anchors else there
        each = [
            self._order(x, alike, there[:, 0], first[:, 0], self.most(view))
            for x in relevance.unbind(1)
        ]
        return torch.stack(each, 1)

    def _order(
        self, relevance: Tensor, alike: Tensor, there: Tensor, first: Tensor, most: int
    ) -> Tensor:
        """The greedy choice of one query frame, from ``[H, F]`` and ``[H, F, F]``."""
        heads, frames = relevance.shape
        may, found = there.expand(heads, -1), torch.full_like(relevance, -frames - 1.0)
        covered = torch.full_like(relevance, -1.0)  # less than any cosine: nothing is read yet
        repeated = torch.zeros_like(relevance)
        for turn in range(most):
            more = (alike - covered.unsqueeze(1)).clamp_min(0) * there.unsqueeze(1)
            gain = relevance + self.coverage * more.sum(2) - self.redundancy * repeated
            allowed = may & first if turn == 0 else may
            index = gain.masked_fill(~allowed, -torch.inf).argmax(1, keepdim=True)
            chosen = (torch.arange(frames, device=index.device) == index) & allowed
            row = alike.gather(1, index.unsqueeze(2).expand(-1, -1, frames))[:, 0]
            found, may = found.masked_fill(chosen, -float(turn)), may & ~chosen
            covered, repeated = torch.maximum(covered, row), repeated + row.clamp_min(0)
        return found


def key_cosines(view: CacheView) -> Tensor:
    """Cosines between the mean keys of held frames, ``[H, F, F]``; counts their rows."""
    view.scored += sum(view.lengths)
    bucket = torch.where(view.valid, view.frame_index, -1)
    mean = normalize(summed(wide(view.keys("read")), bucket, len(view.frames)), dim=2)
    return mean @ mean.transpose(1, 2)
