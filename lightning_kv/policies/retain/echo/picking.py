"""Which rows of an archive queries to come will want.

Shapes: H heads, N rows of the archive's candidates, T tokens of a frame, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.rotary import wide
from lightning_kv.cache.view import PassView
from lightning_kv.policies.future_score import QueryMeans, future_scores, query_means
from lightning_kv.policies.statistics import cosine


def singles(part: Any, view: PassView, state: Any, count: int) -> Tensor:
    """The rows of the archive that win a window, int64 ``[count]``.

    Args:
        part: Echo-Forcing, with its settings.
        view: Of the pass whose window is filled.
        state: The part's.
        count: How many rows win.
    """
    window, wins = state["window"], state.setdefault(("wins", view.layer), {})
    frames = [f for f in view.archive.frames if f >= state["first"] - window]
    span = (window + view.geometry.chunk).bit_length()
    offsets = part.offsets or [2**i for i in range(span)]
    means = query_means(part, view, state)
    return selected_rows(view, means, wins, frames, count, offsets, part.drift, part.reuse)


def selected_rows(
    view: PassView,
    means: QueryMeans,
    wins: dict[int, Tensor],
    frames: Sequence[int],
    count: int,
    offsets: Sequence[int],
    drift: float,
    reuse: int,
) -> Tensor:
    """The rows that win, one ranking for all heads, int64 ``[count]``, in the archive's order.

    Rows that have won as often as they can are taken only when there are no others. Counts every
    candidate once.

    Args:
        view: Of the pass whose window is filled.
        means: Of clean queries of the layer.
        wins: How often the rows ``[T]`` of each frame have won; brought up to date, and those of
            frames that are no candidates any more are forgotten.
        frames: The candidates: the last ones of the archive, ascending.
        count: How many rows win.
        offsets: Frames ahead at which queries are asked.
        drift: See :func:`drift_gate`.
        reuse: How often a row can win; 0 for no limit.
    """
    aside, tokens = view.archive, view.geometry.tokens
    low = len(aside) - len(frames) * tokens
    lag = view.step.query_times[0] - aside.time[:, low:]
    keys, rotary = aside.keys("raw")[:, low:], view.geometry.rotary
    gate = drift_gate(view, means, drift)
    score = future_scores(means, keys, lag, offsets, rotary, gate).mean(0)
    view.scored += score.shape[0] * view.heads
    blank = torch.zeros(tokens, device=view.device)
    won = torch.cat([wins.get(frame, blank) for frame in frames])
    order = score.argsort(descending=True, stable=True)
    if reuse:
        order = order[(won[order] >= reuse).long().argsort(stable=True)]
    best = order[:count].sort().values
    won = won.index_add(0, best, torch.ones_like(best).to(won))
    wins.clear()
    wins.update(zip(frames, won.split(tokens), strict=True))
    return low + best


def drift_gate(view: PassView, means: QueryMeans, drift: float) -> Tensor:
    """How like their mean the queries of this pass are: ``exp(-drift (1 - cosine))``.

    One cosine over all heads and pairs together, of the mean query of the pass and of before.
    """
    now = wide(view.raw_query).mean(1).flatten()
    return torch.exp(-drift * (1 - cosine(now, means.mean.flatten())))
