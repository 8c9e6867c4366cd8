"""One row in place of several that the future cannot tell apart.

Shapes: H heads, U units (frames or rows), N rows, E pairs, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Retention, Sums
from lightning_kv.cache.rotary import rotate, wide
from lightning_kv.cache.table import summed
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.layout import Layout
from lightning_kv.policies.retain.future.proxies import FutureQueries
from lightning_kv.policies.retain.future.redundancy import raw_keys

MERGES = ("drop", "hyperplane", "weight")
ALIGNS = ("raw", "relative")


@dataclass(frozen=True)
class Pairs:
    """Which row of a head goes into which, int64 ``[H, E]``; -1 for none."""

    source: Tensor
    target: Tensor


def ends(gone: Tensor, match: Tensor) -> Tensor:
    """Where a chain of matches ends, ``[H, U]``: the first unit that does not go itself.

    Matches are younger, so a chain ends; its length doubles with each look.
    """
    own = torch.arange(gone.shape[1], device=gone.device).expand_as(match)
    target = torch.where(gone, match, own)
    for _ in range(max(1, gone.shape[1].bit_length())):
        target = target.gather(1, target)
    return target


def limited(source: Tensor, target: Tensor, score: Tensor, most: int) -> Tensor:
    """Of too many sources for one target, those with the largest score; bool ``[H, U]``.

    Args:
        source: bool ``[H, U]``: units that go in somewhere.
        target: ``[H, U]``.
        score: ``[H, U]``.
        most: Sources for one target.
    """
    size = source.shape[1]
    order = score.argsort(dim=1, descending=True, stable=True)
    key = torch.where(source, target, size).gather(1, order)
    ordered, again = key.sort(dim=1, stable=True)
    first = torch.searchsorted(ordered, ordered.contiguous())
    rank = torch.arange(size, device=source.device) - first
    back = order.gather(1, again)
    return source & (torch.empty_like(rank).scatter(1, back, rank) < most)


def row_pairs(
    layout: Layout, gone: Tensor, match: Tensor, kept: Tensor, score: Tensor, most: int
) -> Pairs:
    """Which row goes into which, from units that go and the units that are like them.

    Where a match goes too, its own match takes its place. A unit whose last match is dropped in
    the end is dropped with it.

    Args:
        layout: Of the view.
        gone: Units ``[H, U]`` that are given up.
        match: A younger unit for each of them, ``[H, U]``.
        kept: Units that stay.
        score: Of the units.
        most: Units that may go into one.
    """
    target = ends(gone, match)
    source = limited(gone & kept.gather(1, target), target, score, most)
    heads, units = gone.shape
    own = torch.arange(units, device=gone.device).expand(heads, -1)
    if units != layout.row.shape[1]:
        return Pairs(torch.where(source, own, -1), target)
    row = layout.row.expand(heads, -1, -1)
    other = row.gather(1, target.unsqueeze(-1).expand_as(row))
    both = source.unsqueeze(-1) & (row >= 0) & (other >= 0)
    return Pairs(torch.where(both, row, -1).flatten(1), other.flatten(1).clamp_min(0))


def merged(
    view: CacheView,
    ahead: CacheView,
    asked: FutureQueries,
    kept: Tensor,
    pairs: Pairs,
    how: str,
    align: str,
    limit: float | None,
    state: Any,
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
        kept: Rows that stay ``[1 or H, N]``, the targets included.
        pairs: Which goes into which.
        how: ``hyperplane`` or ``weight``.
        align: ``raw`` averages keys before rotation: what was seen, at the target's time.
            ``relative`` averages rotated keys, each at its own time.
        limit: Largest move of a key onto the hyperplane, as a share of its length.
        state: Counts the moves that were cut short, under ``clipped``.
    """
    size, heads = len(view), view.heads
    fed = torch.where(pairs.source >= 0, pairs.target, size)
    target = torch.zeros(heads, size + 1, dtype=torch.bool, device=view.device)
    target = target.scatter(1, fed, torch.ones_like(fed, dtype=torch.bool))[:, :size]
    own = torch.arange(size, device=view.device).expand(heads, -1)
    source = torch.cat([torch.where(target, own, -1), pairs.source], dim=1)
    into = torch.cat([own, pairs.target], dim=1)
    mean, width = asked.query.mean(1), view.geometry.head_dim**0.5
    logit = (wide(ahead.keys("read")) @ mean.unsqueeze(-1))[..., 0] / width
    logit = logit + (view.weight.clamp_min(1e-30).log() if how == "weight" else 0.0)
    there = source.clamp_min(0)
    share = logit.gather(1, there).masked_fill(source < 0, -torch.inf)
    top = share.new_full((heads, size), -torch.inf).scatter_reduce(1, into, share, "amax")
    part = torch.where(source < 0, 0.0, (share - top.gather(1, into)).exp())
    bucket = torch.where(source < 0, -1, into)
    total = summed(part.unsqueeze(-1), bucket, size)[..., 0]
    coefficient = part / total.gather(1, into).clamp_min(1e-30)
    correction = None
    if how == "hyperplane":
        rows = source, into, bucket, coefficient
        wanted = width * (top + total.clamp_min(1e-30).log())
        correction = _correction(view, ahead, rows, target, mean, wanted, align, limit, state)
    sums = Sums(
        source,
        into,
        coefficient,
        torch.where(target, view.frame_id.long(), -1),
        view.time,
        view.place,
        align=align,
        correction=correction,
    )
    return Retention(sums=sums, keep=kept & ~target)


