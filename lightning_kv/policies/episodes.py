"""A pool of frames for each head, from which those leave that are most like the others.

Shapes: H heads, M heads that have a pool, K frames that they hold, T tokens of a frame, N rows, D
head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Sums
from lightning_kv.cache.host import compact, upload
from lightning_kv.cache.rotary import wide
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.layout import Layout
from lightning_kv.policies.statistics import earliest


@dataclass(frozen=True)
class Entries:
    """What the host knows of the pools, which is the same for all heads.

    Args:
        edge: The first frame that has not entered.
        count: Frames of a pool, the summary among them.
        merged: Whether there is a summary of frames that have left.
        leaves: For each frame that left last, the first frame that had not entered then.
        new: The summary was made of these; there was none before.
    """

    edge: int
    count: int = 0
    merged: bool = False
    leaves: tuple[int, ...] = ()
    new: bool = False

    def until(self, edge: int, size: int) -> Entries:
        """Let the frames before ``edge`` enter, one at a time, into pools of so many frames.

        The first frame that leaves becomes the summary, so that another one leaves at once.
        """
        count, merged, leaves, size = self.count, self.merged, [], max(size, self.merged)
        for limit in range(self.edge + 1, edge + 1):
            count += 1
            while count > size:
                leaves.append(limit)
                count -= merged or not size
                merged = merged or size > 0
        new = merged and not self.merged
        return Entries(max(edge, self.edge), count, merged, tuple(leaves), new)


@dataclass(frozen=True)
class Pools:
    """The whole frames that some heads of a layer hold, as many each, oldest first.

    Args:
        heads: Which.
        index: int64 ``[M, K]``: into the frames of the view.
        ids: int64 ``[M, K]``.
        rows: int64 ``[M, K, T]``: of the table.
        summary: bool ``[M, K]``: the frame that stands for others.
    """

    heads: Tensor
    index: Tensor
    ids: Tensor
    rows: Tensor
    summary: Tensor

    @classmethod
    def of(cls, view: CacheView, heads: Sequence[int]) -> Pools:
        """Those of a view."""
        own = upload(heads, view._like, torch.int64)
        rows = Layout.of(view).row.expand(view.heads, -1, -1).index_select(0, own)
        held = view.lengths[heads[0]] // view.geometry.tokens
        index = compact(rows[..., 0] >= 0, held)
        rows = rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[2]))
        weight = view.weight.expand(view.heads, -1).index_select(0, own).gather(1, rows[..., 0])
        return cls(own, index, view.frame_ids[index], rows, weight > 1)

    def alike(self, view: CacheView) -> tuple[Tensor, Tensor]:
        """Cosines between keys of two frames before rotation, ``[M, K, K]``; counts their rows.

        Of their means, and the mean over tokens of those at equal places.
        """
        raw = view.keys("raw").index_select(0, self.heads)
        view.scored += self.rows.numel()
        keys = raw.gather(1, self.rows.flatten(1).unsqueeze(-1).expand(-1, -1, raw.shape[2]))
        keys = wide(keys).unflatten(1, self.rows.shape[1:])  # [M, K, T, D]
        frames, tokens = unit(keys.mean(2)), unit(keys).flatten(2)
        pairs = (x @ x.transpose(1, 2) for x in (frames, tokens))
        means, places = ((x + x.transpose(1, 2)) / 2 for x in pairs)  # ties are exact
        return means, places / keys.shape[2]

    def leaving(self, view: CacheView, sink: int, leaves: Sequence[int]) -> list[Tensor]:
        """The frame that leaves each time, bool ``[M, K]`` with one true value in each line."""
        if not leaves:
            return []
        (means, places), ids, found = self.alike(view), self.ids, []
        itself = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
        gap = ids.unsqueeze(1) - ids.unsqueeze(2)
        gap = gap.abs() * 2 + (gap > 0)  # of two as near the earlier
        there = ~self.summary & (ids >= sink)
        for limit in leaves:
            pool = there & (ids < limit)
            others = pool.unsqueeze(1) & ~itself
            like = (means * others).sum(2) / others.sum(2).clamp_min(1)
            near = gap.masked_fill(~others, torch.iinfo(gap.dtype).max).argmin(2, keepdim=True)
            like = like + (places * others).gather(2, near)[..., 0]
            like = like.masked_fill(~pool, -torch.inf)
            found.append(earliest(like == like.amax(1, keepdim=True), 1))
            there = there & ~found[-1]
        return found

    def updated(
        self, view: CacheView, sink: int, entries: Entries, rate: float
    ) -> tuple[Sums | None, Tensor]:
        """The summary with what leaves, and the frames that stay as they are, bool ``[M, K]``.

        Args:
            view: Of the layer.
            sink: First frames of the video, which belong to no pool.
            entries: After the frames have entered that belong to the pools now.
            rate: Weight in the summary of a frame that leaves.
        """
        parts = self.leaving(view, sink, entries.leaves)
        if parts and entries.merged and not entries.new:
            parts = [self.summary, *parts]
        stay = torch.ones_like(self.summary)
        for part in parts:
            stay = stay & ~part
        return self.summed(view, parts, rate) if parts and entries.merged else None, stay

    def frame(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Id ``[M, 1]`` and rows ``[M, T]`` of one frame for each head, of bool ``[M, K]``."""
        at = chosen.int().argmax(1, keepdim=True)
        rows = self.rows.gather(1, at.unsqueeze(-1).expand(-1, -1, self.rows.shape[2]))
        return self.ids.gather(1, at), rows[:, 0]

    def summed(self, view: CacheView, parts: Sequence[Tensor], rate: float) -> Sums:
        """A summary frame that is the first part, moved towards the others in their order."""
        found, last = [self.frame(part) for part in parts], len(parts) - 1
        share = [(rate if i else 1.0) * (1 - rate) ** (last - i) for i in range(len(parts))]
        tokens, like = view.geometry.tokens, view._like

        def every(own: Tensor) -> Tensor:
            return own.new_full((view.heads, own.shape[1]), -1).index_copy(0, self.heads, own)

        ids = every(found[0][0].expand(-1, tokens))
        return Sums(
            every(torch.cat([rows for _, rows in found], 1)),
            torch.arange(tokens, device=ids.device).repeat(len(parts)).unsqueeze(0),
            upload(share, like, torch.float64).repeat_interleave(tokens).unsqueeze(0),
            ids,
            ids.float(),
            view.geometry.places(ids.device).float().unsqueeze(0),
        )


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1 along the last axis; those of no length stay."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
