"""New rows as weighted sums of old ones, one source at a time.

Every target takes its first source, then its second, and so on: no sum has an order that a device
could choose, and never more than one row for each target is gathered.

Shapes: H heads, N rows of memory, then A of the archive, E pairs, R new rows, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Sums
from lightning_kv.cache.rotary import Rotary, rotate, wide
from lightning_kv.cache.rows import Group, Rows, Segment


class Summing:
    """The rows that a sum takes from: memory, and the archive behind it.

    Args:
        parts: Memory, and the archive where it holds something.
        rotary: The model's.
        rotated: Keys are stored rotated.
        columns: Reducer of each column.
    """

    def __init__(
        self, parts: list[Rows], rotary: Rotary, rotated: bool, columns: dict[str, str]
    ) -> None:
        self.parts, self.rotary, self.rotated = parts, rotary, rotated
        self.columns, self.heads = columns, parts[0].heads
        self.like = parts[0].groups[0].plain.rows["k"]

    def rows(self, sums: Sums, counted: list[int], degree: int) -> Rows:
        """The new rows.

        Args:
            sums: Sources, targets and coefficients.
            counted: New rows of each head; one number where all agree.
            degree: The most sources that one target has.
        """
        heads, count, work = self.heads, sums.frame_id.shape[1], self.rotary.work
        payload = {
            name: [(r, [g.payload(name) for g in r.groups]) for r in self.parts] for name in "kv"
        }
        old = {name: self._field(name) for name in self.parts[0].groups[0].meta}
        rank = ranked(sums)[0]
        meta = {
            "frame_id": sums.frame_id.to(torch.int32),
            "time": sums.time.float(),
            "place": sums.place.float(),
        }
        meta = {name: x.expand(heads, *x.shape[1:]) for name, x in meta.items()}
        at_target = self._angles(meta)
        k = wide(self.like.new_zeros(heads, count, self.like.shape[2]))
        v, columns = torch.zeros_like(k), _Columns(self.columns | {"weight": "sum"}, k[..., 0])
        for turn in range(degree):
            source, share = _round(sums, rank, turn, heads)
            there = source.clamp_min(0)
            own = {name: _at(x, there) for name, x in old.items()}
            keys = _gathered(payload["k"], there).to(k)
            if self.rotated and sums.align == "raw":
                keys = rotate(keys, -self._angles(own), work)
            elif not self.rotated and sums.align == "relative":
                keys = rotate(keys, self._angles(own) - at_target, work)
            weight = share.to(k).unsqueeze(-1)
            k = k + torch.where(weight == 0, 0.0, keys * weight)
            values = _gathered(payload["v"], there).to(v)
            v = v + torch.where(weight == 0, 0.0, values * weight)
            columns.add(own, share, source >= 0)
        if self.rotated and sums.align == "raw":
            k = rotate(k, at_target, work)
        if sums.correction is not None:
            extra = sums.correction.to(k).expand_as(k)
            k = k + (rotate(extra, at_target, work) if self.rotated else extra)
        meta |= columns.values()
        if sums.weight is not None:
            meta["weight"] = sums.weight.float().expand(heads, -1)
        rows = {"k": k.to(self.like.dtype), "v": v.to(self.like.dtype)}
        made = Rows([Group(tuple(range(heads)), [], Segment(rows, count), meta)], heads)
        if set(counted) == {count}:
            return made
        fresh = (sums.frame_id >= 0).expand(heads, -1)
        counts = counted if len(counted) > 1 else counted * heads
        return made.taken(fresh, [[counts, list(range(heads))]])

    def _angles(self, meta: dict[str, Tensor]) -> Tensor:
        return self.rotary.angles(meta["time"], *meta["place"].unbind(-1))

    def _field(self, name: str) -> Tensor:
        """A field or column with the heads written out, ``[H, N + A, ...]``."""
        found = [rows.table([group.meta[name] for group in rows.groups]) for rows in self.parts]
        return torch.cat([x.expand(self.heads, *x.shape[1:]) for x in found], dim=1)


class _Columns:
    """Column values of new rows, one source after the other."""

    def __init__(self, how: dict[str, str], like: Tensor) -> None:
        self.how, self.total = how, torch.zeros_like(like)
        self.best = torch.full_like(like, -torch.inf)
        self.found = {name: torch.zeros_like(like) for name in how}
        self.any = torch.zeros_like(like, dtype=torch.bool)

    def add(self, own: dict[str, Tensor], share: Tensor, there: Tensor) -> None:
        better = there & (share > self.best)
        for name, how in self.how.items():
            x, old = own[name].to(share), self.found[name]
            if how == "sum":
                new = old + x
            elif how == "mean":
                new = old + x * share
            elif how == "max":
                new = torch.where(self.any, torch.maximum(old, x), x)
            else:
                new = torch.where(better, x, old)
            self.found[name] = torch.where(there, new, old)
        self.total = self.total + torch.where(there, share, 0.0)
        self.best, self.any = torch.where(better, share, self.best), self.any | there

    def values(self) -> dict[str, Tensor]:
        """Each ``[H, R]``."""
        mean = torch.where(self.total == 0, 1, self.total)
        return {
            name: (x / mean if self.how[name] == "mean" else x).float()
            for name, x in self.found.items()
        }


def matched(x: Tensor, rows: Tensor, like: Tensor, share: float) -> Tensor:
    """See :class:`~lightning_kv.cache.decisions.Match`; ``x`` is ``[h, n, D]``."""
    spots = {}
    for name, mask in (("rows", rows), ("like", like)):
        m = mask.to(x).unsqueeze(-1)
        count = m.sum(1, keepdim=True).clamp_min(1)
        mean = (x * m).sum(1, keepdim=True) / count
        spread = (((x - mean) * m).square().sum(1, keepdim=True) / count).sqrt().clamp_min(1e-6)
        spots[name] = mean, spread
    (mean, spread), (other, wanted) = spots["rows"], spots["like"]
    moved = (1 - share) * x + share * ((x - mean) / spread * wanted + other)
    changed = rows & like.any(1, keepdim=True)  # without a model there is nothing to be like
    return torch.where(changed.unsqueeze(-1), moved, x)


def ranked(sums: Sums) -> tuple[Tensor, Tensor]:
    """Place of each pair among those of its target ``[1 or H, E]``, and the most that one has."""
    size = sums.frame_id.shape[1]
    lines = max(len(sums.source), len(sums.target))
    target = sums.target.expand(lines, -1)
    key = torch.where(sums.source >= 0, target, size)
    ordered, order = key.sort(dim=1, stable=True)
    first = torch.searchsorted(ordered, ordered.contiguous())
    place = torch.arange(key.shape[1], device=key.device) - first
    rank = torch.empty_like(key).scatter(1, order, place)
    most = torch.where(sums.source >= 0, rank + 1, 0)
    return rank, most.amax() if most.numel() else most.sum()


def _round(sums: Sums, rank: Tensor, turn: int, heads: int) -> tuple[Tensor, Tensor]:
    """The source (-1 for none) and coefficient of each target in one round, ``[H, R]``."""
    size = sums.frame_id.shape[1]
    now = (rank == turn) & (sums.source >= 0)
    target = torch.where(now, sums.target, size).expand(heads, -1)
    blank = target.new_full((heads, size + 1), -1)
    source = blank.scatter(1, target, sums.source.expand(heads, -1))[:, :size]
    share = sums.coefficient.expand(heads, -1)
    share = share.new_zeros(heads, size + 1).scatter(1, target, share)[:, :size]
    return source, share


def _gathered(payload: list[tuple[Rows, list[Tensor]]], index: Tensor) -> Tensor:
    """Keys or values of rows ``[H, R]`` of memory, then of the archive; ``[H, R, D]``."""
    out, low = None, 0
    for rows, parts in payload:
        size, own = len(rows), (index - low).clamp(0, max(len(rows) - 1, 0))
        found = []
        for group, x in zip(rows.groups, parts, strict=True):
            at = group.of(own, rows.heads).clamp_max(max(x.shape[1] - 1, 0))
            at = at.unsqueeze(-1).expand(-1, -1, x.shape[2])
            found.append(x.gather(1, at) if x.shape[1] else x.new_zeros(at.shape))
        every = rows.by_head(found)
        inside = ((index >= low) & (index < low + size)).unsqueeze(-1)
        out = every if out is None else torch.where(inside, every, out)
        low += size
    return out


def _at(x: Tensor, index: Tensor) -> Tensor:
    """Entries ``[H, R]`` of ``x`` ``[H, N, ...]``."""
    index = index.clamp_max(x.shape[1] - 1)
    if x.ndim == 3:
        index = index.unsqueeze(-1).expand(-1, -1, x.shape[2])
    return x.gather(1, index)
