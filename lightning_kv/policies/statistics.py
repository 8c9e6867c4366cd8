"""What parts share: attention mass, query moments, banks, pooled keys, standard scores.

Helpers that gather over passes keep what they need in the part's state and are called from its
``observe``; only parts that ask pay for them.

Shapes: H heads, N rows, P rows in flight, Q query frames, F frames, G spatial cells, R remembered
queries, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.host import upload
from lightning_kv.cache.rotary import wide
from lightning_kv.cache.table import BLOCK, summed
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.layout import Layout

FLAT = 1e-6  # a spread below this share of the largest score is rounding, not a preference
State = dict[Any, Any]

# -- queries ---------------------------------------------------------------------------------


def clean_queries(view: PassView, until: int | None = None) -> Tensor | None:
    """Queries before rotation of the frames that become final now, ``[H, T, D]``, float32 up.

    None in passes over noisy latents, and in those whose frames end beyond ``until`` of them.
    """
    final = view.step.final
    if not view.clean or not final or (until is not None and final[-1] + 1 > until):
        return None
    return wide(view.raw_query[:, view.final])


def spread_rows(tokens: int, rows: int, device: torch.device | str) -> Tensor:
    """At most so many of the tokens, evenly spaced, int64."""
    picked = torch.linspace(0, tokens - 1, min(tokens, rows), dtype=torch.float32, device=device)
    return picked.round().long()


@dataclass
class Moments:
    """What queries before rotation look like, in one layer.

    Args:
        mean: ``[H, G, D]``, one for each spatial cell of the frame.
        variance: ``[H, D / 2]``: mean squared distance of a complex pair from the mean of its cell.
        cell: int64 ``[tokens]``: the cell, 0 to G - 1, of every place of a frame.
        count: Clean passes that went in since the start or the last prompt switch.
        covariance: ``[H, D, D]`` of the queries around the mean of their cell, where asked for.
    """

    mean: Tensor
    variance: Tensor
    cell: Tensor
    count: int
    covariance: Tensor | None = None


def update_moments(
    view: PassView,
    state: State,
    cells: tuple[int, int] = (1, 1),
    rate: float = 0.0,
    covariance: bool = False,
    until: int | None = None,
) -> None:
    """Running mean and variance of the clean queries; in ``state["moments"][layer]``.

    Args:
        view: Of a pass; those over noisy latents change nothing.
        state: Of the part.
        cells: Rows and columns of spatial cells; each has its own mean. Never more than tokens.
        rate: Smallest weight of a new pass: 0 weighs all passes alike, 0.1 forgets old ones.
        covariance: Keep the full covariance too.
        until: Passes that reach beyond so many frames change nothing: the moments are frozen.
    """
    query = clean_queries(view, until)
    if query is None:
        return
    layout = cell_index(view.geometry.grid, cells, query.device)
    cell = layout.repeat(query.shape[1] // len(layout))
    every = torch.arange(count_of(view.geometry.grid, cells), device=query.device)
    share = (cell.unsqueeze(1) == every).to(query)  # [T, G]
    mean = torch.einsum("htd,tg->hgd", query, share / share.sum(0))
    rest = query - mean[:, cell]
    spread = rest.square().mean(1)
    full = rest.transpose(1, 2) @ rest / rest.shape[1] if covariance else None
    old: Moments | None = state.setdefault("moments", {}).get(view.layer)
    if old is not None:
        weight = max(1 / (old.count + 1), rate)
        delta = mean - old.mean
        moved = torch.einsum("hgd,g->hd", delta.square(), share.mean(0))
        if full is not None:
            shift = torch.einsum("hgd,hge,g->hde", delta, delta, share.mean(0))
            full = weight * full + weight * (1 - weight) * shift + (1 - weight) * old.covariance
        mean = old.mean + weight * delta
        spread = weight * spread + weight * (1 - weight) * moved
    variance = spread.unflatten(-1, (-1, 2)).sum(-1)
    if old is not None:
        variance = variance + (1 - weight) * old.variance
    count = 1 if old is None else old.count + 1
    state["moments"][view.layer] = Moments(mean, variance, layout, count, full)


def count_of(grid: tuple[int, int], cells: tuple[int, int]) -> int:
    """Number of cells that a grid has."""
    return min(grid[0], cells[0]) * min(grid[1], cells[1])


def cell_index(
    grid: tuple[int, int], cells: tuple[int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """The spatial cell of every place of a frame, int64 ``[tokens]``, cells in raster order."""
    index = torch.zeros(1, dtype=torch.int64, device=device)
    for size, count in zip(grid, cells, strict=True):
        count = min(size, count)
        own = torch.arange(size, device=device) * count // size
        index = (index.unsqueeze(1) * count + own).flatten()
    return index


@dataclass
class Bank:
    """Queries before rotation that were asked lately, in one layer.

    Args:
        query: ``[H, R, D]``, oldest first.
        place: int64 ``[R]``, their positions in the frame.
    """

    query: Tensor
    place: Tensor


def update_bank(view: PassView, state: State, frames: int = 24, rows: int = 16) -> None:
    """The clean queries of the newest frames; in ``state["bank"][layer]``.

    Args:
        view: Of a pass; those over noisy latents change nothing.
        state: Of the part.
        frames: How many frames are remembered.
        rows: Queries of each of them, evenly spaced, another set for each frame; all where the
            frame has no more.
    """
    query = clean_queries(view)
    if query is None:
        return
    tokens, first = view.geometry.tokens, view.step.final[0]
    rows, count = min(rows, tokens), len(view.step.final)
    ids = torch.arange(first, first + count, device=query.device).unsqueeze(1)
    place = (torch.arange(rows, device=query.device) * tokens // rows + ids) % tokens
    index = torch.arange(count, device=query.device).unsqueeze(1) * tokens + place
    query, place = query.index_select(1, index.flatten()), place.flatten()
    banks = state.setdefault("bank", {})
    if view.layer in banks:
        old = banks[view.layer]
        query, place = torch.cat([old.query, query], 1), torch.cat([old.place, place])
    banks[view.layer] = Bank(query[:, -frames * rows :].clone(), place[-frames * rows :].clone())


def update_last_queries(
    view: PassView, state: State, rows: int, queries: Tensor | None = None
) -> None:
    """Remember :func:`last_queries` for later passes, in ``state["last_queries"][layer]``."""
    last = last_queries(view, state, rows, queries).clone()
    state.setdefault("last_queries", {})[view.layer] = last


def last_queries(view: PassView, state: State, rows: int, queries: Tensor | None = None) -> Tensor:
    """The last so many rotated queries of all passes up to this one, ``[H, rows or fewer, D]``.

    Oldest first; those of one pass replace nothing of their own chunk, so they reach back into the
    passes before.

    Args:
        view: Of a pass.
        state: Of the part, which calls :func:`update_last_queries` in its ``observe``.
        rows: How many.
        queries: What stands for those of this pass, ``[H, R, D]``; all of them where None.
    """
    own = view.query if queries is None else queries
    before = state.get("last_queries", {}).get(view.layer)
    return (own if before is None else torch.cat([before, own], dim=1))[:, -rows:]


# -- attention mass --------------------------------------------------------------------------


def final_mass(view: PassView, sampled: int = 520) -> Tensor:
    """Mean softmax mass from the queries of the frames that become final in a pass.

    Args:
        view: Of a pass that makes frames final.
        sampled: Largest number of query rows; evenly spaced ones stand for all.

    Returns:
        ``[H, N + n]``: on every row as it lies once the n rows of these frames are committed.
    """
    final = torch.arange(view.flight, device=view.device)[view.final]
    queries = final[spread_rows(len(final), sampled, view.device)]
    held, own = view.attention(queries=queries)
    return view.joint(held[:, 0], own[:, 0, view.final]) / len(queries)


def final_salience(view: PassView, sampled: int = 520) -> Tensor:
    """The largest head-mean softmax mass from any query of the frames that become final in a pass.

    Where heads hold different rows, the mean is that of the heads that have a row.

    Args:
        view: Of a pass that makes frames final.
        sampled: Largest number of query rows; evenly spaced ones stand for all.

    Returns:
        ``[1 or H, N + n]``: of every row as it lies once the n rows of these frames are committed.
    """
    if view.apart:
        raise ValueError(
            "Mass of some queries was asked for, but query frames meet rows at different times "
            "here. Use positions that all query frames share."
        )
    final = torch.arange(view.flight, device=view.device)[view.final]
    queries = final[spread_rows(len(final), sampled, view.device)]
    view.scored += sum(view.lengths) * len(queries)
    layout, tops = Layout.of(view), []
    holders = layout.there.expand(view.heads, -1, -1).sum(0, keepdim=True).clamp_min(1)
    size = max(1, BLOCK // (view.heads * (len(view) + view.flight)))
    for some in queries.split(size):
        mass = view.logits(view.query.index_select(1, some)).softmax(-1)  # [H, t, N + P]
        held = layout.spread(mass[..., : len(view)].transpose(1, 2)).sum(0, keepdim=True)
        own = mass[..., len(view) :].mean(0, keepdim=True)[..., view.final]
        tops.append((held.amax(-1) / holders, own.amax(1)))
    held, own = (torch.stack(x).amax(0) for x in zip(*tops, strict=True))
    return view.joint(layout.at_rows(view, held), own)


def observe_mass(view: PassView, state: State, sampled: int = 520) -> None:
    """Softmax mass that a pass puts on each row, for :func:`collected_mass`.

    Evenly spaced query rows stand for all of them; the mass is scaled to the full number.

    Args:
        view: Of a pass.
        state: Of the part.
        sampled: Largest number of query rows.
    """
    tokens = view.query.shape[1]
    queries = spread_rows(tokens, sampled, view.device)
    held, own = view.attention(queries=queries)
    scale = tokens / len(queries)
    mass = view.joint(held[:, 0] * scale, own[:, 0][:, view.final] * scale)
    state.setdefault("mass", {})[view.layer] = mass


def collected_mass(view: CacheView, state: State, column: str, decay: float = 1.0) -> Tensor:
    """What a column has of earlier passes, and the pass just observed, ``[1 or H, N]``.

    Args:
        view: After the pass has been committed.
        state: Of the part.
        column: Where the part keeps the mass.
        decay: Weight of what was there before: 1 accumulates, 0 knows the last pass alone.
    """
    mass, old = state.get("mass", {}).pop(view.layer, None), view.field(column)
    if mass is None or mass.shape[1] != old.shape[1]:
        return old
    return decay * old + mass


def mean_logits(view: PassView) -> Tensor:
    """What the frames that become final look at, before rotation: mean logits ``[F]``.

    The mean over heads, queries and the tokens of a frame; counts each held key once, since the
    mean query stands for all.
    """
    query = wide(view.raw_query[:, view.final]).mean(1, keepdim=True)
    view.scored += sum(view.lengths)
    logits = query @ wide(view.keys("raw")).transpose(1, 2) / query.shape[-1] ** 0.5
    return view.by_frame(logits, "mean")[:, 0].mean(0)


# -- frames ----------------------------------------------------------------------------------


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


def apart(mass: Tensor, frames: Sequence[int]) -> Tensor:
    """How far in time each frame lies from others with much mass, 0 to 1, of mass ``[F]``.

    1 minus the largest ``mass · exp(-distance / reach)`` of the others; the reach is half of the
    time from the first to the last (TetherCache, arXiv 2606.13035).
    """
    ids = upload(frames, mass, mass.dtype)
    reach = max(1.0, 0.5 * (frames[-1] - frames[0] + 1))
    near = (-(ids.unsqueeze(1) - ids).abs() / reach).exp().fill_diagonal_(0)
    return (1 - (near * mass).amax(1)).clamp_min(0)


def earliest(present: Tensor, count: int) -> Tensor:
    """The first ``count`` frames that are there, of bool ``[..., F]``."""
    return present & (present.cumsum(-1) <= count)


def by_token(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Latent cells ``[F, h, w]``, averaged over the patch of each token, ``[F, T]``.

    Raises:
        ValueError: Patches do not divide the latents evenly.
    """
    rows, columns = (divmod(n, m) for n, m in zip(x.shape[1:], grid, strict=True))
    if rows[1] or columns[1]:
        raise ValueError(
            f"Latents of {tuple(x.shape[1:])} cells do not make a grid of {grid} tokens. Use "
            "latents whose height and width are multiples of it."
        )
    return x.unflatten(2, (-1, columns[0])).unflatten(1, (-1, rows[0])).mean((2, 4)).flatten(1)


