"""Which rows could stand for each other."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_kv.cache.rotary import wide
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.layout import Layout
from lightning_kv.policies.retain.future.proxies import FutureQueries

METRICS = ("content", "future", "cosine")


def features(
    metric: str, view: CacheView, ahead: CacheView, asked: FutureQueries, layout: Layout
) -> Tensor:
    """Rows as points ``[H, F, T, E]`` whose mean squared length is 1 in each head.

    Args:
        metric: ``content``: keys before rotation and values, half each. ``future``: the squared
            distance is the expected squared gap between two rows' logits under the queries to
            come, exact through the square root of their second moment. ``cosine``: directions of
            keys before rotation.
        view: The view at commit.
        ahead: The view of the next chunk.
        asked: The queries to come.
        layout: Of the view.
    """
    if metric == "future":
        keys = layout.spread(wide(ahead.keys("read")))
        return unit_power(torch.einsum("hftd,hde->hfte", keys, root(asked)), layout)
    keys = layout.spread(raw_keys(view))
    if metric == "cosine":
        return torch.nn.functional.normalize(keys, dim=-1)
    values = layout.spread(wide(view.values()))
    both = [unit_power(x, layout) for x in (keys, values)]
    return torch.cat(both, dim=-1) / 2**0.5


def raw_keys(view: CacheView) -> Tensor:
    """Held keys before rotation, ``[H, N, D]``, in float32 or wider."""
    return wide(view.keys("raw"))


def root(asked: FutureQueries) -> Tensor:
    """A root ``[H, D, D]`` of the second moment of the queries to come."""
    query = asked.query.double()
    moment = query.transpose(1, 2) @ query / query.shape[1]
    if asked.variance is not None:
        moment = moment + torch.diag_embed(asked.variance.double().repeat_interleave(2, -1) / 2)
    size = moment.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30).view(-1, 1, 1)
    moment = moment + 1e-10 * size * torch.eye(moment.shape[1], device=moment.device)
    found, _ = torch.linalg.cholesky_ex(moment, check_errors=False)  # any root gives the distances
    return found.to(asked.query.dtype)


def unit_power(x: Tensor, layout: Layout) -> Tensor:
    """Scale ``[H, F, T, E]`` so that the mean squared length over a head's rows is 1."""
    count = layout.there.sum((1, 2)).clamp_min(1)
    power = x.square().sum((1, 2, 3)) / count
    return x / power.clamp_min(1e-12).sqrt().view(-1, 1, 1, 1)


def nearest_newer(
    x: Tensor, layout: Layout, grid: tuple[int, int], radius: int
) -> tuple[Tensor, Tensor]:
    """The most alike row of a younger frame, for every row.

    Args:
        x: Points ``[H, F, T, E]``.
        layout: Where there are rows.
        grid: Token rows and columns of a frame.
        radius: How many tokens further up, down, left or right a match may lie.

    Returns:
        Squared distances ``[H, F, T]`` (infinite where there is no match) and the index of the
        match in the flattened frames and places, int64 ``[H, F, T]``.
    """
    heads, frames, tokens, _ = x.shape
    there, power = layout.there.expand(heads, -1, -1), x.square().sum(-1)
    younger = torch.ones(frames, frames, device=x.device).triu(1).bool().view(1, frames, frames, 1)
    place = torch.arange(tokens, device=x.device)
    best = x.new_full((heads, frames, tokens), torch.inf)
    match = torch.zeros_like(best, dtype=torch.int64)
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            row, column = place // grid[1] + dy, place % grid[1] + dx
            inside = (row >= 0) & (row < grid[0]) & (column >= 0) & (column < grid[1])
            other = (row * grid[1] + column).clamp(0, tokens - 1)
            cross = torch.einsum("hitd,hjtd->hijt", x, x[:, :, other])
            gap = power.unsqueeze(2) + power[:, :, other].unsqueeze(1) - 2 * cross
            allowed = younger & there[:, :, other].unsqueeze(1) & inside
            low, frame = gap.masked_fill(~allowed, torch.inf).min(2)
            closer = (low < best) & there
            best = torch.where(closer, low, best)
            match = torch.where(closer, frame * tokens + other, match)
    return best.clamp_min(0), match


def frame_distances(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The most alike younger frame of every frame: mean squared distance of rows at equal places.

    Returns:
        ``[H, F]`` (infinite where there is none) and its index, int64 ``[H, F]``.
    """
    frames, shared = x.shape[1], layout.there.to(x).expand(len(x), -1, -1)
    flat, power = x.flatten(2), x.square().sum(-1)
    count = shared @ shared.transpose(1, 2)
    one = power @ shared.transpose(1, 2)
    gap = (one + one.transpose(1, 2) - 2 * flat @ flat.transpose(1, 2)) / count.clamp_min(1)
    younger = torch.ones(frames, frames, device=x.device).triu(1).bool()
    low, match = gap.masked_fill(~younger | (count == 0), torch.inf).min(2)
    return low.clamp_min(0), match