def _correction(
    view: CacheView,
    ahead: CacheView,
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    target: Tensor,
    mean: Tensor,
    wanted: Tensor,
    align: str,
    limit: float | None,
    state: Any,
) -> Tensor:
    """What to add to the key of each target ``[H, N, D]``; counts moves that were cut short.

    Args:
        view: At commit.
        ahead: The view of the next chunk.
        rows: Source, target, bucket (-1: none) and coefficient of each pair ``[H, E]``.
        target: bool ``[H, N]``: which rows others go into.
        mean: The mean future query ``[H, D]``.
        wanted: Its product with each new key ``[H, N]``.
        align: See :func:`merged`.
        limit: Alike.
        state: Alike.
    """
    source, into, bucket, coefficient = rows
    raw, there, work = raw_keys(view), source.clamp_min(0), view.geometry.rotary.work
    turned = raw.gather(1, there.unsqueeze(-1).expand(-1, -1, raw.shape[2]))
    if align == "relative":
        angles = view.angles(view.time, view.place).expand(len(raw), -1, -1)
        index = [x.unsqueeze(-1).expand(-1, -1, angles.shape[2]) for x in (there, into)]
        turned = rotate(turned, angles.gather(1, index[0]) - angles.gather(1, index[1]), work)
    key = summed(turned * coefficient.unsqueeze(-1), bucket, raw.shape[1])
    at = view.angles(ahead.read_time, view.place)
    step, cut = to_hyperplane(key, at, mean, wanted, limit, work)
    counts = torch.stack([(cut & target).sum(), target.sum()])
    state["clipped"] = state.get("clipped", 0) + counts
    return torch.where(target.unsqueeze(-1), step, 0.0)


def to_hyperplane(
    key: Tensor,
    angles: Tensor,
    mean: Tensor,
    wanted: Tensor,
    limit: float | None,
    work: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """What to add to keys before rotation so that the mean future query meets a product.

    Args:
        key: ``[H, R, D]`` before rotation.
        angles: ``[1 or H, R, D / 2]`` at which the query will find them.
        mean: The mean future query ``[H, D]``, rotated.
        wanted: Its product with each rotated key, ``[H, R]``.
        limit: Largest length, as a share of the key's; None for none.
        work: Smallest dtype in which vectors are turned.

    Returns:
        ``[H, R, D]``, along the query; and whether it was cut short, bool ``[H, R]``.
    """
    mean = mean.unsqueeze(1)
    gap = wanted - (rotate(key, angles, work) * mean).sum(-1)
    step = gap.unsqueeze(-1) * mean / mean.square().sum(-1, keepdim=True).clamp_min(1e-12)
    cut = torch.zeros_like(gap, dtype=torch.bool)
    if limit is not None:
        length = step.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        share = limit * key.norm(dim=-1, keepdim=True) / length
        step, cut = step * share.clamp_max(1.0), share[..., 0] < 1
    return rotate(step, -angles, work), cut
