"""One row in place of several that the future cannot tell apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Merge, Retention
from lightning_kv.cache.rotary import rotate
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.layout import Layout
from lightning_kv.policies.proxies import FutureQueries
from lightning_kv.policies.redundancy import raw_keys
from lightning_kv.policies.scores import wide

MERGES = ("drop", "hyperplane", "weight")
ALIGNS = ("raw", "relative")
STEP = 0.1  # largest correction of a key, as a share of its length


@dataclass(frozen=True)
class Pairs:
    """Which row of a head goes into which, both as row indices ``[E]``; a target stays itself."""

    source: Tensor
    target: Tensor


def row_pairs(
    layout: Layout, gone: Tensor, match: Tensor, kept: Tensor, score: Tensor, most: int
) -> list[Pairs]:
    """Which row goes into which, from units that go and the units that are like them.

    Where a match goes too, its own match takes its place. A unit whose last match is dropped in
    the end is dropped with it.

    Args:
        layout: Of the view.
        gone: Units ``[H, U]`` that are given up.
        match: A younger unit for each of them, ``[H, U]``.
        kept: Units that stay.
        score: Of the units: of too many for one target, those with the largest go in.
        most: Units that may go into one.
    """
    found = []
    rows = layout.row.flatten(2) if gone.shape[1] == layout.row.shape[1] else layout.row.flatten(1)
    for head in range(len(gone)):
        target = match[head]
        while bool(gone[head][target].any()):
            target = torch.where(gone[head][target], match[head][target], target)
        source = (gone[head] & kept[head][target]).nonzero().flatten()
        source, target = limited(source, target[source], score[head][source], most)
        start, end = (rows[head][unit].flatten() for unit in (source, target))
        both = (start >= 0) & (end >= 0)
        found.append(Pairs(start[both], end[both]))
    return found


def limited(source: Tensor, target: Tensor, score: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """At most so many sources ``[E]`` for one target, those with the largest score first."""
    order = score.argsort(descending=True, stable=True)
    source, target = source[order], target[order]
    order = target.argsort(stable=True)
    source, target = source[order], target[order]
    rank = torch.arange(len(target), device=target.device) - torch.searchsorted(target, target)
    return source[rank < most], target[rank < most]


def merged(
    view: CacheView,
    ahead: CacheView,
    asked: FutureQueries,
    kept: list[Tensor],
    pairs: list[Pairs],
    how: str,
    align: str,
) -> Retention:
    """The retention that keeps some rows and lets others stand for several.

    A source counts by the mass that the mean future query gives it. What that query gives to all
    of them together, the new row gets too: by moving its key onto the hyperplane of that logit
    (``hyperplane``; Future Forcing, arXiv 2605.30083, as rebuilt here), or by the number of tokens
    it stands for (``weight``; needs ``bias: log_weight``).

    Args:
        view: At commit.
        ahead: The view of the next chunk.
        asked: The queries to come.
        kept: Rows that stay, per head, the targets included.
        pairs: Per head.
        how: ``hyperplane`` or ``weight``.
        align: ``raw`` averages keys before rotation: what was seen, at the target's time.
            ``relative`` averages rotated keys, each at its own time.
    """
    raw, merges, left = raw_keys(view), [], []
    for head in range(view.heads):
        own = pairs[head]
        if not len(own.source):
            merges.append(None)
            left.append(kept[head])
            continue
        index = next(i for i, group in enumerate(view.groups) if head in group.heads)
        at = view.groups[index].heads.index(head)
        mean = asked.query[head].mean(0)
        merges.append(_merge(view, ahead, index, at, raw[index][at], mean, own, how, align))
        left.append(kept[head][~torch.isin(kept[head], own.target)])
    return Retention(keep=left, merge=merges)


def _merge(
    view: CacheView,
    ahead: CacheView,
    index: int,
    at: int,
    raw: Tensor,
    mean: Tensor,
    pairs: Pairs,
    how: str,
    align: str,
) -> Merge:
    """The merge of one head: position ``at`` of the group ``index``."""
    group = view.groups[index]
    meta = {name: group.expanded(name)[at] for name in ("frame_id", "time", "place", "weight")}
    rows, inverse = pairs.target.unique(return_inverse=True)
    own = torch.arange(len(rows), device=rows.device)
    source, target = torch.cat([rows, pairs.source]), torch.cat([own, inverse])
    width = raw.shape[-1] ** 0.5
    logit = wide(ahead.read_keys[index][at]) @ mean / width
    share = logit[source] + (meta["weight"][source].log() if how == "weight" else 0.0)
    top = share.new_full((len(rows),), -torch.inf).scatter_reduce(0, target, share, "amax")
    part = (share - top[target]).exp()
    total = part.new_zeros(len(rows)).index_add(0, target, part)
    coefficient = part / total[target]
    correction = None
    if how == "hyperplane":
        angles = view.cell.angles(meta["time"], meta["place"])
        turned = raw[source]
        if align == "relative":
            turned = rotate(turned, angles[source] - angles[rows][target])
        key = raw.new_zeros(len(rows), raw.shape[-1])
        key = key.index_add(0, target, turned * coefficient.unsqueeze(-1))
        seen = ahead.read_times[index].expand(len(group.heads), -1)[at][rows]
        there = view.cell.angles(seen, meta["place"][rows])
        correction = to_hyperplane(key, there, mean, width * (top + total.log()))
    return Merge(
        source,
        target,
        coefficient,
        meta["frame_id"][rows],
        meta["time"][rows],
        meta["place"][rows],
        align=align,
        correction=correction,
    )


def to_hyperplane(key: Tensor, angles: Tensor, mean: Tensor, wanted: Tensor) -> Tensor:
    """What to add to keys before rotation so that the mean future query meets a product.

    Args:
        key: ``[R, D]`` before rotation.
        angles: ``[R, D / 2]`` at which the query will find them.
        mean: The mean future query ``[D]``, rotated.
        wanted: Its product with each rotated key, ``[R]``.

    Returns:
        ``[R, D]``, along the query, never longer than a tenth of the key.
    """
    gap = wanted - rotate(key, angles) @ mean
    step = gap.unsqueeze(-1) * mean / mean.square().sum().clamp_min(1e-12)
    length = step.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    step = step * (STEP * key.norm(dim=-1, keepdim=True) / length).clamp_max(1.0)
    return rotate(step, -angles)
