"""Ragged sets of cached rows: heads with the same layout share dense tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_kv.cache.codecs import CODECS
from lightning_kv.cache.decisions import PerHead

FIELDS = {
    "frame_id": torch.int32,
    "time": torch.float32,
    "place": torch.int32,
    "weight": torch.float32,
}


def per_head(value: PerHead, head: int) -> Tensor:
    """The entry of one head; a single tensor counts for all heads."""
    return value if isinstance(value, Tensor) else value[head]


@dataclass
class Segment:
    """Consecutive rows of one group, stored in one way.

    Args:
        rows: Tensors with a row axis ``[h, n, ...]``: ``k`` and ``v`` where stored as computed,
            the codec's tensors under ``k.*`` and ``v.*`` otherwise.
        shared: The codec's tensors without a row axis.
        codec: Name of the codec, or None.
    """

    rows: dict[str, Tensor]
    shared: dict[str, Tensor] = field(default_factory=dict)
    codec: str | None = None

    def __len__(self) -> int:
        return next(iter(self.rows.values())).shape[1]

    @classmethod
    def encoded(cls, k: Tensor, v: Tensor, codec: str | None) -> Segment:
        """Store keys and values ``[h, n, D]`` with a codec."""
        if codec is None:
            return cls({"k": k, "v": v})
        rows, shared = {}, {}
        for name, x in (("k", k), ("v", v)):
            own, common = CODECS[codec].encode(x)
            rows |= {f"{name}.{key}": value for key, value in own.items()}
            shared |= {f"{name}.{key}": value for key, value in common.items()}
        return cls(rows, shared, codec)

    def decoded(self, name: str) -> Tensor:
        """Keys (``k``) or values (``v``), ``[h, n, D]``."""
        if self.codec is None:
            return self.rows[name]
        start = len(name) + 1
        rows = {k[start:]: x for k, x in self.rows.items() if k.startswith(f"{name}.")}
        shared = {k[start:]: x for k, x in self.shared.items() if k.startswith(f"{name}.")}
        return CODECS[self.codec].decode(rows, shared)

    def take(self, heads: Tensor, rows: Tensor) -> Segment:
        """Rows ``[h', n']`` of the heads at positions ``[h']``."""
        own = {name: x[heads.unsqueeze(1), rows] for name, x in self.rows.items()}
        return Segment(own, self._heads(heads), self.codec)

    def _heads(self, heads: Tensor) -> dict[str, Tensor]:
        return {name: x if x.ndim == 0 else x[heads] for name, x in self.shared.items()}

    def joins(self, other: Segment) -> bool:
        """Whether the rows of ``other`` can stand behind these in one segment."""
        private = any(x.ndim for x in (*self.shared.values(), *other.shared.values()))
        return self.codec == other.codec and not private

    def joined(self, other: Segment) -> Segment:
        """These rows, then those of ``other``."""
        rows = {name: torch.cat([x, other.rows[name]], dim=1) for name, x in self.rows.items()}
        return Segment(rows, self.shared, self.codec)

    def stack(self, others: Sequence[Segment]) -> Segment:
        """This segment and others of the same codec and length, heads after heads."""
        rows = {
            name: torch.cat([x, *(o.rows[name] for o in others)]) for name, x in self.rows.items()
        }
        shared = {
            name: x if x.ndim == 0 else torch.cat([x, *(o.shared[name] for o in others)])
            for name, x in self.shared.items()
        }
        return Segment(rows, shared, self.codec)


@dataclass
class Group:
    """Heads of one layer and sample whose streams have the same layout.

    Args:
        heads: Their indices, ascending.
        segments: The rows in order.
        meta: ``frame_id``, ``time``, ``place``, ``weight`` and the columns, each ``[h, N]``, or
            ``[1, N]`` where all heads agree.
    """

    heads: tuple[int, ...]
    segments: list[Segment]
    meta: dict[str, Tensor]

    def __len__(self) -> int:
        return sum(map(len, self.segments))

    @property
    def layout(self) -> tuple[tuple[str | None, int], ...]:
        """Codec and length of each segment."""
        return tuple((segment.codec, len(segment)) for segment in self.segments)

    def payload(self, name: str) -> Tensor:
        """Keys or values as computed, ``[h, N, D]``."""
        parts = [segment.decoded(name) for segment in self.segments]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def expanded(self, name: str) -> Tensor:
        """Metadata ``[h, N]`` with the heads written out (a view)."""
        return self.meta[name].expand(len(self.heads), -1)

    def select(self, keep: PerHead) -> list[Group]:
        """Groups that hold only the given rows (sorted, without repeats), per head."""
        if isinstance(keep, Tensor):
            return [self._take(list(range(len(self.heads))), keep.unique().unsqueeze(0))]
        bounds = torch.tensor([0] + [len(s) for s in self.segments]).cumsum(0)
        buckets: dict[tuple[int, ...], list[tuple[int, Tensor]]] = defaultdict(list)
        for position, head in enumerate(self.heads):
            rows = keep[head].unique()
            counts = torch.bucketize(rows.cpu(), bounds[1:], right=True).bincount(
                minlength=len(self.segments)
            )
            buckets[tuple(counts.tolist())].append((position, rows))
        return [
            self._take(
                [position for position, _ in bucket], torch.stack([rows for _, rows in bucket])
            )
            for bucket in buckets.values()
        ]

    def _take(self, positions: list[int], rows: Tensor) -> Group:
        """Rows ``[h', n']`` or ``[1, n']``; each head has the same number in every segment."""
        heads = torch.tensor(positions, device=rows.device)
        meta = {}
        for name, x in self.meta.items():
            if len(x) == 1:
                meta[name] = x[0][rows]
            else:
                meta[name] = x[heads].gather(1, rows.expand(len(positions), -1))
        segments, low = [], 0
        rows = rows.expand(len(positions), -1)
        for segment in self.segments:
            inside = (rows >= low) & (rows < low + len(segment))
            count = int(inside[0].sum())
            if count:
                local = rows[inside].view(len(positions), count) - low
                segments.append(segment.take(heads, local))
            low += len(segment)
        segments = segments or [self.blank().take(heads, rows)]
        return Group(tuple(self.heads[p] for p in positions), segments, shrink(meta))

    def blank(self) -> Segment:
        """A plain segment of no rows for these heads."""
        last = self.segments[-1]
        return Segment({name: last.decoded(name)[:, :0].clone() for name in ("k", "v")})


def shrink(meta: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hold metadata once where all heads agree."""
    return {
        name: x[:1].clone() if len(x) > 1 and bool((x == x[:1]).all()) else x
        for name, x in meta.items()
    }


def per_group(value: PerHead, group: Group) -> Tensor:
    """Values per row of a group, ``[h, N]``.

    Raises:
        ValueError: There is not one value for each row.
    """
    for head in group.heads:
        if len(per_head(value, head)) != len(group):
            raise ValueError(
                f"A decision gives {len(per_head(value, head))} values for head {head}, which has "
                f"{len(group)} rows. Give one for each row."
            )
    return torch.stack([per_head(value, head) for head in group.heads])


@dataclass
class RowSet:
    """The rows of all heads of one layer and sample.

    Args:
        groups: Together they hold every head once.
    """

    groups: list[Group]

    @classmethod
    def empty(cls, heads: int, like: Tensor, columns: Sequence[str]) -> RowSet:
        """No rows; ``like`` ``[H, 0, D]`` gives dtype, device and width."""
        meta = {
            name: torch.zeros(1, 0, dtype=FIELDS.get(name, torch.float32), device=like.device)
            for name in (*FIELDS, *columns)
        }
        segment = Segment({"k": like.new_zeros(like.shape), "v": like.new_zeros(like.shape)})
        return cls([Group(tuple(range(heads)), [segment], meta)])

    def __len__(self) -> int:
        return max(map(len, self.groups))

    @property
    def lengths(self) -> dict[int, int]:
        """Rows per head."""
        return {head: len(group) for group in self.groups for head in group.heads}

    def stream(self, head: int) -> tuple[Group, int]:
        """The group of a head and its position in it."""
        for group in self.groups:
            if head in group.heads:
                return group, group.heads.index(head)
        raise ValueError(f"No head {head}; this layer has {sorted(self.lengths)}.")

    def column(self, name: str) -> list[Tensor]:
        """One field of every head, each ``[N_h]``, by head."""
        found = {
            h: row for g in self.groups for h, row in zip(g.heads, g.expanded(name), strict=True)
        }
        return [found[head] for head in sorted(found)]

    def select(self, keep: PerHead) -> RowSet:
        """Only the given rows of each head."""
        return RowSet([new for group in self.groups for new in group.select(keep)]).coalesced()

    def write(self, name: str, value: PerHead) -> None:
        """Replace a metadata field; per head ``[N_h]``."""
        for group in self.groups:
            rows = per_group(value, group)
            like = group.meta[name]
            group.meta |= shrink({name: rows.to(like)})

    def extended(self, other: RowSet) -> RowSet:
        """The rows of ``other`` behind these rows, head by head."""
        if not len(other):
            return self
        if not len(self):
            return other
        out = []
        for mine in self.groups:
            for theirs in other.groups:
                heads = [head for head in mine.heads if head in theirs.heads]
                if heads:
                    out.append(_joined(_heads(mine, heads), _heads(theirs, heads)))
        return RowSet(out).coalesced()

    def coalesced(self) -> RowSet:
        """Join the groups of equal layout."""
        buckets: dict[tuple, list[Group]] = defaultdict(list)
        for group in self.groups:
            buckets[group.layout].append(group)
        return RowSet([_stacked(bucket) for bucket in buckets.values()])


def _heads(group: Group, heads: list[int]) -> Group:
    if tuple(heads) == group.heads:
        return group
    every = torch.arange(len(group), device=group.meta["time"].device)
    return group._take([group.heads.index(head) for head in heads], every.unsqueeze(0))


def _joined(first: Group, second: Group) -> Group:
    """Rows of ``second`` behind ``first`` (same heads); neighbouring plain segments become one."""
    meta = {}
    for name, x in first.meta.items():
        y = second.meta[name]
        wide = max(len(x), len(y))
        meta[name] = torch.cat([x.expand(wide, -1), y.expand(wide, -1)], dim=1)
    segments = [s for s in first.segments if len(s)]
    for segment in (s for s in second.segments if len(s)):
        if segments and segments[-1].joins(segment):
            segment = segments.pop().joined(segment)
        segments.append(segment)
    return Group(first.heads, segments or first.segments[:1], meta)


def _stacked(groups: list[Group]) -> Group:
    if len(groups) == 1:
        return groups[0]
    order = sorted(
        (head, g, p) for g, group in enumerate(groups) for p, head in enumerate(group.heads)
    )
    meta = {name: torch.cat([group.expanded(name) for group in groups]) for name in groups[0].meta}
    segments = [
        first.stack([group.segments[i] for group in groups[1:]])
        for i, first in enumerate(groups[0].segments)
    ]
    start = [sum(len(g.heads) for g in groups[:i]) for i in range(len(groups))]
    place = torch.tensor([start[g] + p for _, g, p in order], device=meta["time"].device)
    segments = [
        Segment(
            {n: x[place] for n, x in s.rows.items()},
            {n: x if x.ndim == 0 else x[place] for n, x in s.shared.items()},
            s.codec,
        )
        for s in segments
    ]
    meta = shrink({name: x[place] for name, x in meta.items()})
    return Group(tuple(head for head, _, _ in order), segments, meta)
