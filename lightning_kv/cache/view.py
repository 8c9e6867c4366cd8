"""What a policy part may look at: one layer of one sample, read-only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.decisions import PerHead
from lightning_kv.cache.passes import Geometry, Pass
from lightning_kv.cache.rows import Group
from lightning_kv.cache.store import Cell, reachable_bytes

BLOCK = 2**25  # numbers held at once while attention is scored

NO_QUERIES = (
    "Attention was asked for between two passes, when there are no queries. "
    "Ask in `select`, or in a `retain` part with when='open'."
)


@dataclass
class CacheView:
    """The memory of one layer of one sample, and the pass that is asked about.

    Args:
        cell: The store's cell.
        layer: Its layer.
        step: The current pass.
        read_keys: Per group, keys rotated as the queries will meet them, ``[h, N + P, D]``; the
            last P rows are provisional. Only while a pass runs.
        query: The pass's queries ``[H, T, D]`` after rotation; None between passes.
        raw_query: The same before rotation.
        collected: What was collected for the declared needs, by name (for this layer).
        statistics: The same without the caller's tables: these take up cache bytes.
        seed: Base of every random draw of this sample.
        log_weight: Whether merged rows count for their weight in attention.
        read_times: Per group, the times of these keys ``[1 or h, N]``; only when looking ahead.
        look_ahead: Between passes: makes the view of the next chunk, see :meth:`ahead`.
        output: What the queries read, ``[H, T, D]``; only for those who watch a pass.
        scored: Counts keys touched to score them, times the queries that touched them.
    """

    cell: Cell
    layer: int
    step: Pass
    read_keys: list[Tensor] | None = None
    query: Tensor | None = None
    raw_query: Tensor | None = None
    collected: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    log_weight: bool = False
    read_times: list[Tensor] | None = None
    look_ahead: Callable[[], CacheView] | None = None
    output: Tensor | None = None
    scored: int = field(default=0, init=False)

    @property
    def geometry(self) -> Geometry:
        """Sizes of the model."""
        return self.cell.geometry

    @property
    def groups(self) -> list[Group]:
        """Heads with equal layout, together."""
        return self.cell.memory.groups

    @property
    def heads(self) -> int:
        """Number H of heads."""
        return self.geometry.heads

    @property
    def query_frames(self) -> int:
        """Number Q of frames in the query."""
        return len(self.step.frames)

    @property
    def statistics_bytes(self) -> int:
        """Bytes of what was collected for the policy in this layer."""
        return reachable_bytes(self.statistics)

    @cached_property
    def frame_ids(self) -> Tensor:
        """Ids of all frames that have committed rows in some head, ascending, int64 ``[F]``."""
        ids = [group.meta["frame_id"].flatten() for group in self.groups]
        return torch.cat(ids).unique().long()

    @cached_property
    def rows_per_frame(self) -> Tensor:
        """Committed rows of each head in each frame, int64 ``[H, F]``."""
        ones = [torch.ones_like(g.expanded("time")).unsqueeze(1) for g in self.groups]
        return self.per_frame(ones)[:, 0].long()

    @property
    def present(self) -> Tensor:
        """Frames of which a head holds at least one row, bool ``[H, F]``."""
        return self.rows_per_frame > 0

    def ahead(self) -> CacheView:
        """The same memory as the next chunk will meet it, for a decision between two passes.

        Its ``read_keys`` are rotated as that chunk's queries will find them, and its ``step`` says
        where that chunk stands; there are no queries yet.
        """
        if self.look_ahead is None:
            raise ValueError(
                "A look at the next chunk was asked for in the middle of a pass. "
                "Ask when a chunk is committed, or at an event."
            )
        return self.look_ahead()

    def forget(self) -> None:
        """Drop what was derived from rows that have changed since."""
        for name in ("frame_ids", "rows_per_frame"):
            self.__dict__.pop(name, None)

    def column(self, name: str) -> list[Tensor]:
        """A row field or column of every head, each ``[N_h]``."""
        return self.cell.memory.column(name)

    def frame_index(self, group: Group) -> Tensor:
        """Index into ``frame_ids`` of every row of a group, ``[1 or h, N]``."""
        return torch.searchsorted(self.frame_ids, group.meta["frame_id"].long())

    def per_frame(self, values: list[Tensor]) -> Tensor:
        """Sum row values over frames.

        Args:
            values: Per group ``[h, Q, N]`` (committed rows).

        Returns:
            ``[H, Q, F]``, 0 where a head has no row.
        """
        work = torch.promote_types(values[0].dtype, torch.float32)
        shape = (self.heads, values[0].shape[1], len(self.frame_ids))
        out = values[0].new_zeros(shape, dtype=work)
        for group, value in zip(self.groups, [x.to(work) for x in values], strict=True):
            index = self.frame_index(group).unsqueeze(1).expand_as(value)
            part = value.new_zeros(*value.shape[:2], out.shape[2]).scatter_add(2, index, value)
            out[list(group.heads)] = part
        return out

    def rows_of(self, frames: Tensor) -> PerHead:
        """Row indices that belong to chosen frames, per head; ``frames`` is bool ``[H or 1, F]``.

        One tensor comes back, in place of a list, where all heads agree.
        """
        frames = frames.expand(self.heads, -1)
        found: dict[int, Tensor] = {}
        for group in self.groups:
            index = self.frame_index(group)
            chosen = frames[list(group.heads)]
            if len(index) == 1 and bool((chosen == chosen[:1]).all()):
                rows = chosen[0][index[0]].nonzero().flatten()
                found |= dict.fromkeys(group.heads, rows)
                continue
            hit = chosen.gather(1, index.expand(len(group.heads), -1))
            found |= {h: row.nonzero().flatten() for h, row in zip(group.heads, hit, strict=True)}
        one = found[0]
        alike = all(rows is one for rows in found.values())
        return one if alike else [found[head] for head in range(self.heads)]

    def frame_mean_keys(self) -> Tensor:
        """Mean stored key of each head and frame, ``[H, F, D]``; counts the keys it touches."""
        out = []
        for group in self.groups:
            keys = group.payload("k")
            keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
            self.scored += keys.shape[0] * keys.shape[1]
            index = self.frame_index(group).expand(len(group.heads), -1).unsqueeze(-1)
            total = keys.new_zeros(len(keys), len(self.frame_ids), keys.shape[-1])
            out.append((group.heads, total.scatter_add(1, index.expand_as(keys), keys)))
        joined = out[0][1].new_zeros(self.heads, *out[0][1].shape[1:])
        for heads, total in out:
            joined[list(heads)] = total
        return joined / self.rows_per_frame.clamp_min(1).unsqueeze(-1).to(joined)

    def attention(self, per_query_frame: bool = False) -> list[Tensor]:
        """Softmax mass on every committed row, summed over the queries, per group ``[h, Q, N]``.

        The softmax runs over committed and provisional rows, in float32, a block of queries at a
        time; merged rows count for their weight if the policy's bias says so. Every query meets
        every key once more to get it: the keys are counted in ``kv_scored_fraction``.

        Args:
            per_query_frame: Sums for each query frame (Q frames) instead of all together (Q = 1).
        """
        if self.query is None or self.read_keys is None:
            raise ValueError(NO_QUERIES)
        out = []
        for group, keys in zip(self.groups, self.read_keys, strict=True):
            query = self.query[list(group.heads)]
            self.scored += len(group.heads) * query.shape[1] * len(group)
            block = max(1, BLOCK // (keys.shape[0] * keys.shape[1]))
            split = self.query_frames if per_query_frame else 1
            parts = [
                sum(
                    self.softmax(group, q, keys)[..., : len(group)].sum(1)
                    for q in frame.split(block, 1)
                )
                for frame in query.chunk(split, 1)
            ]
            out.append(torch.stack(parts, 1))
        return out

    def frame_logits(self, per_query_frame: bool = False) -> Tensor:
        """Log-sum-exp of each frame's logits, averaged over the queries, ``[H, Q, F]``.

        Counts every held key once for every query, as :meth:`attention` does. -inf where a head
        holds nothing of a frame.
        """
        if self.query is None or self.read_keys is None:
            raise ValueError(NO_QUERIES)
        split = self.query_frames if per_query_frame else 1
        out = self.query.new_full(
            (self.heads, split, len(self.frame_ids)),
            -torch.inf,
            dtype=torch.promote_types(self.query.dtype, torch.float32),
        )
        for group, keys in zip(self.groups, self.read_keys, strict=True):
            heads = list(group.heads)
            query, past = self.query[heads], keys[:, : len(group)]
            self.scored += len(heads) * query.shape[1] * len(group)
            index = self.frame_index(group).expand(len(heads), -1).unsqueeze(1)
            block = max(1, BLOCK // max(1, past.shape[0] * past.shape[1]))
            parts = [
                torch.cat([self._by_frame(group, q, past, index) for q in f.split(block, 1)], 1)
                for f in query.chunk(split, 1)
            ]
            out[heads] = torch.stack([part.mean(1) for part in parts], 1)
        return out

    def _by_frame(self, group: Group, query: Tensor, keys: Tensor, index: Tensor) -> Tensor:
        logits = self.logits(group, query, keys)
        index = index.expand_as(logits)
        shape = (*logits.shape[:2], len(self.frame_ids))
        top = logits.new_full(shape, -torch.inf).scatter_reduce(2, index, logits, "amax")
        total = logits.new_zeros(shape).scatter_add(2, index, (logits - top.gather(2, index)).exp())
        return top + total.log()

    def softmax(self, group: Group, query: Tensor, keys: Tensor) -> Tensor:
        """Attention weights ``[h, T, N + P]`` of queries ``[h, T, D]``, in float32 or wider."""
        return self.logits(group, query, keys).softmax(-1)

    def logits(self, group: Group, query: Tensor, keys: Tensor) -> Tensor:
        """What the softmax is taken of, ``[h, T, rows]``; the group's rows come first."""
        logits = (query @ keys.transpose(1, 2)).to(torch.promote_types(query.dtype, torch.float32))
        logits = logits / keys.shape[-1] ** 0.5
        if self.log_weight:
            logits[..., : len(group)] += group.expanded("weight").log().unsqueeze(1)
        return logits
