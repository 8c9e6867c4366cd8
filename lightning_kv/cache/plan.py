"""From what a part says to what a kernel reads: decided once, read in many passes.

A plan names, for each group of heads and each number of rows, the streams that read so many and the
rows they read; the numbers are on the host, the names on the device. A pass with a plan in force
waits for nothing.

Shapes: H heads, h of a group, Q query frames, s streams (a head and a query frame), F frames, N
rows of the table, n of a group, P rows in flight, u units of them (whole frames or single rows), m
that are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Selection
from lightning_kv.cache.host import compact, fetch, upload
from lightning_kv.cache.kernels import Block, ReadPlan, reference
from lightning_kv.cache.passes import Pass
from lightning_kv.cache.rows import Group
from lightning_kv.cache.store import LayerStore
from lightning_kv.cache.view import PassView

Masks = tuple[Tensor | None, Tensor | None]


def masks(selection: Selection | None, view: PassView) -> Masks:
    """What is read of committed rows ``[1 or H, 1 or Q, N]``, and of those in flight; None: all."""
    if selection is None:
        return None, None
    held = selection.rows
    if held is not None:
        held = held & view.valid.unsqueeze(1)
    if selection.frames is not None:
        held = view.at_rows(_chosen(selection, view)) & view.valid.unsqueeze(1)
    own = selection.current
    if own is not None and own.shape[2] != view.flight:
        own = own.repeat_interleave(view.flight // own.shape[2], dim=2)
    return held, own


def bias_of(selection: Selection | None, view: PassView) -> Tensor | None:
    """What is added to the logits, ``[1 or H, 1 or Q, N + P]``, or None."""
    total = None
    if view.log_weight:
        weight = view.weight.clamp_min(1e-30).log().unsqueeze(1)
        total = torch.nn.functional.pad(weight, (0, view.flight))
    if selection is not None and selection.bias is not None:
        total = selection.bias if total is None else total + selection.bias
    return total


def plan_key(step: Pass, store: LayerStore) -> tuple[Any, ...]:
    """What a plan holds for: these frames in flight, and this memory."""
    return step.chunk, step.frames, step.query_times, step.rebuild, store.version


def read_by_masks(plan: ReadPlan, view: PassView, q: Tensor, own: dict[str, Tensor]) -> Tensor:
    """What a plan reads, by masks over all that is held: slow and obviously right.

    Args:
        plan: Its selection and lags count.
        view: Of the pass.
        q: Rotated queries ``[H, T, D]``.
        own: Keys ``read`` and ``value`` of the frames in flight, ``[H, P, D]``.
    """
    view.lag = plan.lag
    held, mine = masks(plan.selection, view)
    read = None
    if held is not None or mine is not None or view.ragged:
        held = view.valid.unsqueeze(1) if held is None else held
        mine = held.new_ones(1, 1, view.flight) if mine is None else mine
        shape = [max(a, b) for a, b in zip(held.shape[:2], mine.shape[:2], strict=True)]
        read = torch.cat([x.expand(*shape, -1) for x in (held, mine)], dim=2)
    parts = [view.keys_at(i) for i in range(1 if view.lag is None else view.lag.shape[1])]
    keys = torch.stack([torch.cat([x, own["read"]], dim=1) for x in parts], dim=1)
    values = torch.cat([view.values(), own["value"]], dim=1)
    return reference(q, keys, values, read, bias_of(plan.selection, view))


def plan_of(
    view: PassView, selection: Selection | None, key: Any, who: str = "A selection"
) -> ReadPlan:
    """The plan of a pass; waits once where it must know how many rows a selection holds.

    Raises:
        ValueError: A stream reads nothing at all.
    """
    rows, lag = view._rows, view.lag
    bias = bias_of(selection, view)
    given = [] if selection is None else [selection.frames, selection.rows, selection.current]
    masked = [x for x in given if isinstance(x, Tensor)]
    split = max([1, *(x.shape[1] for x in (lag, bias, *masked) if x is not None)])
    chosen = None
    if any(x is not None for x in given):
        chosen = [_units(selection, view, group) for group in rows.groups]
    counts = _counts(selection, view, chosen, split, who)
    apart = split > 1 and (chosen is None or (lag is not None and lag.shape[1] > 1))
    queries = list(range(split)) if apart else [None]
    blocks = []
    for index, group in enumerate(rows.groups):
        for query in queries:
            blocks += _blocks(view, index, group, chosen, counts, split, query, bias)
    read = 0
    for block in blocks:
        whole = len(rows.groups[block.group].heads) * split
        read += block.history * (whole if block.streams is None else len(block.streams))
    return ReadPlan(key, blocks, split, read / split, selection, lag)


def _chosen(selection: Selection, view: PassView) -> Tensor:
    """Frames as a mask ``[1 or H, 1 or Q, F]``."""
    if isinstance(selection.frames, Tensor):
        return selection.frames
    wanted = set(selection.frames)
    return upload([f in wanted for f in view.frames], view._like, torch.bool).view(1, 1, -1)


def _units(selection: Selection, view: PassView, group: Group) -> tuple[Tensor, int, int]:
    """Units that are read ``[1 or h, 1 or Q, u]``, rows of each, and how many are committed."""
    heads, tokens, flight = view.heads, view.geometry.tokens, view.flight
    fits = selection.current is None or selection.current.shape[2] * tokens == flight
    if selection.frames is not None and view.whole and fits:
        size, index = tokens, view._rows.by_group(view.frame_index)[_at(view, group)]
        index = index[:, ::tokens].unsqueeze(1)
        mask = group.of(_chosen(selection, view), heads)
        lines = max(len(mask), len(index))
        held = mask.expand(lines, -1, -1).gather(2, index.expand(lines, mask.shape[1], -1))
        own = selection.current
    else:
        size, (held, own) = 1, masks(selection, view)
        if held is None:
            held = view.valid.unsqueeze(1)
        held = group.of(held, heads)[:, :, : len(group)]
    if own is None:
        own = held.new_ones(1, 1, flight // size)
    own = group.of(own, heads)
    shape = [max(a, b) for a, b in zip(held.shape[:2], own.shape[:2], strict=True)]
    both = [x.expand(*shape, -1) for x in (held, own)]
    return torch.cat(both, dim=2), size, held.shape[2]


def _at(view: PassView, group: Group) -> int:
    return next(i for i, other in enumerate(view._rows.groups) if other is group)


def _counts(
    selection: Selection | None,
    view: PassView,
    chosen: list[tuple[Tensor, int, int]] | None,
    split: int,
    who: str,
) -> list[list[tuple[int, int]]] | None:
    """Units in all, and committed ones, of every stream, group by group."""
    if chosen is None:
        return None
    groups, known = view._rows.groups, selection.count
    shared = len(groups) == 1 and all(len(x) == 1 for x in groups[0].meta.values())
    if known is None and isinstance(selection.frames, tuple) and shared:
        known = len({*selection.frames} & {*view.frames})
    if known is not None and view.whole and selection.current is None:
        out = []
        for group, (mask, _, held) in zip(groups, chosen, strict=True):
            own = mask.shape[2] - held
            each = [known if isinstance(known, int) else known[head] for head in group.heads]
            each = [min(n, held) for n in each]
            if isinstance(selection.frames, Tensor):
                wanted = upload(each, mask, torch.int64).unsqueeze(1)
                view.doubt(
                    (mask[:, :, :held].sum(2) != wanted).any(),
                    f"{who} says that {known} frames are read in each stream, and its mask has "
                    "another number. "
                    "Leave out `count`, or give the right one.",
                )
            out.append([(n + own, n) for n in each for _ in range(split)])
        return out
    asked = [part.sum(2) for mask, _, held in chosen for part in (mask, mask[:, :, :held])]
    wide = []
    for x, group in zip(asked, [g for g in groups for _ in range(2)], strict=True):
        wide.append(x.expand(len(group.heads), split) if x.shape[1] in (1, split) else x)
    said = [x for x, _ in view.doubts]
    found = fetch([*wide, *said])
    raised([text for (_, text), yes in zip(view.doubts, found[len(wide) :], strict=True) if yes[0]])
    view.doubts.clear()
    out = [list(zip(found[2 * i], found[2 * i + 1], strict=True)) for i in range(len(groups))]
    if any(total == 0 for own in out for total, _ in own):
        raise ValueError(
            f"{who} leaves a head with nothing to read. Every stream reads at least one row, "
            "usually its own chunk."
        )
    return out


def raised(texts: list[str]) -> None:
    """Raise the first fault that a device has reported."""
    if texts:
        raise ValueError(texts[0])


def _blocks(
    view: PassView,
    index: int,
    group: Group,
    chosen: list[tuple[Tensor, int, int]] | None,
    counts: list[list[tuple[int, int]]] | None,
    split: int,
    query: int | None,
    bias: Tensor | None,
) -> list[Block]:
    """Calls of the kernel for one group (and one query frame)."""
    heads = len(group.heads)
    streams = [h * split + q for h in range(heads) for q in range(split) if query in (None, q)]
    every = len(streams) == heads * split
    if chosen is None:
        names = None if every else upload(streams, view._like, torch.int64)
        made = Block(index, names, None, len(group))
        return [_placed(made, view, group, split, query, bias, None)]
    mask, size, _ = chosen[index]
    buckets: dict[tuple[int, int], list[int]] = {}
    for stream in streams:
        buckets.setdefault(counts[index][stream], []).append(stream)
    out = []
    for (total, held), own in buckets.items():
        whole = len(own) == heads * split
        names = None if whole else upload(own, view._like, torch.int64)
        if mask.shape[:2] == (1, 1):
            part = mask[:, 0]
        else:
            part = mask.expand(heads, split, -1).flatten(0, 1)
            part = part if names is None else part.index_select(0, names)
        units = compact(part, total)
        made = Block(index, names, units, held * size, size)
        out.append(_placed(made, view, group, split, query, bias, units))
    return out


def _placed(
    block: Block,
    view: PassView,
    group: Group,
    split: int,
    query: int | None,
    bias: Tensor | None,
    units: Tensor | None,
) -> Block:
    """With the times, places and biases of the rows that are read."""
    rows = units
    if units is not None and block.size > 1:
        inside = torch.arange(block.size, device=units.device)
        rows = (units.unsqueeze(-1) * block.size + inside).flatten(1)
    head = block.streams
    if head is None and split > 1:
        head = torch.arange(len(group.heads) * split, device=view.device)
    if view.lag is not None:
        time = view.read_time
        time = time if time.ndim == 2 else time[:, query or 0]
        held = None if rows is None else rows[:, : block.history]
        block.time = _picked(_own(view, group, time), held, head, split)
        block.place = _picked(_own(view, group, view.place), held, head, split)
    if bias is not None:
        size = len(view)
        own = group.of(bias, view.heads)
        own = torch.cat([own[:, :, : len(group)], own[:, :, size:]], dim=2)
        if own.shape[:2] != (1, 1):
            own = own.expand(len(group.heads), split, -1).flatten(0, 1)
            own = own if block.streams is None else own.index_select(0, block.streams)
        else:
            own = own[:, 0]
        if rows is not None:
            lines = max(len(own), len(rows))
            own = own.expand(lines, -1).gather(1, rows.expand(lines, -1))
        block.bias = own
    return block


def _own(view: PassView, group: Group, x: Tensor) -> Tensor:
    return group.of(x, view.heads)[:, : len(group)]


def _picked(x: Tensor, rows: Tensor | None, head: Tensor | None, split: int) -> Tensor:
    """Entries of ``x`` ``[1 or h, n, ...]`` for each stream, ``[1 or s, m, ...]``."""
    if len(x) > 1 and head is not None:
        x = x.index_select(0, head // split)
    if rows is None:
        return x
    lines = max(len(x), len(rows))
    x, rows = x.expand(lines, *x.shape[1:]), rows.expand(lines, -1)
    if x.ndim == 3:
        rows = rows.unsqueeze(-1).expand(-1, -1, x.shape[2])
    return x.gather(1, rows)