def pooled(x: Tensor, bucket: Tensor, shape: tuple[int, int], mean_share: float) -> Tensor:
    """One vector per frame: the mean over token groups of a mix of their mean and maximum.

    The double mean of dot products between the pooled groups of two frames is the dot product of
    these vectors, so this is all that a mean logit needs (Focused Forcing, arXiv 2605.18346).

    Args:
        x: Keys or queries ``[h, N, D]``.
        bucket: int64 ``[1 or h, N]``: frame x P + token group of each row; -1 where there is none.
        shape: Number of frames F and of token groups P of a frame.
        mean_share: The share of the mean; the rest is the element-wise maximum.

    Returns:
        ``[h, F, D]``; zeros for a frame without rows.
    """
    frames, groups = shape
    x, size = wide(x), frames * groups
    ones = x.new_ones(len(bucket), bucket.shape[1], 1)
    count = summed(ones, bucket, size)[..., 0]
    mean = summed(x, bucket, size) / count.clamp_min(1).unsqueeze(-1)
    index = torch.where(bucket < 0, size, bucket).unsqueeze(-1).expand_as(x)
    blank = x.new_zeros(len(x), size + 1, x.shape[2])
    top = blank.scatter_reduce(1, index, x, "amax", include_self=False)[:, :size]
    return _mixed(mean, top, count > 0, frames, mean_share)


