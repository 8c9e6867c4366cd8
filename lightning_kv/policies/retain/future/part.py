"""Keep what the queries to come will ask for, once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Retention
from lightning_kv.cache.host import upload
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.base import CachePolicy
from lightning_kv.policies.checks import between, choice
from lightning_kv.policies.layout import Layout
from lightning_kv.policies.part import Preset
from lightning_kv.policies.retain.future.expected import Expected, ExpectedPart
from lightning_kv.policies.retain.future.merging import ALIGNS, MERGES, merged, row_pairs
from lightning_kv.policies.retain.future.redundancy import (
    METRICS,
    features,
    frame_distances,
    nearest_newer,
)


@dataclass(frozen=True)
class Future(ExpectedPart):
    """Keep what the queries to come will ask for, once.

    Future Forcing (arXiv 2605.30083). Its equations are not public; this is a reconstruction whose
    defaults were chosen by measurement. At each commit: past queries, before rotation, are turned
    to future times and stand for those to come. Of rows that are alike the older go into the
    youngest, or just go. If that is not enough, rows with the least expected softmax mass are
    dropped. The newest chunk and the sink always stay.

    Args:
        redundancy: What alike means: ``content`` (keys before rotation and values), ``future``
            (logits under the queries to come), ``cosine`` (keys), or None to skip the stage.
        similar: Rows are alike below this squared distance: 0 for equal rows, about 2 for unrelated
            ones.
        neighbourhood: With tokens: how far away in the frame an alike row may be, in tokens.
        merge: What becomes of an alike row: ``drop``; or it goes into the other, which then counts
            for more tokens (``weight``; wants ``bias: log_weight``) or gets a key that draws the
            mass of both (``hyperplane``).
        align: Merge keys ``raw`` (before rotation, at the time of the younger) or ``relative``
            (after rotation, each at its own time).
        most: Rows that may go into one at a time.
        limit: Largest move of a key onto the hyperplane, as a share of its length; None for none:
            then every merged row draws from the mean query what its sources drew together. A tenth
            cuts 4 of 10 moves of frames and half of those of tokens short on the embedded model,
            and one merged row in ten draws less than 6 tenths of it; frames recall as much either
            way, tokens at most a little more with it. Moves cut short are counted in the state,
            under ``clipped``.
    """

    name: ClassVar[str] = "future"
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            "future-forcing",
            "Keep the frames that queries to come will ask for, drop the others and the older of "
            "alike ones; rebuilt from the paper's description.",
            "Future Forcing, arXiv 2605.30083",
            ("memory", "reads"),
            {"retain": {"part": "future", "budget": "9f"}},
            "not public",
        ),
        Preset(
            "future-focused",
            "Keep what queries to come will ask for, once, and read what is looked at and diverse "
            "of it.",
            "arXiv 2605.30083 and 2605.18346",
            ("memory", "reads"),
            {
                "retain": {"part": "future", "budget": "15f"},
                "select": {"part": "focused", "budget": "9f"},
            },
            "not published together: reads 1f to 6f by head, memory not public",
        ),
    )
    redundancy: str | None = "content"
    similar: float = 0.25
    neighbourhood: int = 0
    merge: str = "drop"
    align: str = "raw"
    most: int = 4
    limit: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, merge=MERGES, align=ALIGNS, redundancy=(*METRICS, None))
        between(self, 1, None, "most")
        between(self, 0, None, "similar", "neighbourhood", *(["limit"] if self.limit else []))
        if self.neighbourhood and self.granularity == "frame":
            raise ValueError(
                f"neighbourhood={self.neighbourhood} is about tokens, but whole frames are kept. "
                "Use granularity: token, or neighbourhood: 0."
            )

    @property
    def layered(self) -> bool:
        """At a commit too: what the queries to come say takes a buffer for each layer."""
        return True

    def check(self, geometry: Geometry, chunk: int, frames: int) -> None:
        """The bank lies within the history, the neighbourhood within the frame."""
        super().check(geometry, chunk, frames)
        if self.neighbourhood >= max(geometry.grid):
            raise ValueError(
                f"neighbourhood={self.neighbourhood} is larger than the frame of "
                f"{geometry.grid[0]} x {geometry.grid[1]} tokens. "
                f"Use {max(geometry.grid) - 1} or less."
            )

    def suits(self, policy: CachePolicy) -> None:
        """Weights count by the bias, keys on the hyperplane without it."""
        bias = policy.bias
        wanted = {"weight": "log_weight", "hyperplane": None}.get(self.merge, bias)
        if bias != wanted:
            raise ValueError(
                f"merge: {self.merge} does not go with bias: {bias or 'none'}, which would count "
                f"the mass of merged rows {'twice' if bias else 'not at all'}. "
                f"Use bias: {wanted or 'none'}, or merge: drop."
            )

    def commit(self, views: list[CacheView], state: Any) -> list[Retention | None]:
        """Layer by layer: what the queries to come say of one takes a buffer of its size."""
        return [self.keep(view, state) for view in views]

    def keep(self, view: CacheView, state: Any) -> Retention | None:
        """The retention of one layer."""
        if self.fits(view):
            return None
        seen, layout = self.expected(view, state), Layout.of(view)
        there = self.sizes(view)[:, 0] > 0
        before = scores = self.unit_scores(seen, there)
        there = there.expand_as(scores)
        gone, match = torch.zeros_like(there), None
        if self.redundancy is not None:
            gone, match = self._alike(seen, layout, there, state, scores)
            scores = self.unit_scores(seen, there & ~gone)
        scores = self.scored(view, scores.masked_fill(gone, -torch.inf).unsqueeze(1))
        kept = self.best([view], [scores], state)[0][:, 0] & ~gone
        rows = view.rows_of(kept) if self.unit == "frame" else kept
        if self.merge == "drop" or match is None:
            return Retention(keep=rows)
        pairs = row_pairs(layout, gone, match, kept, before, self.most)
        seen = (view, seen.ahead, seen.asked)
        return merged(*seen, rows, pairs, self.merge, self.align, self.limit, state)

    def _alike(
        self, seen: Expected, layout: Layout, there: Tensor, state: Any, scores: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Units that are too many and have a younger one alike, ``[H, U]``, and which that is."""
        view, frames = seen.view, self.unit == "frame"
        points = features(self.redundancy, view, seen.ahead, seen.asked, layout)
        places = (2 * self.neighbourhood + 1) ** 2
        view.scored += sum(view.lengths) * len(view.frames) * places
        if frames:
            distance, match = frame_distances(points, layout)
        else:
            grid = view.geometry.grid
            distance, match = nearest_newer(points, layout, grid, self.neighbourhood)
            row = layout.row.expand(len(match), -1, -1).flatten(1)
            match = row.gather(1, match.flatten(1)).clamp_min(0).unflatten(1, distance.shape[1:])
            distance = layout.at_rows(view, distance).masked_fill(layout.extra, torch.inf)
            match = layout.at_rows(view, match)
        guard = self.protected(view, scores.unsqueeze(1))[:, 0]
        spare = there & ~guard & (distance < self.similar)
        rank = distance.masked_fill(~spare, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
        rows = self.rows(view)
        if rows is None:
            lengths = self.budget.lengths(
                [view],
                [scores.unsqueeze(1)],
                [self.sizes(view)],
                [guard.unsqueeze(1)],
                state.get("budget", {}),
            )[0]
        else:
            lengths = upload(rows, view.frame_ids, torch.int64).unsqueeze(1)
        most = lengths.div(view.geometry.tokens if frames else 1, rounding_mode="floor")
        return spare & (rank < there.sum(-1, keepdim=True) - most), match
