"""New rows as weighted sums of old ones, a block of pairs at a time.

Sums are formed by segments, in the same order on every device and every time.

Shapes: H heads, N rows of memory, then A of the archive, E pairs, R new rows, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Sums
from lightning_kv.cache.rotary import Rotary, rotate, wide
from lightning_kv.cache.rows import Group, Rows, Segment
from lightning_kv.cache.table import BLOCK, summed


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

    def rows(self, sums: Sums, counted: list[int]) -> Rows:
        """The new rows.

        Args:
            sums: Sources, targets and coefficients.
            counted: New rows of each head; one number where all agree.
        """
        heads, count, work = self.heads, sums.frame_id.shape[1], self.rotary.work
        payload = {
            name: [(r, [g.payload(name) for g in r.groups]) for r in self.parts] for name in "kv"
        }
        old = {name: self._field(name) for name in self.parts[0].groups[0].meta}
        meta = {
            "frame_id": sums.frame_id.to(torch.int32),
            "time": sums.time.float(),
            "place": sums.place.float(),
        }
        meta = {name: x.expand(heads, *x.shape[1:]) for name, x in meta.items()}
        at_target = self._angles(meta)
        source, into, share = (
            x.expand(heads, -1) for x in (sums.source, sums.target, sums.coefficient)
        )
        there, into = source.clamp_min(0), torch.where(source < 0, -1, into)
        own = {name: _at(x, there) for name, x in old.items()}
        k = wide(self.like.new_zeros(heads, count, self.like.shape[2]))
        v, size = torch.zeros_like(k), max(1, BLOCK // (heads * k.shape[2]))
        for low in range(0, source.shape[1], size):  # no more pairs at once than a buffer holds
            pairs = slice(low, low + size)
            weight, bucket = share[:, pairs].to(k).unsqueeze(-1), into[:, pairs]
            keys = _gathered(payload["k"], there[:, pairs]).to(k)
            at_source = self._angles({name: own[name][:, pairs] for name in ("time", "place")})
            if self.rotated and sums.align == "raw":
                keys = rotate(keys, -at_source, work)
            elif not self.rotated and sums.align == "relative":
                to = bucket.clamp_min(0).unsqueeze(-1).expand(-1, -1, at_target.shape[2])
                keys = rotate(keys, at_source - at_target.gather(1, to), work)
            k = k + summed(keys * weight, bucket, count)
            v = v + summed(_gathered(payload["v"], there[:, pairs]).to(v) * weight, bucket, count)
        if self.rotated and sums.align == "raw":
            k = rotate(k, at_target, work)
        if sums.correction is not None:
            extra = sums.correction.to(k).expand_as(k)
            k = k + (rotate(extra, at_target, work) if self.rotated else extra)
        for name, how in (self.columns | {"weight": "sum"}).items():
            meta[name] = reduced(own[name], into, share.float(), count, how)
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


def reduced(x: Tensor, into: Tensor, share: Tensor, count: int, how: str) -> Tensor:
    """Column values ``[H, E]`` of sources as those of new rows, ``[H, count]``.

    Args:
        x: Of the sources, pair by pair.
        into: ``[H, E]`` new row of each pair; -1 for none.
        share: ``[H, E]`` coefficients.
        count: Number of new rows.
        how: ``sum``; ``mean`` (weighted by the coefficients); ``max``; or ``keep`` (the value of
            the source with the largest coefficient, the first of equals).
    """

    def total(values: Tensor) -> Tensor:
        return summed(values.unsqueeze(-1), into, count)[..., 0]

    def extreme(values: Tensor, which: str, blank: float) -> Tensor:
        index = torch.where(into < 0, count, into)
        start = values.new_full((len(values), count + 1), blank)
        return start.scatter_reduce(1, index, values, which)[:, :count]

    x = x.float()
    if how == "sum":
        return total(x)
    if how == "mean":
        weight = total(share)
        return total(x * share) / torch.where(weight == 0, 1, weight)
    if how == "max":
        best = extreme(x, "amax", -torch.inf)
        return torch.where(best == -torch.inf, 0.0, best)
    best = extreme(share, "amax", -torch.inf).gather(1, into.clamp_min(0))
    place = torch.arange(x.shape[1], device=x.device).expand_as(into)
    first = extreme(torch.where(share == best, place, x.shape[1]), "amin", x.shape[1])
    found = x.gather(1, first.clamp_max(x.shape[1] - 1))
    return torch.where(first < x.shape[1], found, 0.0)


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
