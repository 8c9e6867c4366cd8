"""What is stored for one layer of one sample, and the only code that changes it.

A decision is carried out in two steps. What the host must know of it (how many rows stay in each
head) is counted on the device first, for all layers; one transfer brings the numbers; then each
layer is changed without waiting.

Shapes: H heads, N rows of memory, A of the archive, R new rows, F frames, D head width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Match, Recode, Retention
from lightning_kv.cache.host import upload
from lightning_kv.cache.passes import Geometry
from lightning_kv.cache.recode import coded
from lightning_kv.cache.rotary import rotate, wide
from lightning_kv.cache.rows import Group, Rows, Segment
from lightning_kv.cache.sums import Summing, matched
from lightning_kv.cache.table import Table

REDUCERS = ("sum", "mean", "max", "keep")

Known = Iterator[list[int]]
"""Numbers that :func:`lightning_kv.cache.host.fetch` brought, in the order they were asked for."""


class LayerStore:
    """Memory, frames in flight and archive of one layer of one sample in one namespace.

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
        self._like, self.version = like.new_zeros(geometry.heads, 0, geometry.head_dim), 0
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.memory, self.archive = self._blank(), self._blank()
        self.frames: tuple[int, ...] = ()  # that some head holds rows of, ascending
        self.shelved: tuple[int, ...] = ()  # the same of the archive
        self.whole = True  # every head holds all rows of its frames, frame after frame
        self.weighted = False  # some row may stand for more than itself
        self.flight, self.version = 0, self.version + 1
        self.own: dict[str, Tensor] | None = None  # rows in flight that are kept apart

    def _blank(self) -> Rows:
        return Rows.empty(self.geometry.heads, self._like, tuple(self.columns))

    # -- frames in flight ------------------------------------------------------------------

    @property
    def live(self) -> bool:
        """Whether gradients reach committed rows."""
        return any(x.requires_grad for g in self.memory.groups for x in g.plain.rows.values())

    @property
    def writes(self) -> int:
        """Grows when a tensor of the store is written to in place."""
        total = 0
        for group in (*self.memory.groups, *self.archive.groups):
            for tensors in (*(segment.rows for segment in group.segments), group.meta):
                total += sum(x._version for x in tensors.values() if not x.is_inference())
        return total

    def write(self, k: Tensor, v: Tensor, apart: bool = False) -> None:
        """Put the rows of the frames in flight, ``[H, P, D]``, behind the committed ones.

        They replace those that were there; the history is copied only where there is no room.

        Args:
            k: Keys, rotated.
            v: Values.
            apart: Overwrite nothing: keep these very tensors beside the committed rows, so that
                gradients can pass. So it is too while gradients reach committed rows.
        """
        self.flight, self.own = k.shape[1], None
        if apart or self.live:
            self.own = {"k": k, "v": v}
            return
        for group in self.memory.groups:
            plain = group.plain
            if plain.room < plain.length + self.flight:
                group.plain = plain = plain.joined(Segment(plain.rows, 0), self.flight)
            for name, x in (("k", k), ("v", v)):
                own = group.of(x, self.geometry.heads)
                plain.rows[name][:, plain.length : plain.length + self.flight] = own

    def commit(
        self, final: slice, frames: tuple[int, ...], times: tuple[float, ...], live: int = 0
    ) -> None:
        """Make some of the rows in flight permanent.

        Args:
            final: Which of the P rows; they become the first behind the committed ones.
            frames: Their frames.
            times: Rotary times of these.
            live: Of so many chunks, this one included, rows let gradients through.
        """
        meta = self._fresh(frames, times)
        count = final.stop - final.start
        for group in self.memory.groups:
            plain = group.plain
            if self.own is not None:
                self._append(
                    group,
                    final,
                    frames[0] - (live - 1) * (self.geometry.chunk or len(frames)),
                    live,
                )
            elif final.start:
                low = plain.length + final.start
                for name, x in plain.rows.items():
                    moved = x[:, low : low + count]
                    parts = (x[:, : plain.length], moved, x[:, plain.length + count :])
                    plain.rows[name] = torch.cat(parts, dim=1)
            plain.length += count
            for name, x in group.meta.items():
                new = meta.get(name)
                new = x.new_zeros(1, count) if new is None else new
                new = new.expand(len(x), *new.shape[1:])
                group.meta[name] = torch.cat([x, new], dim=1)
        self.frames = (*self.frames, *frames)
        self.flight, self.own, self.version = 0, None, self.version + 1

    def _append(self, group: Group, final: slice, before: int, live: int) -> None:
        """Rows that were kept apart; gradients reach frames from ``before`` on."""
        plain = group.plain
        with torch.enable_grad():
            for name, x in plain.rows.items():
                old, own = x[:, : plain.length], group.of(self.own[name], self.geometry.heads)
                own = own[:, final]
                if live < 1:
                    own = own.detach()
                if live > 1 and old.requires_grad:
                    young = (group.meta["frame_id"] >= before).unsqueeze(-1)
                    young = young[:, young.shape[1] - plain.length :]
                    old = torch.where(young, old, old.detach())
                else:
                    old = old.detach()
                plain.rows[name] = torch.cat([old, own], dim=1)

    def finalise(self, k: Tensor, final: slice) -> None:
        """Put raw keys ``[H, P, D]`` in place of rotated ones, before rows become permanent."""
        if self.own is not None:
            self.own = self.own | {"k": k}
            return
        for group in self.memory.groups:
            low = group.plain.length
            own = group.of(k, self.geometry.heads)[:, final]
            group.plain.rows["k"][:, low + final.start : low + final.stop] = own

    def put_in_front(
        self, rows: Rows, frames: tuple[int, ...], whole: bool, weighted: bool
    ) -> None:
        """Rows of this layer that were set aside, with what was known of them."""
        self.memory = rows.joined(self.memory) if len(rows) else self.memory
        self.frames = tuple(sorted({*frames, *self.frames}))
        self.whole, self.weighted = self.whole and whole, self.weighted or weighted
        self.version += 1

    def _fresh(self, frames: tuple[int, ...], times: tuple[float, ...]) -> dict[str, Tensor]:
        """Fields of new rows, each ``[1, n, ...]``, the same for all heads."""
        tokens, like = self.geometry.tokens, self._like
        place = self.geometry.places(like.device)
        return {
            "frame_id": _each(upload(frames, like, torch.int32), tokens),
            "time": _each(upload(times, like, torch.float32), tokens),
            "place": place.float().repeat(len(frames), 1).unsqueeze(0),
            "weight": torch.ones(1, len(frames) * tokens, device=like.device),
        }

    # -- what the host must know of a decision ---------------------------------------------

    def measured_codes(self, decisions: Sequence[Recode]) -> list[Tensor]:
        """Numbers to fetch before :meth:`recode`."""
        out: list[Tensor] = []
        for masks in self._plain_masks(decisions):
            out += [mask.sum(1) for mask in masks]
            ordered = [mask.int().cummin(1).values.sum(1) == mask.sum(1) for mask in masks[:1]]
            first = torch.stack([x.all() for x in ordered]).all()
            out.append(first if len(masks) == 1 else torch.zeros_like(first))
        return out

    def measured(self, decision: Retention) -> list[Tensor]:
        """Numbers to fetch before :meth:`apply`."""
        out: list[Tensor] = []
        if decision.keep is not None:
            out += _flat(self.memory.counted(decision.keep))
            held = self.table.rows_in(decision.keep)
            parts = (held == 0) | (held == self.geometry.tokens)
            out += [(held > 0).any(0), parts.all()]
        if decision.sums is not None:
            known = upload(self._known_frames, self._like, torch.int64)
            ids = decision.sums.frame_id
            out += [(ids >= 0).sum(1)]
            out += [(ids.unsqueeze(-1) == known).flatten(0, -2).any(0)]
        if decision.archive is not None:
            out += _flat(self.memory.counted(decision.archive))
            out += [(self.table.rows_in(decision.archive) > 0).any(0)]
        if decision.discard is not None:
            out += _flat(self.archive.counted(~decision.discard))
            out += [(self.shelf.rows_in(~decision.discard) > 0).any(0)]
        return out

    @property
    def _known_frames(self) -> tuple[int, ...]:
        return tuple(sorted({*self.frames, *self.shelved}))

    @property
    def table(self) -> Table:
        """Memory as a table."""
        return Table(self.memory, self.frames, self.geometry, self.rotated, self.whole)

    @property
    def shelf(self) -> Table:
        """The archive as a table."""
        return Table(self.archive, self.shelved, self.geometry, self.rotated, False)

    # -- decisions -------------------------------------------------------------------------

    def apply(self, decision: Retention, known: Known, room: int = 0) -> None:
        """Carry out a retention.

        Args:
            decision: What to do.
            known: :meth:`measured`, on the host.
            room: Rows to leave room for behind those that stay.
        """
        self.version += 1
        for name, value in decision.write.items():
            self._set(name, value)
        for match in decision.match:
            self._match(match)
        self._move(decision)
        kept, frames, whole = self.memory, self.frames, self.whole
        if decision.keep is not None:
            counts = _counts(self.memory, decision.keep, known)
            frames = _still(self.frames, next(known))
            whole = bool(next(known)[0]) and whole
            old = self.memory
        sums = None
        if decision.sums is not None:
            counted, made = next(known), next(known)
            parts = [self.memory, self.archive] if len(self.archive) else [self.memory]
            summing = Summing(parts, self.geometry.rotary, self.rotated, self.columns)
            sums = summing.rows(decision.sums, counted)
            frames = tuple(sorted({*frames, *_still(self._known_frames, made)}))
            self.weighted, whole = True, False
        shelved, aside = self.shelved, None
        if decision.archive is not None:
            aside = self.memory.taken(
                decision.archive, _counts(self.memory, decision.archive, known)
            )
            aside = aside, _still(self.frames, next(known))
        if decision.discard is not None:
            rest = ~decision.discard
            self.archive = self.archive.taken(rest, _counts(self.archive, rest, known))
            shelved = _still(self.shelved, next(known))
        if aside is not None:
            self.archive = self.archive.joined(aside[0])
            shelved = tuple(sorted({*shelved, *aside[1]}))
        if decision.keep is not None:
            kept = old.taken(decision.keep, counts, 0 if sums else room)
        self.memory = kept if sums is None else kept.joined(sums, room)
        self.frames, self.shelved, self.whole = frames, shelved, whole

    def recode(self, decisions: Sequence[Recode], known: Known, room: int = 0) -> None:
        """Store rows with codecs; rows that have one already stay as they are.

        A row that several decisions name gets the codec of the first.
        """
        out: list[Group] = []
        codecs = [decision.codec for decision in decisions]
        for group, masks in zip(self.memory.groups, self._plain_masks(decisions), strict=True):
            counts = [next(known) for _ in masks]
            counts = [own if len(own) > 1 else own * len(group.heads) for own in counts]
            self.whole = bool(next(known)[0]) and self.whole
            buckets: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for at, each in enumerate(zip(*counts, strict=True)):
                buckets[each].append(at)
            for each, at in buckets.items():
                heads = [group.heads[i] for i in at]
                where = upload(at, self._like, torch.int64)
                own = [m if len(m) == 1 else m.index_select(0, where) for m in masks]
                out.append(coded(group.only(heads), own, each, codecs, room))
                self.version += any(each)  # nothing new: coded rows stay where they are
        self.memory = Rows(out, self.geometry.heads).coalesced()

    def _plain_masks(self, decisions: Sequence[Recode]) -> list[list[Tensor]]:
        """Per group, the plain rows ``[1 or h, n]`` that each decision is the first to name."""
        found = []
        for i, group in enumerate(self.memory.groups):
            masks, taken = [], None
            for decision in decisions:
                mask = self.memory.by_group(decision.rows)[i]
                mask = mask[:, len(group) - group.plain.length :]
                masks.append(mask if taken is None else mask & ~taken)
                taken = mask if taken is None else taken | mask
            found.append(masks)
        return found

    def _set(self, name: str, value: Tensor) -> None:
        for group, own in zip(self.memory.groups, self.memory.by_group(value), strict=True):
            old = group.meta[name]
            group.meta[name] = own.to(old).clone()

    def _move(self, decision: Retention) -> None:
        """New times, places and weights."""
        given = {"time": decision.time, "place": decision.place}
        given = {name: x for name, x in given.items() if x is not None}
        if given and self.rotated:
            for i, group in enumerate(self.memory.groups):
                new = dict(group.meta)
                new |= {n: self.memory.by_group(x)[i].to(group.meta[n]) for n, x in given.items()}
                turn = self._angles(new) - self._angles(group.meta)
                self._replace(group, k=rotate(group.payload("k"), turn, self.geometry.rotary.work))
        for name, value in given.items():
            self._set(name, value)
        if decision.weight is not None:
            self._set("weight", decision.weight)
            self.weighted = True

    def _match(self, match: Match) -> None:
        pairs = zip(*(self.memory.by_group(x) for x in (match.rows, match.like)), strict=True)
        for group, (rows, like) in zip(self.memory.groups, pairs, strict=True):
            angles, work = self._angles(group.meta), self.geometry.rotary.work
            new = {}
            for name in ("k", "v"):
                if not (match.keys if name == "k" else match.values):
                    continue
                x = wide(group.payload(name))
                turned = name == "k" and self.rotated
                x = rotate(x, -angles, work) if turned else x
                x = matched(x, rows, like, match.share)
                x = rotate(x, angles, work) if turned else x
                new[name] = x.to(group.plain.rows[name].dtype)
            self._replace(group, **new)

    def _replace(self, group: Group, **payload: Tensor) -> None:
        """Store all rows of a group as computed."""
        rows = {name: payload.get(name, group.payload(name)) for name in ("k", "v")}
        group.coded, group.plain = [], Segment(rows, len(group))

    def _angles(self, meta: dict[str, Tensor]) -> Tensor:
        return self.geometry.rotary.angles(meta["time"], *meta["place"].unbind(-1))


def _counts(rows: Rows, mask: Tensor, known: Known) -> list[list[list[int]]]:
    """Numbers of :meth:`Rows.counted` out of what was fetched."""
    return [[next(known) for _ in range(1 + (len(x) > 1))] for x in rows.by_group(mask)]


def _flat(nested: list[list[Tensor]]) -> list[Tensor]:
    return [x for own in nested for x in own]


def _still(frames: tuple[int, ...], there: list[int]) -> tuple[int, ...]:
    return tuple(frame for frame, yes in zip(frames, there, strict=True) if yes)


def _each(x: Tensor, count: int) -> Tensor:
    """Every entry of ``[n]`` so many times in a row, ``[1, n * count]``."""
    return x.unsqueeze(-1).expand(-1, count).reshape(1, -1)
