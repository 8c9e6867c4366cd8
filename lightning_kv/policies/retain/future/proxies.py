"""Queries that have not been asked yet, from the queries that were."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kv.cache.host import upload
from lightning_kv.cache.rotary import rotate, wide
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.statistics import Bank, Moments

PROXIES = ("mean", "cells", "bank")


@dataclass(frozen=True)
class FutureQueries:
    """What the next chunks may ask in one layer.

    Args:
        query: ``[H, J, D]``, rotated to the times and places at which they would be asked.
        variance: ``[H, D / 2]`` of a complex pair around these; None where ``query`` is the whole
            distribution itself.
    """

    query: Tensor
    variance: Tensor | None


def future_queries(
    collected: Moments | Bank, ahead: CacheView, horizon: int, steps: int
) -> FutureQueries:
    """Past queries, asked again at future times.

    The queries before rotation hardly change their distribution over a video (Future Forcing,
    arXiv 2605.30083), so those of the past, turned to future times, stand for those to come.

    Args:
        collected: Means per cell, or a bank of single queries.
        ahead: The view of the next chunk.
        horizon: Frames that are looked ahead.
        steps: At how many evenly spaced times within the horizon.
    """
    start = ahead.step.query_times[0]
    rows, columns = ahead.geometry.grid
    if isinstance(collected, Bank):
        base, variance = collected.query, None
        row = collected.place.div(columns, rounding_mode="floor").double()
        column = (collected.place % columns).double()
    else:
        base, variance = collected.mean, collected.variance
        row, column = cell_centres(collected.cell, (rows, columns), base.shape[1])
    times = [start + i * horizon / steps for i in range(steps)]
    times = upload(times, base, torch.float64).unsqueeze(1)
    angles = ahead.geometry.rotary.angles(times, row, column)
    turned = rotate(base.unsqueeze(1), angles, ahead.geometry.rotary.work)  # [H, times, R, D]
    return FutureQueries(turned.flatten(1, 2), variance)


def cell_centres(cell: Tensor, grid: tuple[int, int], cells: int) -> tuple[Tensor, Tensor]:
    """Mean row and column of each cell, float64 ``[G]``, given the cell of every place."""
    place = torch.arange(len(cell), device=cell.device)
    member = (cell.unsqueeze(1) == torch.arange(cells, device=cell.device)).double()
    row = place.div(grid[1], rounding_mode="floor").double()
    column = (place % grid[1]).double()
    return tuple(x @ member / member.sum(0) for x in (row, column))


def expected_mass(
    view: CacheView, ahead: CacheView, asked: FutureQueries, variance: bool
) -> Tensor:
    """Softmax mass of every row under every query to come, ``[H, J, N]``.

    Counts every held key once for every query.

    Args:
        view: At commit.
        ahead: The view of the next chunk.
        asked: The queries to come.
        variance: Add half the variance of the logit, so that a mean query counts for the Gaussian
            around it: ``sum_f variance_f |k_f|^2 / (4 D)`` over complex pairs f.
    """
    keys = wide(ahead.keys("read"))
    logits = asked.query @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5
    if view.log_weight:
        logits = logits + view.weight.clamp_min(1e-30).log().unsqueeze(1)
    if variance:
        logits = logits + log_mean_exp(asked.variance, keys).unsqueeze(1)
    if view.ragged:
        logits = logits.masked_fill(~view.valid.unsqueeze(1), -torch.inf)
    view.scored += sum(view.lengths) * logits.shape[1]
    return logits.softmax(-1)


def log_mean_exp(variance: Tensor, keys: Tensor) -> Tensor:
    """Half the variance of the logits of keys ``[h, N, D]``, ``[h, N]``.

    The logarithm of the mean of ``exp(q k / sqrt(D))`` over queries q that spread as an isotropic
    complex Gaussian of ``variance`` ``[h, D / 2]`` around 0.
    """
    power = keys.to(variance.dtype).square().unflatten(-1, (-1, 2)).sum(-1)
    return (power * variance.unsqueeze(1)).sum(-1) / (4 * keys.shape[-1])
