"""Ragged sets of cached rows: heads with the same layout share dense tensors.

Shapes: H heads, h heads of a group, N rows of a table, n rows of a group, c rows that there is room
for, D head width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.codecs import CODECS
from lightning_kv.cache.host import compact, upload

FIELDS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "frame_id": (torch.int32, ()),
    "time": (torch.float32, ()),
    "place": (torch.float32, (2,)),
    "weight": (torch.float32, ()),
}
"""Dtype of each field, and its shape behind ``[H, N]``; columns are single float32 numbers."""

ROW_BYTES = 4 + 4 + 8 + 4
"""Of the fields of one row."""


@dataclass
class Segment:
    """Consecutive rows of one group, stored in one way.

    Args:
        rows: Tensors with a row axis ``[h, c, ...]``: ``k`` and ``v`` where stored as computed, the
            codec's tensors under ``k.*`` and ``v.*`` otherwise.
        length: Rows that count; behind them is room for more.
        shared: What the codec keeps without a row axis: numbers, or tensors ``[h, ...]``.
        codec: Name of the codec, or None.
    """

    rows: dict[str, Tensor]
    length: int
    shared: dict[str, Tensor | int] = field(default_factory=dict)
    codec: str | None = None

    def __len__(self) -> int:
        return self.length

    @property
    def room(self) -> int:
        """Rows that the tensors can hold."""
        return next(iter(self.rows.values())).shape[1]

    @classmethod
    def encoded(cls, k: Tensor, v: Tensor, codec: str) -> Segment:
        """Store keys and values ``[h, n, D]`` with a codec."""
        rows, shared = {}, {}
        for name, x in (("k", k), ("v", v)):
            own, common = CODECS[codec].of(name).encode(x)
            rows |= {f"{name}.{key}": value for key, value in own.items()}
            shared |= {f"{name}.{key}": value for key, value in common.items()}
        return cls(rows, k.shape[1], shared, codec)

    def decoded(self, name: str) -> Tensor:
        """Keys (``k``) or values (``v``), ``[h, n, D]``."""
        if self.codec is None:
            return self.rows[name][:, : self.length]
        start = len(name) + 1
        rows = {k[start:]: x for k, x in self.rows.items() if k.startswith(f"{name}.")}
        rows |= {"at": self.rows["at"]} if "at" in self.rows else {}
        shared = {k[start:]: x for k, x in self.shared.items() if k.startswith(f"{name}.")}
        return CODECS[self.codec].of(name).decode(rows, shared)

    @property
    def layout(self) -> tuple[Any, ...]:
        """What must agree for the heads of two segments to be stored together."""
        shared = sorted(
            (name, x if isinstance(x, int) else tuple(x.shape[1:]))
            for name, x in self.shared.items()
        )
        return self.codec, self.length, "at" in self.rows, *shared

    def taken(self, heads: Tensor | None, rows: Tensor, room: int = 0) -> Segment:
        """Rows ``[1 or h', n']`` of some heads (positions ``[h']``; all where None)."""
        whole = rows.shape[1] == self.length  # all of them, in order
        if self.codec and CODECS[self.codec].placed and not whole and "at" not in self.rows:
            return self._placed().taken(heads, rows, room)
        own = {name: picked(x, heads, rows, room) for name, x in self.rows.items()}
        shared = self.shared if heads is None else self._heads(heads)
        return Segment(own, rows.shape[1], shared, self.codec)

    def _placed(self) -> Segment:
        """With the place of each row, which the codec must know once some of them go."""
        first = next(iter(self.rows.values()))
        small = torch.int16 if self.length < 2**15 else torch.int32
        at = torch.arange(self.length, dtype=small, device=first.device)
        rows = self.rows | {"at": at.expand(len(first), -1).contiguous()}
        return Segment(rows, self.length, self.shared, self.codec)

    def _heads(self, heads: Tensor) -> dict[str, Tensor | int]:
        return {
            name: x if isinstance(x, int) else x.index_select(0, heads)
            for name, x in self.shared.items()
        }

    def joins(self, other: Segment) -> bool:
        """Whether the rows of ``other`` can stand behind these in one segment."""
        both = (*self.shared.values(), *other.shared.values())
        return self.codec == other.codec and all(isinstance(x, int) for x in both)

    def joined(self, other: Segment, room: int = 0) -> Segment:
        """These rows, then those of ``other``, then room for more."""
        if not len(other) and self.room >= len(self) + room:
            return self
        rows, total = {}, self.length + other.length
        for name, x in self.rows.items():
            made = x.new_empty(x.shape[0], total + room, *x.shape[2:])
            made[:, : self.length] = x[:, : self.length]
            made[:, self.length : total] = other.rows[name][:, : other.length]
            rows[name] = made
        return Segment(rows, total, self.shared, self.codec)

    def stacked(self, others: Sequence[Segment], order: Tensor) -> Segment:
        """This segment and others of the same codec and length: heads of all, in ``order``."""
        every = [self, *others]
        room = min(segment.room for segment in every)
        rows = {
            name: torch.cat([s.rows[name][:, :room] for s in every]).index_select(0, order)
            for name in self.rows
        }
        shared = {
            name: x
            if isinstance(x, int)
            else torch.cat([s.shared[name] for s in every]).index_select(0, order)
            for name, x in self.shared.items()
        }
        return Segment(rows, self.length, shared, self.codec)


def picked(x: Tensor, heads: Tensor | None, rows: Tensor, room: int = 0) -> Tensor:
    """Rows ``[1 or h', n']`` of ``x`` ``[h, c, ...]``, ``[h', n' + room, ...]``.

    Args:
        x: Contiguous; ``[1, c, ...]`` where all heads agree, and stays so where ``rows`` agree too.
        heads: Positions ``[h']`` in ``x``; all of them where None.
        rows: int64.
        room: Rows behind them whose contents do not matter.
    """
    if len(x) == 1:
        found = x[0].index_select(0, rows.flatten()).unflatten(0, tuple(rows.shape))
        return found if not room else _roomy(found, room)
    if room:  # what lies there does not matter, so whole lines are copied at once
        rows = torch.cat([rows, rows.new_zeros(len(rows), room)], 1) if x.shape[1] else rows
    if not x.shape[1]:
        count = len(x) if heads is None else len(heads)
        return x.new_empty(count, room, *x.shape[2:])
    if len(rows) == 1 and heads is None:
        return x.index_select(1, rows[0])
    base = torch.arange(len(x), device=x.device) if heads is None else heads
    flat = (base.unsqueeze(1) * x.shape[1] + rows).flatten()
    return x.flatten(0, 1).index_select(0, flat).unflatten(0, (len(base), -1))


def _roomy(x: Tensor, room: int) -> Tensor:
    return torch.cat([x, x.new_empty(x.shape[0], room, *x.shape[2:])], dim=1)


@dataclass
class Group:
    """Heads of one layer and sample whose streams have the same layout.

    Args:
        heads: Their indices, ascending.
        coded: Rows that have a codec; they come first.
        plain: The rows as computed; the frames in flight lie in the room behind them.
        meta: Fields and columns, each ``[h, n, ...]``, or ``[1, n, ...]`` where all heads agree.
    """

    heads: tuple[int, ...]
    coded: list[Segment]
    plain: Segment
    meta: dict[str, Tensor]

    def __len__(self) -> int:
        return sum(map(len, self.segments))

    @property
    def segments(self) -> list[Segment]:
        """In the order of the rows."""
        return [*self.coded, self.plain]

    @property
    def layout(self) -> tuple[tuple[Any, ...], ...]:
        """That of each segment."""
        return tuple(segment.layout for segment in self.segments)

    @property
    def index(self) -> Tensor:
        """The heads on the device, int64 ``[h]``."""
        return upload(self.heads, self.plain.rows["k"], torch.int64)

    def of(self, x: Tensor, heads: int) -> Tensor:
        """This group's lines of ``x`` ``[1 or H, ...]``."""
        alike = len(x) == 1 and heads > 1
        return x if alike or len(self.heads) == heads else x.index_select(0, self.index)

    def payload(self, name: str, flight: int = 0) -> Tensor:
        """Keys or values as computed and ``flight`` rows behind them; a view where possible."""
        plain = self.plain.rows[name][:, : self.plain.length + flight]
        if not self.coded:
            return plain
        coded = [segment.decoded(name).to(plain.dtype) for segment in self.coded]
        return torch.cat([*coded, plain], dim=1)

    def counted(self, mask: Tensor) -> list[Tensor]:
        """What the host must know to take rows ``[1 or h, n]``: see :meth:`taken`."""
        parts = mask.split([len(segment) for segment in self.segments], dim=1)
        counts = torch.stack([part.sum(1) for part in parts])  # [segments, 1 or h]
        if len(mask) == 1:
            return [counts]
        with torch.autocast(mask.device.type, enabled=False):
            work = mask.float()  # numbers of rows, exact below 2 ** 24
            both, own = work @ work.T, work.sum(1)
        same = (both == own.unsqueeze(0)) & (both == own.unsqueeze(1))
        return [counts, same.int().argmax(1)]

    def taken(self, mask: Tensor, known: list[list[int]], room: int) -> list[Group]:
        """Groups that hold only some rows.

        Args:
            mask: bool ``[1 or h, n]``.
            known: :meth:`counted`, on the host.
            room: Rows to leave room for behind them.
        """
        lines = len(mask)
        counts = [known[0][i : i + lines] for i in range(0, len(known[0]), lines)]
        if len(counts) > len(self.segments):  # decoded since they were counted
            counts = [[sum(own) for own in zip(*counts, strict=True)]]
        buckets: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for position in range(len(self.heads)):
            line = 0 if lines == 1 else position
            buckets[tuple(count[line] for count in counts)].append(position)
        out = []
        for key, own in buckets.items():
            alike = lines == 1 or len({known[1][position] for position in own}) == 1
            out.append(self._part(own, mask, key, alike, room))
        return out

    def _part(
        self, positions: list[int], mask: Tensor, counts: tuple[int, ...], alike: bool, room: int
    ) -> Group:
        whole = len(positions) == len(self.heads)
        where = None if whole else upload(positions, mask, torch.int64)
        if len(mask) > 1:
            mask = mask.narrow(0, positions[0], 1) if alike else mask
            mask = mask if alike or whole else mask.index_select(0, where)
        low, coded, plain, order = 0, [], None, []
        for segment, count in zip(self.segments, counts, strict=True):
            rows = compact(mask[:, low : low + len(segment)], count)
            order.append(rows + low)
            low += len(segment)
            if segment is self.plain:
                plain = segment.taken(where, rows, room)
            elif count:
                coded.append(segment.taken(where, rows))
        rows = torch.cat(order, dim=1)
        meta = {name: picked(x, where, rows) for name, x in self.meta.items()}
        return Group(tuple(self.heads[p] for p in positions), coded, plain, meta)

    def only(self, heads: Sequence[int]) -> Group:
        """All rows of some of the heads."""
        if tuple(heads) == self.heads:
            return self
        where = upload([self.heads.index(h) for h in heads], self.plain.rows["k"], torch.int64)
        segments = []
        for segment in self.segments:
            rows = {name: x.index_select(0, where) for name, x in segment.rows.items()}
            shared = segment._heads(where)
            segments.append(Segment(rows, segment.length, shared, segment.codec))
        meta = {n: x if len(x) == 1 else x.index_select(0, where) for n, x in self.meta.items()}
        return Group(tuple(heads), segments[:-1], segments[-1], meta)

    def joined(self, other: Group, room: int = 0) -> Group:
        """The rows of ``other`` (same heads) behind these; those with a codec stay in front."""
        meta, split = {}, (sum(map(len, self.coded)), sum(map(len, other.coded)))
        for name, x in self.meta.items():
            y = other.meta[name]
            wide = max(len(x), len(y))
            x, y = (z.expand(wide, *z.shape[1:]) for z in (x, y))
            parts = (x[:, : split[0]], y[:, : split[1]], x[:, split[0] :], y[:, split[1] :])
            meta[name] = torch.cat(parts, dim=1)
        coded = list(self.coded)
        for segment in other.coded:
            joins = coded and coded[-1].joins(segment)
            coded.append(coded.pop().joined(segment) if joins else segment)
        return Group(self.heads, coded, self.plain.joined(other.plain, room), meta)


@dataclass
class Rows:
    """The rows of all heads of one layer and sample.

    Args:
        groups: Together they hold every head once.
        heads: Number H.
    """

    groups: list[Group]
    heads: int

    @classmethod
    def empty(cls, heads: int, like: Tensor, columns: Sequence[str]) -> Rows:
        """No rows; ``like`` ``[H, 0, D]`` gives dtype, device and width."""
        kinds = FIELDS | dict.fromkeys(columns, (torch.float32, ()))
        meta = {
            name: torch.zeros(1, 0, *shape, dtype=dtype, device=like.device)
            for name, (dtype, shape) in kinds.items()
        }
        plain = Segment({"k": like.new_zeros(like.shape), "v": like.new_zeros(like.shape)}, 0)
        return cls([Group(tuple(range(heads)), [], plain, meta)], heads)

    def __len__(self) -> int:
        return max(map(len, self.groups))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each head; the host knows them always."""
        found = {head: len(group) for group in self.groups for head in group.heads}
        return tuple(found[head] for head in range(self.heads))

    def by_group(self, x: Tensor) -> list[Tensor]:
        """Values ``[1 or H, N, ...]`` of a table, per group ``[1 or h, n, ...]``."""
        return [group.of(x, self.heads)[:, : len(group)] for group in self.groups]

    def table(self, per_group: Sequence[Tensor]) -> Tensor:
        """Per group ``[1 or h, n, ...]`` as one table ``[1 or H, N, ...]``, zero-padded."""
        if len(self.groups) == 1:
            return per_group[0]
        first, size = per_group[0], len(self)
        out = first.new_zeros(self.heads, size, *first.shape[2:])
        for group, x in zip(self.groups, per_group, strict=True):
            wide = x.expand(len(group.heads), *x.shape[1:])
            if len(group) < size:
                blank = wide.new_zeros(len(wide), size - len(group), *wide.shape[2:])
                wide = torch.cat([wide, blank], dim=1)
            out.index_copy_(0, group.index, wide)
        return out

    def by_head(self, per_group: Sequence[Tensor]) -> Tensor:
        """Results per group ``[h, ...]`` put together in the order of heads, ``[H, ...]``."""
        if len(per_group) == 1:
            return per_group[0]
        order = torch.cat([group.index for group in self.groups]).argsort()
        return torch.cat(list(per_group)).index_select(0, order)

    def counted(self, mask: Tensor) -> list[list[Tensor]]:
        """See :meth:`Group.counted`, group by group, for a mask ``[1 or H, N]``."""
        pairs = zip(self.groups, self.by_group(mask), strict=True)
        return [group.counted(own) for group, own in pairs]

    def taken(self, mask: Tensor, known: list[list[list[int]]], room: int = 0) -> Rows:
        """Only the rows of a mask ``[1 or H, N]``; ``known`` is :meth:`counted` on the host."""
        out = []
        for group, own, counts in zip(self.groups, self.by_group(mask), known, strict=True):
            out += group.taken(own, counts, room)
        return Rows(out, self.heads).coalesced()

    def joined(self, other: Rows, room: int = 0) -> Rows:
        """The rows of ``other`` behind these, head by head."""
        if not len(other):
            return self
        out = []
        for mine in self.groups:
            for theirs in other.groups:
                heads = [head for head in mine.heads if head in theirs.heads]
                if heads:
                    out.append(mine.only(heads).joined(theirs.only(heads), room))
        return Rows(out, self.heads).coalesced()

    def coalesced(self) -> Rows:
        """Join the groups of equal layout."""
        buckets: dict[tuple, list[Group]] = defaultdict(list)
        for group in self.groups:
            buckets[group.layout].append(group)
        return Rows([_stacked(bucket) for bucket in buckets.values()], self.heads)


def _stacked(groups: list[Group]) -> Group:
    if len(groups) == 1:
        return groups[0]
    heads = [head for group in groups for head in group.heads]
    order = upload(
        sorted(range(len(heads)), key=heads.__getitem__), groups[0].plain.rows["k"], torch.int64
    )
    meta = {}
    for name in groups[0].meta:
        wide = [g.meta[name].expand(len(g.heads), *g.meta[name].shape[1:]) for g in groups]
        meta[name] = torch.cat(wide).index_select(0, order)
    first, *others = (group.segments for group in groups)
    segments = [s.stacked([o[i] for o in others], order) for i, s in enumerate(first)]
    return Group(tuple(sorted(heads)), segments[:-1], segments[-1], meta)