def pooled_whole(x: Tensor, frames: int, groups: int, mean_share: float) -> Tensor:
    """:func:`pooled` of whole frames in raster order, whose tokens the groups divide evenly."""
    parts = wide(x).unflatten(1, (frames * groups, -1))
    there = torch.ones(1, frames * groups, dtype=torch.bool, device=x.device)
    return _mixed(parts.mean(2), parts.amax(2), there, frames, mean_share)


def _mixed(mean: Tensor, top: Tensor, there: Tensor, frames: int, mean_share: float) -> Tensor:
    mixed = (mean_share * mean + (1 - mean_share) * top).unflatten(1, (frames, -1))
    filled = there.unflatten(1, (frames, -1)).sum(2, keepdim=True)
    return mixed.sum(2) / filled.clamp_min(1)


def pooled_logits(
    view: PassView, keys: Tensor, groups: int | None, mean_share: float, per_query_frame: bool
) -> Tensor:
    """Logits between pooled queries and pooled keys ``[H, F, D]``, ``[H, Q or 1, F]``."""
    query = pooled_flight(view, view.query, groups, mean_share)
    if not per_query_frame:
        query = query.mean(1, keepdim=True)
    return query @ keys.transpose(1, 2) / query.shape[-1] ** 0.5


def in_order(view: CacheView) -> bool:
    """Whether all heads hold whole frames, token after token."""
    return view.whole and not view.ragged and len(view.frame_id) == 1


