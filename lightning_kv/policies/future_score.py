"""How much queries to come will look at a key, in closed form, from the means of those that were.

Before rotation the queries of a head gather around one vector. Turned to a later time, this vector
stands for the queries asked then; what they have beyond it pays every key by its length
(TriAttention, arXiv 2604.04921; with means taken during the rollout: Echo-Forcing, arXiv
2605.16003).

Shapes: H heads, N rows, T tokens of a pass, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.checks import named
from lightning_kv.cache.host import upload
from lightning_kv.cache.rotary import Rotary, rotate, wide
from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.statistics import clean_queries


@dataclass
class QueryMeans:
    """What the queries of one layer are like before rotation.

    Args:
        mean: ``[H, D]``: their mean, pair by pair a complex number.
        length: ``[H, D / 2]``: the mean length of each complex pair; never below that of the mean.
        rows: Queries of each head that went in.
    """

    mean: Tensor
    length: Tensor
    rows: int


def update_query_means(view: PassView, state: dict[Any, Any], until: int | None = None) -> None:
    """Means of all clean queries so far; in ``state["query_means"][layer]``.

    Args:
        view: Of a pass; those over noisy latents change nothing.
        state: Of the part.
        until: Passes that reach beyond so many frames change nothing: the means are frozen.
    """
    query = clean_queries(view, until)
    if query is None:
        return
    mean, length, rows = query.mean(1), pair_lengths(query).mean(1), query.shape[1]
    old: QueryMeans | None = state.setdefault("query_means", {}).get(view.layer)
    if old is not None:
        rows += old.rows
        share = query.shape[1] / rows
        mean, length = old.mean.lerp(mean, share), old.length.lerp(length, share)
    state["query_means"][view.layer] = QueryMeans(mean, length, rows)


def query_means(part: Any, view: CacheView, state: dict[Any, Any]) -> QueryMeans:
    """The means that :func:`update_query_means` has collected for a layer.

    Raises:
        ValueError: There were no clean passes.
    """
    found = state.get("query_means", {}).get(view.layer)
    if found is None:
        raise ValueError(
            f"{named(part, view)} expects by the queries of clean passes, and there were none. "
            "Use a sampler that commits frames in a pass at t = 0."
        )
    return found


def future_scores(
    queries: QueryMeans,
    keys: Tensor,
    lag: Tensor,
    offsets: Sequence[float],
    rotary: Rotary,
    gate: Tensor | float = 1.0,
) -> Tensor:
    """The logit that each key expects of queries to come, times ``sqrt(D)``, ``[H, N]``.

    With the mean query ``q`` and the mean length ``A``, over complex pairs f and the mean over
    offsets o: ``sum_f |q_f| |k_f| cos(w_f (lag + o) + arg(q_f conj k_f))``, ``w_f`` 0 for pairs
    that turn with the place, plus ``gate * sum_f (A_f - |q_f|) |k_f|``. The mean over offsets is
    that of turned queries, so their number costs nothing.

    Args:
        queries: Means of the layer.
        keys: Before rotation, ``[H, N, D]``.
        lag: Frames from each row to the start of the next chunk, ``[1 or H, N]``.
        offsets: Frames beyond that start at which queries are asked.
        rotary: The model's.
        gate: How much the second term counts; one number, also of the device.
    """
    keys = wide(keys)
    at = upload([float(o) for o in offsets], keys, torch.float64)
    still = torch.zeros((), dtype=torch.float64, device=keys.device)
    asked = rotate(queries.mean.unsqueeze(1), rotary.angles(at, still, still), rotary.work).mean(1)
    back = rotate(keys, rotary.angles(-lag, still, still), rotary.work)
    rest = queries.length - pair_lengths(queries.mean)
    expected = (back @ asked.to(keys).unsqueeze(-1)).squeeze(-1)
    return expected + gate * (pair_lengths(keys) @ rest.to(keys).unsqueeze(-1)).squeeze(-1)


def pair_lengths(x: Tensor) -> Tensor:
    """Lengths ``[..., D / 2]`` of the complex pairs of ``[..., D]``."""
    return x.unflatten(-1, (-1, 2)).norm(dim=-1)
