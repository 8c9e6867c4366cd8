"""How frames are scored against the queries at hand and against each other, and the best picked."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_kv.cache.rows import Group
from lightning_kv.cache.view import CacheView

ROUNDING = 1e-6  # of a frame: less than any token
FLAT = 1e-6  # a spread below this share of the largest score is rounding, not a preference


def top_frames(score: Tensor, lengths: Tensor, protected: Tensor, size: Tensor) -> Tensor:
    """The best frames of each stream as far as a length goes; protected ones first.

    Frames are taken in the order of their scores, ties to the earlier, until the next one would
    exceed the length.

    Args:
        score: ``[H, Q, F]``.
        lengths: ``[H, Q]`` or ``[H, 1]``, protected frames included.
        protected: bool ``[H, Q, F]``; they are chosen whatever the length.
        size: ``[H, Q, F]``: what of each frame there is, 1 for a whole one; bool will do. Absent
            frames are never chosen.
    """
    present, size = size > 0, size.double()
    key = score.double().masked_fill(protected, torch.inf).masked_fill(~present, -torch.inf)
    order = key.argsort(dim=-1, descending=True, stable=True)
    taken = size.gather(-1, order).cumsum(-1) <= lengths.unsqueeze(-1) + ROUNDING
    return (torch.zeros_like(present).scatter(-1, order, taken) & present) | protected


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def standardised(scores: Tensor, present: Tensor) -> Tensor:
    """Scores minus their mean, over their population standard deviation, along the last axis.

    Args:
        scores: ``[..., F]``.
        present: bool, broadcast to the same; absent frames neither count nor get a score.

    Returns:
        ``[..., F]``; zeros where all scores are alike, and for absent frames.
    """
    present = present.expand_as(scores)
    known = scores.masked_fill(~present, 0.0)
    count = present.sum(-1, keepdim=True).clamp_min(1)
    centred = (known - known.sum(-1, keepdim=True) / count).masked_fill(~present, 0.0)
    spread = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    flat = spread <= FLAT * known.abs().amax(-1, keepdim=True)
    return torch.where(flat, 0.0, centred / spread.masked_fill(flat, 1.0))


def pooled(x: Tensor, bucket: Tensor, shape: tuple[int, int], mean_share: float) -> Tensor:
    """One vector per frame: the mean over token groups of a mix of their mean and maximum.

    The double mean of dot products between the pooled groups of two frames is the dot product of
    these vectors, so this is all that a mean logit needs (Focused Forcing, arXiv 2605.18346).

    Args:
        x: Keys or queries ``[h, N, D]``.
        bucket: int64 ``[h, N]``: frame x P + token group of each row.
        shape: Number of frames F and of token groups P of a frame.
        mean_share: The share of the mean; the rest is the element-wise maximum.

    Returns:
        ``[h, F, D]``; zeros for a frame without rows.
    """
    frames, groups = shape
    x = wide(x)
    heads, _, width = x.shape
    index = bucket.unsqueeze(-1).expand_as(x)
    blank = x.new_zeros(heads, frames * groups, width)
    count = x.new_zeros(heads, frames * groups).scatter_add(1, bucket, x.new_ones(bucket.shape))
    mean = blank.scatter_add(1, index, x) / count.clamp_min(1).unsqueeze(-1)
    top = blank.scatter_reduce(1, index, x, "amax", include_self=False)
    mixed = (mean_share * mean + (1 - mean_share) * top).unflatten(1, (frames, groups))
    filled = (count > 0).unflatten(1, (frames, groups)).sum(2, keepdim=True)
    return mixed.sum(2) / filled.clamp_min(1)


def earliest(present: Tensor, count: int) -> Tensor:
    """The first ``count`` frames that are there, of bool ``[..., F]``."""
    return present & (present.cumsum(-1) <= count)


def pooled_logits(
    view: CacheView, keys: Tensor, groups: int | None, mean_share: float, per_query_frame: bool
) -> Tensor:
    """Logits between pooled queries and pooled keys ``[H, F, D]``, ``[H, Q or 1, F]``."""
    query = pooled_flight(view, view.query, groups, mean_share)
    if not per_query_frame:
        query = query.mean(1, keepdim=True)
    return query @ keys.transpose(1, 2) / query.shape[-1] ** 0.5


def pooled_keys(view: CacheView, groups: int | None, mean_share: float) -> Tensor:
    """:func:`pooled` of each held frame, as the queries meet it, ``[H, F, D]``; counts its rows."""
    found, groups = [], groups or view.geometry.grid[0]
    for group, keys in zip(view.groups, view.read_keys, strict=True):
        place = token_group(group.meta["place"], view.geometry.tokens, groups)
        bucket = (view.frame_index(group) * groups + place).expand(len(group.heads), -1)
        view.scored += len(group.heads) * len(group)
        past = keys[:, : len(group)]
        found.append(pooled(past, bucket, (len(view.frame_ids), groups), mean_share))
    return by_head(view.groups, found)


def pooled_flight(view: CacheView, x: Tensor, groups: int | None, mean_share: float) -> Tensor:
    """:func:`pooled` of the frames in flight, ``[H, Q, D]``, from queries or keys ``[H, T, D]``."""
    groups = groups or view.geometry.grid[0]
    tokens, frames = view.geometry.tokens, view.query_frames
    place = token_group(torch.arange(tokens, device=x.device), tokens, groups)
    ids = torch.arange(frames, device=x.device).unsqueeze(1)
    bucket = (ids * groups + place).flatten().expand(len(x), -1)
    return pooled(x, bucket, (frames, groups), mean_share)


def token_group(place: Tensor, tokens: int, groups: int) -> Tensor:
    """Which of ``groups`` runs of consecutive raster tokens a place belongs to."""
    return (place.long() * groups).div(tokens, rounding_mode="floor")


def diversity(view: CacheView) -> Tensor:
    """How unlike the average history each frame is, ``[H, F]``; counts its rows.

    Minus the mean over tokens of the cosine between a key and the mean key of its place (Focused
    Forcing, arXiv 2605.18346).
    """
    tokens, found = view.geometry.tokens, []
    for group, keys in zip(view.groups, view.read_keys, strict=True):
        past = wide(keys[:, : len(group)])
        view.scored += len(past) * len(group)
        place = group.meta["place"].long().expand(len(past), -1)
        index = place.unsqueeze(-1).expand_as(past)
        total = past.new_zeros(len(past), tokens, past.shape[-1]).scatter_add(1, index, past)
        alike = torch.cosine_similarity(past, total.gather(1, index), dim=-1)
        frame = view.frame_index(group).expand(len(past), -1)
        summed = alike.new_zeros(len(past), len(view.frame_ids)).scatter_add(1, frame, alike)
        found.append(-summed)
    rows = view.rows_per_frame.clamp_min(1)
    return by_head(view.groups, found) / rows


def by_head(groups: list[Group], found: list[Tensor]) -> Tensor:
    """Results per group ``[h, ...]`` put together in the order of heads, ``[H, ...]``."""
    heads = torch.tensor([head for group in groups for head in group.heads])
    return torch.cat(found)[heads.argsort().to(found[0].device)]