def pooled_keys(view: CacheView, groups: int | None, mean_share: float) -> Tensor:
    """:func:`pooled` of each held frame, as the queries meet it, ``[H, F, D]``; counts its rows."""
    groups, tokens = groups or view.geometry.grid[0], view.geometry.tokens
    view.scored += sum(view.lengths)
    keys, frames = view.keys("read"), len(view.frames)
    if in_order(view) and tokens % groups == 0:
        found = pooled_whole(keys, frames, groups, mean_share)
        slot = view.frame_index[0, ::tokens].argsort()  # frames may lie in another order
        return found.index_select(1, slot)
    place = token_group(view.raster, tokens, groups)
    bucket = torch.where(view.valid, view.frame_index * groups + place, -1)
    return pooled(keys, bucket, (frames, groups), mean_share)


def pooled_flight(view: PassView, x: Tensor, groups: int | None, mean_share: float) -> Tensor:
    """:func:`pooled` of the frames in flight, ``[H, Q, D]``, from queries or keys ``[H, T, D]``."""
    groups = groups or view.geometry.grid[0]
    tokens, frames = view.geometry.tokens, view.query_frames
    if tokens % groups == 0:
        return pooled_whole(x, frames, groups, mean_share)
    place = token_group(torch.arange(tokens, device=x.device), tokens, groups)
    ids = torch.arange(frames, device=x.device).unsqueeze(1)
    bucket = (ids * groups + place).flatten().unsqueeze(0)
    return pooled(x, bucket, (frames, groups), mean_share)


