"""What is remembered of each held frame from one clean pass to the next.

A pass shows every layer for itself; what it shows is put together once the last layer has been
seen, for all layers in one go. Layers and heads hold different frames: lists of all layers are as
long as the longest, and ``there`` says what a head holds. Between passes each head has numbers of
its own frames alone: all heads together hold several times as many.

Shapes: L layers, H heads, F frames of the longest list, n frames that become final, R sampled
queries, N held rows, P rows in flight, D head width, S numbers of a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from lightning_kv.cache.host import compact, upload
from lightning_kv.cache.rotary import wide
from lightning_kv.cache.table import BLOCK
from lightning_kv.cache.view import CacheView, PassView

State = dict[Any, Any]
Frames = tuple[int, ...]

DECAY = 0.8  # of a running mass, from one chunk to the next
PAST = 3  # earlier chunks whose mass is looked at on its own

MASSES = ("last", *(f"ago{back}" for back in range(1, PAST + 1)), "running", "total", "peak")
NORMS = ("key", "spread", "value", "motion")
STATS = (*MASSES, "since", "birth", *NORMS, "logit", "top")
"""Numbers that are remembered of each frame, in this order."""

AT = {name: place for place, name in enumerate(STATS)}
"""Their places."""


@dataclass(frozen=True)
class Rows:
    """What the rows of some frames of one layer are like.

    Args:
        frames: Ids.
        keys: Mean key before rotation, float32 ``[H, f, D]``.
        values: Mean value, ``[H, f, D]``.
        norms: Mean and deviation of the lengths of keys, and mean length of values ``[H, f, 3]``.
    """

    frames: Frames
    keys: Tensor
    values: Tensor
    norms: Tensor


@dataclass(frozen=True)
class Glance:
    """What a clean pass shows of one layer.

    Args:
        frames: Ids of what is held, and of what becomes final behind it.
        looked: Mass, mean logit and mean of the largest logit by frame, ``[H, F, 3]``.
        there: Which frames a head holds, bool ``[H, F]``.
        fresh: The n frames that become final; then those that nothing was known of.
        query: Mean query before rotation of the new frames, ``[H, D]``.
        held: Frames that its heads hold, put together; None where the host cannot know it, or where
            one may come back to a head.
    """

    frames: Frames
    looked: Tensor
    there: Tensor
    fresh: Rows
    query: Tensor
    held: int | None


@dataclass(frozen=True)
class Seen:
    """What is remembered of the frames of all layers, as of the last clean pass.

    Args:
        frames: Ids of each layer, ascending; those that became final are the last.
        stats: float32 ``[L, H, F, S]``, see :data:`STATS`; here and in the next two one line for
            each frame that a head holds where they are :meth:`packed`.
        keys: Mean key before rotation of each frame, ``[L, H, F, D]``.
        values: Mean value of each, ``[L, H, F, D]``.
        there: Which of them a head holds, bool ``[L, H, F]``.
        query: Mean query before rotation of the newest chunk, ``[L, H, D]``.
        past: Mean query since the prompt switched, ``[L, H, D]``.
        queries: How many went into that; 0 just after a switch.
        chunks: Clean passes since the prompt switched.
        everywhere: Ids of the frames of any layer, ascending.
        shared: Last and running mass of each in the heads that hold it, ``[2, F' + 1]``; behind
            them 0, for frames that none has seen.
    """

    frames: tuple[Frames, ...]
    stats: Tensor
    keys: Tensor
    values: Tensor
    there: Tensor
    query: Tensor
    past: Tensor
    queries: int
    chunks: int
    everywhere: Frames
    shared: Tensor

    def packed(self, count: int) -> Seen:
        """Without places of frames that a head does not hold.

        Args:
            count: How many are held, by all heads of all layers.
        """
        index = compact(self.there.flatten(), count)
        return self._with(lambda own: own.flatten(0, 2).index_select(0, index))

    def spread(self) -> Seen:
        """With a place for every frame of a layer again; 0 where a head does not hold it."""
        if self.stats.ndim == 4:
            return self
        there = self.there.flatten()
        index, absent = (there.cumsum(0) - 1).clamp_min(0), ~there.unsqueeze(-1)
        return self._with(
            lambda own: (
                own.index_select(0, index).masked_fill(absent, 0.0).view(*self.there.shape, -1)
            )
        )

    def _with(self, change: Callable[[Tensor], Tensor]) -> Seen:
        """Another layout of what is remembered of frames."""
        names = ("stats", "keys", "values")
        return replace(self, **{name: change(getattr(self, name)) for name in names})


# -- a pass ----------------------------------------------------------------------------------


def observe_frames(view: PassView, state: State, queries: int) -> None:
    """Look at a pass that makes frames final; in ``state["seen"]`` after the last layer.

    Frames that a rebuild makes anew get its keys and values. Frames that become final in a noisy
    pass are written down as such: nothing can be said of them.

    Args:
        view: Of a pass.
        state: Of the part.
        queries: How many of the new frames' queries look, evenly spaced.
    """
    if not view.step.final:
        return
    if not view.clean:
        state["noisy"] = True
        return
    if view.step.rebuild:
        _renew(view, state)
        return
    glances: dict[int, Glance] = state.setdefault("glances", {})
    glances[view.layer] = _glance(view, state.get("seen"), queries)
    if len(glances) == view.geometry.layers:
        count = len(view.step.final)
        every = [glances[layer] for layer in sorted(glances)]
        rows = count * view.geometry.tokens
        old: Seen | None = state.get("seen")
        seen = _after(old and old.spread(), every, count, rows)
        held = [own.held for own in every if own.held is not None]
        state["seen"] = seen.packed(sum(held)) if len(held) == len(every) else seen
        del state["glances"]


def forget_prompt(state: State) -> None:
    """A prompt switch: queries to come are no longer like those of the past."""
    if "seen" in state:
        state["seen"] = replace(state["seen"], queries=0, chunks=0)


def _glance(view: PassView, old: Seen | None, queries: int) -> Glance:
    """What a clean pass shows of one layer."""
    final = view.step.final
    fresh = _own_rows(view)
    known = set(() if old is None else old.frames[view.layer])
    if lost := tuple(frame for frame in view.frames if frame not in known):
        fresh = _together(fresh, held_rows(view, lost))
    looked = _looked(view, queries)
    there = looked.new_ones(looked.shape[:2], dtype=torch.bool)
    if view.frames:
        there[:, : len(view.frames)] = view.present
    query = wide(view.raw_query[:, view.final]).mean(1)
    held = None
    if view.whole and not len(view.archive):
        held = sum(view.lengths) // view.geometry.tokens + view.heads * len(final)
    return Glance((*view.frames, *final), looked, there, fresh, query, held)


def _own_rows(view: PassView) -> Rows:
    """Of the frames that become final."""
    count = len(view.step.final)
    keys, values = (
        wide(x[:, view.final]).unflatten(1, (count, -1))
        for x in (view.own_keys("raw"), view.own_values())
    )
    lengths = keys.norm(dim=-1)
    norms = [lengths.mean(2), lengths.std(2, correction=0), values.norm(dim=-1).mean(2)]
    return Rows(view.step.final, keys.mean(2), values.mean(2), torch.stack(norms, -1))


def held_rows(view: CacheView, frames: Frames) -> Rows:
    """Of held frames that come back from an archive, or were made of others."""
    keys, values = wide(view.keys("raw")), wide(view.values())
    lengths = keys.norm(dim=-1)
    lines = torch.stack([lengths, lengths.square(), values.norm(dim=-1)], -1)
    every = torch.cat([keys, values, lines], -1).transpose(1, 2)
    index = upload([view.frames.index(frame) for frame in frames], keys, torch.int64)
    mean = view.by_frame(every, "mean").index_select(2, index).transpose(1, 2)
    mean_keys, mean_values, norms = mean.split([keys.shape[-1], values.shape[-1], 3], -1)
    length, square, value = norms.unbind(-1)
    spread = (square - length.square()).clamp_min(0).sqrt()
    return Rows(frames, mean_keys, mean_values, torch.stack([length, spread, value], -1))


def _together(first: Rows, second: Rows) -> Rows:
    every = zip(*((own.keys, own.values, own.norms) for own in (first, second)), strict=True)
    return Rows(first.frames + second.frames, *(torch.cat(x, 1) for x in every))


def _looked(view: PassView, queries: int) -> Tensor:
    """Mass, mean logit and mean of the largest logit of sampled queries, ``[H, F + n, 3]``."""
    tokens, first = view.geometry.tokens, view.final.start // view.geometry.tokens
    count = len(view.step.final)
    each = min(tokens, -(-queries // count))
    view.scored += sum(view.lengths) * count * each
    size, found = max(1, BLOCK // (view.heads * (len(view) + view.flight))), []
    for frame, rows in _sampled(tokens, each, first, count, view.apart):
        index = upload(rows, view.query, torch.int64)
        for some in index.split(size):
            logits = view.logits(view.query.index_select(1, some), frame)
            found.append(_by_frame(view, logits))
    total = found[0] if len(found) == 1 else torch.stack(found).sum(0)
    return total / (count * each)


@lru_cache(maxsize=256)
def _sampled(
    tokens: int, each: int, first: int, count: int, apart: bool
) -> tuple[tuple[int, Frames], ...]:
    """Evenly spaced rows of the query; frame by frame where these meet rows at other times."""
    step = (tokens - 1) / (each - 1) if each > 1 else 0.0
    spread = [round(number * step) for number in range(each)]
    frames = range(first, first + count)
    found = [(frame, tuple(frame * tokens + row for row in spread)) for frame in frames]
    if apart:
        return tuple(found)
    return ((0, tuple(row for _, rows in found for row in rows)),)


def _by_frame(view: PassView, logits: Tensor) -> Tensor:
    """Mass, mean logit and largest logit by frame of ``[H, r, N + P]``, summed over r."""
    tokens, held = view.geometry.tokens, len(view)
    both = torch.stack([logits.softmax(-1).sum(1), logits.sum(1)], 1)  # [H, 2, N + P]
    own = _whole(both[..., held:], logits[..., held:], tokens)
    first = view.final.start // tokens
    own = own[:, first : first + len(view.step.final)]
    if not view.frames:
        return own
    if view.whole:
        mine = pad(_whole(both[..., :held], logits[..., :held], tokens), (0, 0, 0, 1))
        slot = view.slot_of.unsqueeze(-1).expand(len(mine), -1, 3)
        return torch.cat([mine.gather(1, slot), own], 1)
    both = both[..., :held].masked_fill(~view.valid.unsqueeze(1), 0.0)
    mass, logit = view.by_frame(both).unbind(1)
    top = view.by_frame(logits[..., :held], "max").sum(1)
    mine = torch.stack([mass, logit / view.rows_per_frame.clamp_min(1), top], -1)
    return torch.cat([mine.masked_fill(~view.present.unsqueeze(-1), 0.0), own], 1)


def _whole(both: Tensor, logits: Tensor, tokens: int) -> Tensor:
    """:func:`_by_frame` of frames that lie whole one after the other, ``[H, frames, 3]``."""
    mass, logit = both.unflatten(-1, (-1, tokens)).sum(-1).unbind(1)
    top = logits.unflatten(-1, (-1, tokens)).amax(-1).sum(1)
    return torch.stack([mass, logit / tokens, top], -1)


# -- all layers ------------------------------------------------------------------------------


def stacked(every: Sequence[Tensor]) -> Tensor:
    """Tensors ``[H, F, ...]`` of several layers, with zeros behind shorter ones, as one."""
    most = max(x.shape[1] for x in every)
    if all(x.shape[1] == most for x in every):
        return torch.stack(list(every))
    blank = [0, 0] * (every[0].ndim - 2)
    return torch.stack([pad(x, (*blank, 0, most - x.shape[1])) for x in every])


def indices(rows: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """Rows of numbers as int64 ``[L, longest]``, with 0 behind shorter ones."""
    most = max(map(len, rows))
    flat = [x for row in rows for x in (*row, *(0,) * (most - len(row)))]
    return upload(flat, like, torch.int64).view(len(rows), most)


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """Places ``[L, F']`` of ``[L, H, F, ...]``, as ``[L, H, F', ...]``."""
    index = index.view(len(index), 1, -1, *(1,) * (x.ndim - 3))
    return x.gather(2, index.expand(-1, x.shape[1], -1, *x.shape[3:]))


def cosine_of(x: Tensor, y: Tensor) -> Tensor:
    """Cosine along the last axis; 0 for vectors of no length."""
    return (normalize(x, dim=-1) * normalize(y, dim=-1)).sum(-1)


def places(
    known: Sequence[Frames], fresh: Sequence[Frames], wanted: Sequence[Frames]
) -> list[list[int]]:
    """Where frames of each layer lie among what is known and, behind it, what is fresh."""
    width, found = max(map(len, known), default=0), []
    for old, new, own in zip(known, fresh, wanted, strict=True):
        place = {frame: number for number, frame in enumerate(old)}
        place |= {frame: width + number for number, frame in enumerate(new)}
        found.append([place[frame] for frame in own])
    return found


def _after(old: Seen | None, every: list[Glance], count: int, rows: int) -> Seen:
    """What is remembered after a pass.

    Args:
        old: What was before.
        every: What each layer has shown.
        count: Frames that became final.
        rows: Their queries.
    """
    fresh = [own.fresh for own in every]
    frames, names = tuple(own.frames for own in every), [own.frames for own in fresh]
    query = torch.stack([own.query for own in every])
    known = [()] * len(every) if old is None else old.frames
    index = indices(places(known, names, frames), query)
    keys, values, norms = (
        stacked([getattr(own, name) for own in fresh]) for name in ("keys", "values", "norms")
    )
    motion = _motion(old, keys, count).unsqueeze(-1)
    masses = AT["birth"] + 1
    stats = torch.cat([pad(norms, (masses, 0)), pad(motion, (0, 2))], -1)
    if old is not None:
        pairs = ((old.stats, stats), (old.keys, keys), (old.values, values))
        stats, keys, values = (torch.cat(pair, 2) for pair in pairs)
    stats, keys, values = (gathered(x, index) for x in (stats, keys, values))
    born = [[frame >= own[-count] for frame in own] for own in frames]
    new = indices(born, query).bool().unsqueeze(1)
    stats = _going_on(stats, stacked([own.looked for own in every]), new)
    there = stacked([own.there for own in every])
    queries = rows + (0 if old is None else old.queries)
    past = query if old is None else old.past.lerp(query, rows / queries)
    chunks = 1 if old is None else old.chunks + 1
    shared = _shared(frames, stats, there)
    return Seen(frames, stats, keys, values, there, query, past, queries, chunks, *shared)


def _motion(old: Seen | None, keys: Tensor, count: int) -> Tensor:
    """1 - cosine of each new frame to the one before; 0 for the first of all, and for others."""
    new = keys[:, :, :count]
    if old is None:
        before = new[:, :, :1]
    else:
        before = gathered(old.keys, indices([[len(own) - 1] for own in old.frames], keys))
    moved = 1 - cosine_of(new, torch.cat([before, new[:, :, :-1]], 2))
    return pad(moved, (0, keys.shape[2] - count))


def _going_on(stats: Tensor, looked: Tensor, new: Tensor) -> Tensor:
    """Numbers of the frames after a pass: masses go on, and begin where a frame is new.

    Args:
        stats: ``[L, H, F, S]`` before; masses of new frames are 0.
        looked: Of the pass, ``[L, H, F, 3]``.
        new: Which frames became final, bool ``[L, 1, F]``.
    """
    now, before = looked[..., 0], stats[..., : len(MASSES)]
    peak = before[..., AT["peak"]]
    since = (stats[..., AT["since"]] + 1).masked_fill(now >= peak, 0.0)
    running = DECAY * before[..., AT["running"]] + (1 - DECAY) * now
    total = before[..., AT["total"]] + now
    birth = stats[..., AT["birth"]].unsqueeze(-1)
    first = torch.cat([before[..., :PAST], birth], -1)  # all that is as born in a new frame
    first = torch.where(new.unsqueeze(-1), now.unsqueeze(-1), first)
    sums = torch.stack([running, total, torch.maximum(peak, now), since], -1)
    norms = stats[..., AT["key"] : AT["logit"]]
    ago, birth = first.split([PAST, 1], -1)
    return torch.cat([now.unsqueeze(-1), ago, sums, birth, norms, looked[..., 1:]], -1)


def _shared(frames: tuple[Frames, ...], stats: Tensor, there: Tensor) -> tuple[Frames, Tensor]:
    """Frames of any layer, and their mean masses in the heads that hold them."""
    everywhere = tuple(sorted({frame for own in frames for frame in own}))
    last, running = stats[..., AT["last"]], stats[..., AT["running"]]
    own = torch.stack([last, running, torch.ones_like(last)], -1) * there.unsqueeze(-1)
    own = pad(own.sum(1), (0, 0, 0, 1))  # [L, F + 1, 3]; the last stands for absent ones
    most, rows = own.shape[1] - 1, []
    for held in frames:
        place = {frame: number for number, frame in enumerate(held)}
        rows.append([place.get(frame, most) for frame in everywhere])
    index = indices(rows, own).unsqueeze(-1).expand(-1, -1, 3)
    last, running, count = own.gather(1, index).sum(0).unbind(-1)
    return everywhere, pad(torch.stack([last, running]) / count.clamp_min(1), (0, 1))


def _renew(view: PassView, state: State) -> None:
    """A rebuild has made frames anew: their keys and values are others, the masses stay."""
    old: Seen | None = state.get("seen")
    if old is None:
        return
    mine = old.frames[view.layer]
    known = [number for number, frame in enumerate(view.step.final) if frame in mine]
    if not known:
        return
    old = old.spread()
    own, like = _own_rows(view), old.stats
    there = upload([mine.index(view.step.final[number]) for number in known], like, torch.int64)
    taken = upload(known, like, torch.int64)
    changed = {name: getattr(old, name).clone() for name in ("stats", "keys", "values")}
    norms = slice(AT["key"], AT["motion"])
    for name, new in (("keys", own.keys), ("values", own.values)):
        changed[name][view.layer].index_copy_(1, there, new.index_select(1, taken))
    stats = changed["stats"][view.layer, :, :, norms]
    stats.index_copy_(1, there, own.norms.index_select(1, taken))
    state["seen"] = replace(old, **changed)
