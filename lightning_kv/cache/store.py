"""What is stored for one layer of one sample, and the only code that changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Merge, PerHead, Recode, Retention
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.rotary import rotate
from lightning_kv.cache.rows import FIELDS, Group, RowSet, Segment, per_group, per_head, shrink

REDUCERS = ("sum", "mean", "max", "keep")


class Cell:
    """Committed rows, provisional rows and archive of one layer of one sample.

    Args:
        geometry: Sizes of the model.
        rotated: Keys are held rotated at their recorded time; raw otherwise.
        columns: Reducer of each column (``sum``, ``mean``, ``max`` or ``keep``) on merges.
        like: A tensor that gives dtype and device.
    """

    def __init__(
        self, geometry: Geometry, rotated: bool, columns: dict[str, str], like: Tensor
    ) -> None:
        self.geometry, self.rotated, self.columns = geometry, rotated, columns
        blank = like.new_zeros(geometry.heads, 0, geometry.head_dim)
        self._blank = lambda: RowSet.empty(geometry.heads, blank, tuple(columns))
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.memory, self.archive = self._blank(), self._blank()
        self._close()

    # -- provisional rows ------------------------------------------------------------------

    def write(self, k: Tensor, v: Tensor) -> None:
        """Put the rows of the frames in flight, ``[H, P, D]``, behind the committed ones.

        They replace the provisional rows that were there. Room is made once per chunk, later
        passes of the same length overwrite in place.
        """
        if self.provisional != k.shape[1] or self._desks is None:
            self._open(k.shape[1])
        for group, desk in zip(self.memory.groups, self._desks, strict=True):
            chosen = slice(None) if len(group.heads) == len(k) else list(group.heads)
            for name, x in (("k", k), ("v", v)):
                desk[name][:, desk[name].shape[1] - self.provisional :] = x[chosen]

    def _open(self, rows: int) -> None:
        self.provisional, self._desks = rows, []
        for group in self.memory.groups:
            last = group.segments[-1]
            if last.codec is not None:
                last = group.blank()
                group.segments.append(last)
            desk = {}
            for name, x in last.rows.items():
                room = x.new_empty(x.shape[0], x.shape[1] + rows, x.shape[2])
                room[:, : x.shape[1]] = x
                last.rows[name] = room[:, : x.shape[1]]
                desk[name] = room
            self._desks.append(desk)

    def _close(self) -> None:
        self.provisional, self._desks = 0, None

    def readable(self, group: Group, name: str) -> Tensor:
        """Committed and provisional rows of a group, ``[h, N + P, D]``; a view where possible."""
        if self._desks is None:
            return group.payload(name)
        desk = self._desks[next(i for i, g in enumerate(self.memory.groups) if g is group)][name]
        plain = [segment.decoded(name) for segment in group.segments[:-1]]
        return torch.cat([*plain, desk], dim=1) if plain else desk

    def commit(self, final: slice, meta: dict[str, Tensor]) -> None:
        """Make provisional rows permanent.

        Args:
            final: Which of the P provisional rows.
            meta: Their ``frame_id``, ``time``, ``place`` (each ``[P']``), and columns where they
                start at other values than 0.
        """
        count = len(range(*final.indices(self.provisional)))
        for group, desk in zip(self.memory.groups, self._desks, strict=True):
            last = group.segments[-1]
            old = desk["k"].shape[1] - self.provisional
            for name in ("k", "v"):
                if count == self.provisional:
                    last.rows[name] = desk[name]
                else:
                    fresh = desk[name][:, old:][:, final]
                    last.rows[name] = torch.cat([desk[name][:, :old], fresh], dim=1)
            for name, x in group.meta.items():
                default = 1.0 if name == "weight" else 0.0
                new = meta.get(name, x.new_full((count,), default)).to(x)
                new = new if new.ndim == 1 else new[list(group.heads)]
                new = new.expand(len(x), -1) if new.ndim == 1 else new
                wide = max(len(x), len(new))
                group.meta[name] = torch.cat([x.expand(wide, -1), new.expand(wide, -1)], dim=1)
        self._close()

    # -- decisions -------------------------------------------------------------------------

    def apply(self, decision: Retention) -> None:
        """Carry out a retention.

        Raises:
            ValueError: It names rows, columns or archive rows that are not there.
        """
        self._close()
        for name, value in decision.write.items():
            if name not in self.columns:
                raise ValueError(
                    f"A decision writes the column {name!r}, which no part declares. "
                    f"Declared: {sorted(self.columns)}. Add it to the part's `columns`."
                )
            self.memory.write(name, value)
        old = self.memory
        for rows in (decision.keep, decision.archive):
            _check(rows, old, "row")
        merged = self._merged(old, decision.merge)
        restored = self._restored(decision)
        if decision.archive is not None:
            self.archive = self.archive.extended(old.select(decision.archive))
        kept = old if decision.keep is None else old.select(decision.keep)
        if decision.time is not None:
            kept = self._retimed(kept, decision.time)
        self.memory = kept.extended(merged).extended(restored)

    def recode(self, decision: Recode) -> None:
        """Store rows with a codec; rows that have one already stay as they are."""
        self._close()
        _check(decision.rows, self.memory, "row")
        out: list[Group] = []
        for group in self.memory.groups:
            for position, head in enumerate(group.heads):
                out.append(_recoded(group, position, head, decision))
        self.memory = RowSet(out).coalesced()

    def _retimed(self, rows: RowSet, time: PerHead) -> RowSet:
        for group in rows.groups:
            new = per_group(time, group).to(group.meta["time"])
            if self.rotated:
                delta = self.geometry.rotary.time_angles(new - group.expanded("time"))
                k, v = rotate(group.payload("k"), delta), group.payload("v")
                group.segments = [Segment({"k": k, "v": v})]
            group.meta |= shrink({"time": new})
        return rows

    def _restored(self, decision: Retention) -> RowSet:
        for rows in (decision.restore, decision.discard):
            _check(rows, self.archive, "archive row")
        back = self._blank()
        if decision.restore is not None:
            back = self.archive.select(decision.restore)
            if decision.restore_time is not None:
                order = _each(decision.restore, lambda rows: rows.argsort(), self.geometry.heads)
                times = [per_head(decision.restore_time, h)[o] for h, o in enumerate(order)]
                back = self._retimed(back, times)
        gone = [decision.discard, None if decision.restore_copy else decision.restore]
        gone = [rows for rows in gone if rows is not None]
        if gone:
            lengths, left = self.archive.lengths, []
            device = self.archive.groups[0].meta["time"].device
            for head in range(self.geometry.heads):
                stays = torch.ones(lengths[head], dtype=torch.bool, device=device)
                for rows in gone:
                    stays[per_head(rows, head)] = False
                left.append(stays.nonzero().flatten())
            self.archive = self.archive.select(left)
        return back

    # -- merges ----------------------------------------------------------------------------

    def _merged(self, old: RowSet, merge: Merge | list[Merge | None] | None) -> RowSet:
        if merge is None:
            return self._blank()
        out = []
        for group in old.groups:
            if isinstance(merge, Merge):
                out.append(self._merge(group, merge))
                continue
            for position, head in enumerate(group.heads):
                if merge[head] is not None:
                    rows = torch.arange(len(group), device=group.meta["time"].device).unsqueeze(0)
                    out.append(self._merge(group._take([position], rows), merge[head]))
        blank = self._blank().groups[0]
        missing = [h for h in range(self.geometry.heads) if all(h not in g.heads for g in out)]
        if missing and out:
            out.append(blank._take(missing, torch.zeros(1, 0, dtype=torch.int64)))
        return RowSet(out).coalesced() if out else self._blank()

    def _merge(self, group: Group, merge: Merge) -> Group:
        source, target = merge.source, merge.target
        count = len(merge.frame_id)
        for index, size, what in ((source, len(group), "row"), (target, count, "target")):
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
                raise ValueError(
                    f"A merge names {what}s {int(index.min())} to {int(index.max())} of {size}. "
                    "Rows are counted from 0 in the old memory, targets in `frame_id`."
                )
        meta = {name: group.expanded(name)[:, source] for name in group.meta}
        new = {"frame_id": merge.frame_id, "time": merge.time, "place": merge.place}
        at_target = self.angles(new["time"], new["place"])
        at_source = self.angles(meta["time"], meta["place"])
        keys = group.payload("k")[:, source]
        if self.rotated and merge.align == "raw":
            keys = rotate(keys, -at_source)
        elif not self.rotated and merge.align == "relative":
            keys = rotate(keys, at_source - at_target[target])
        dtype, work = keys.dtype, torch.promote_types(keys.dtype, torch.float32)
        keys, share = keys.to(work), merge.coefficient.to(keys.device, work).unsqueeze(-1)
        k = keys.new_zeros(len(keys), count, keys.shape[-1]).index_add(1, target, keys * share)
        if self.rotated and merge.align == "raw":
            k = rotate(k, at_target)
        if merge.correction is not None:
            extra = merge.correction.to(k)
            k = k + (rotate(extra, at_target) if self.rotated else extra)
        values = group.payload("v")[:, source].to(work)
        v = values.new_zeros(*k.shape).index_add(1, target, values * share)
        heads = len(group.heads)
        fresh = {name: x.to(FIELDS[name]).unsqueeze(0).expand(heads, -1) for name, x in new.items()}
        if merge.weight is not None:
            fresh["weight"] = merge.weight.unsqueeze(0).expand(heads, -1).float()
        for name, x in meta.items():
            if name not in fresh:
                how = self.columns.get(name, "sum")
                fresh[name] = reduce_column(x, target, merge.coefficient, count, how)
        return Group(group.heads, [Segment({"k": k.to(dtype), "v": v.to(dtype)})], fresh)

    def angles(self, time: Tensor, place: Tensor) -> Tensor:
        """Rotary angles ``[..., D/2]`` of rows at a time and place."""
        columns = self.geometry.grid[1]
        return self.geometry.rotary.angles(
            time, place.div(columns, rounding_mode="floor"), place % columns
        )


def reduce_column(x: Tensor, target: Tensor, coefficient: Tensor, count: int, how: str) -> Tensor:
    """Combine column values ``[h, E]`` of merged rows into ``[h, count]``.

    Args:
        x: Values of the sources, pair by pair.
        target: ``[E]`` new row of each pair.
        coefficient: ``[E]``.
        count: Number of new rows.
        how: ``sum``; ``mean`` (weighted by the coefficients); ``max``; or ``keep`` (the value of
            the source with the largest coefficient, the first of equals).
    """
    share = coefficient.to(x)
    blank = x.new_zeros(len(x), count)
    index = target.expand(len(x), -1)
    if how == "sum":
        return blank.scatter_add(1, index, x)
    if how == "mean":
        total = blank[0].scatter_add(0, target, share)
        return blank.scatter_add(1, index, x * share) / torch.where(total == 0, 1, total)
    if how == "max":
        return blank.scatter_reduce(1, index, x, "amax", include_self=False)
    order = share.argsort(stable=True, descending=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    first = order.new_full((count,), len(order)).scatter_reduce(0, target, rank, "amin")
    found = first < len(order)
    return torch.where(found, x[:, order[first.clamp_max(len(order) - 1)]], blank)


def _recoded(group: Group, position: int, head: int, decision: Recode) -> Group:
    """One head with the named plain rows encoded; encoded rows come first, plain rows last."""
    every = torch.arange(len(group), device=group.meta["time"].device)
    alone = group._take([position], every.unsqueeze(0))
    chosen = torch.isin(every, per_head(decision.rows, head).to(every))
    coded: list[tuple[Segment, Tensor]] = []
    plain: list[tuple[Segment, Tensor]] = []
    for segment, index in zip(
        alone.segments, every.split([*map(len, alone.segments)]), strict=True
    ):
        if segment.codec is not None:
            coded.append((segment, index))
            continue
        hit, miss = chosen[index].nonzero().flatten(), (~chosen[index]).nonzero().flatten()
        k, v = segment.rows["k"], segment.rows["v"]
        if len(hit):
            fresh = Segment.encoded(k[:, hit], v[:, hit], decision.codec)
            if coded and coded[-1][0].joins(fresh):
                before, where = coded.pop()
                coded.append((before.joined(fresh), torch.cat([where, index[hit]])))
            else:
                coded.append((fresh, index[hit]))
        plain.append((Segment({"k": k[:, miss], "v": v[:, miss]}), index[miss]))
    rest = plain[0][0] if plain else alone.blank()
    for segment, _ in plain[1:]:
        rest = rest.joined(segment)
    order = torch.cat([index for _, index in coded + plain])
    meta = {name: x[:, order] for name, x in alone.meta.items()}
    return Group(alone.heads, [segment for segment, _ in coded] + [rest], meta)


def _each(rows: PerHead, change: Callable[[Tensor], Tensor], heads: int) -> list[Tensor]:
    return [change(per_head(rows, head)) for head in range(heads)]


def _check(rows: PerHead | None, there: RowSet, what: str) -> None:
    if rows is None:
        return
    lengths = there.lengths
    if isinstance(rows, Tensor):  # the same for all heads: the shortest says whether it can be
        shortest = min(lengths, key=lengths.get)
        lengths = {shortest: lengths[shortest]}
    for head, length in lengths.items():
        index = per_head(rows, head)
        if len(index) and (int(index.max()) >= length or int(index.min()) < 0):
            raise ValueError(
                f"A decision names {what} {int(index.max() if index.min() >= 0 else index.min())} "
                f"of head {head}, which has {length}. "
                "Rows are counted from 0 in the view that the part was given."
            )


def reachable_bytes(*roots: Any) -> int:
    """Bytes of all distinct storages reachable from objects, containers and dataclasses."""
    seen: dict[int, int] = {}
    visited: set[int] = set()
    stack: list[Any] = list(roots)
    while stack:
        item = stack.pop()
        if id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        else:
            stack.extend(_children(item))
    return sum(seen.values())


def _children(item: Any) -> Iterable[Any]:
    if isinstance(item, dict):
        return item.values()
    if isinstance(item, list | tuple | set | frozenset):
        return item
    if is_dataclass(item) and not isinstance(item, type):
        return [getattr(item, f.name) for f in fields(item)]
    return vars(item).values() if hasattr(item, "__dict__") and not callable(item) else ()