def token_group(place: Tensor, tokens: int, groups: int) -> Tensor:
    """Which of ``groups`` runs of consecutive raster tokens a place belongs to."""
    return (place.long() * groups).div(tokens, rounding_mode="floor")


def diversity(view: CacheView, among: Tensor | None = None, own: Tensor | None = None) -> Tensor:
    """How unlike the average frame each frame is, ``[H, F]``; counts its rows.

    Minus the mean over tokens of the cosine between a key and the mean key of its place (Focused
    Forcing, arXiv 2605.18346).

    Args:
        view: Of the layer.
        among: bool ``[1 or H, F]``: held frames that make up the average; all where None. The
            answer means nothing for the others.
        own: Keys of frames in flight ``[H, P, D]``, which belong to the average too and stand
            behind the held ones: then the answer is ``[H, F + Q]``.
    """
    tokens, keys = view.geometry.tokens, wide(view.keys("read"))
    view.scored += sum(view.lengths)
    flight = 0 if own is None else own.shape[1] // tokens
    if own is not None:
        keys = torch.cat([keys, wide(own)], dim=1)
    if in_order(view):
        keys = keys.unflatten(1, (-1, tokens))  # [H, F, T, D]
        index, total = view.frame_index[0, ::tokens], keys.sum(1, keepdim=True)
        if among is not None:
            counts = torch.nn.functional.pad(among[:, index], (0, flight), value=True)
            total = (keys * counts[..., None, None]).sum(1, keepdim=True)
        alike = cosine(keys, total).mean(-1)
        held = alike[:, : len(index)].index_select(1, index.argsort())
        return -torch.cat([held, alike[:, len(index) :]], dim=1) if flight else -held
    counts = view.valid if among is None else view.rows_of(among)
    place, lines = torch.where(counts, view.raster, -1), len(keys)
    if flight:
        raster = torch.arange(tokens, device=keys.device).repeat(flight)
        place = torch.cat([place.expand(lines, -1), raster.expand(lines, -1)], dim=1)
    index = place.clamp_min(0).unsqueeze(-1).expand_as(keys)
    alike = cosine(keys, summed(keys, place, tokens).gather(1, index))
    held = view.by_frame(alike[:, : len(view)].unsqueeze(1), "mean")[:, 0]
    late = alike[:, len(view) :].unflatten(1, (flight, tokens)).mean(-1) if flight else None
    return -held if late is None else -torch.cat([held, late], dim=1)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine between vectors along the last axis; 0 for vectors of no length."""
    lengths = x.norm(dim=-1) * y.norm(dim=-1)
    return (x * y).sum(-1) / lengths.clamp_min(torch.finfo(x.dtype).tiny)
