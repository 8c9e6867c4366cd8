"""What Focused Forcing and its relatives share: attention between pooled tokens, and a memory.

Shapes: H heads, Q query frames (or 1), F held frames, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_kv.cache.view import CacheView, PassView
from lightning_kv.policies.scored import top_units
from lightning_kv.policies.statistics import pooled_flight, pooled_keys, pooled_logits


def remembered(name: str, view: PassView, state: Any, make: Callable[[PassView], Tensor]) -> Tensor:
    """What was made for this memory, and is made anew when it has changed."""
    stamp, found = state.get((name, view.layer), (None, None))
    if stamp != view.stamp:
        found = make(view)
        state[name, view.layer] = view.stamp, found
    return found


def pooled_attention(
    view: PassView,
    state: Any,
    groups: int | None,
    mean_share: float,
    per_query_frame: bool,
    flight: bool = False,
) -> Tensor:
    """Mean logits between pooled queries and pooled keys (Focused Forcing, arXiv 2605.18346).

    The keys of a memory are pooled once for it; every frame counts as one key of each query frame.

    Args:
        view: Of a pass.
        state: Of the part.
        groups: Token groups per frame; one for each row of the grid where None.
        mean_share: Of the pooling: the share of the mean, the rest is the maximum.
        per_query_frame: For each query frame, or for all of them together.
        flight: Behind the held frames, those in flight.

    Returns:
        ``[H, Q, F]``; with those in flight ``[H, Q, F + their number]``.
    """
    keys = remembered("pooled", view, state, lambda own: pooled_keys(own, groups, mean_share))
    view.scored += keys.shape[0] * keys.shape[1] * (view.query_frames if per_query_frame else 1)
    if flight:
        own = pooled_flight(view, view.own_keys(), groups, mean_share)
        keys = torch.cat([keys, own], dim=1)
    return pooled_logits(view, keys, groups, mean_share, per_query_frame)


def final_frames(view: CacheView) -> int:
    """Frames of the chunk that becomes final next; the paper counts them in its budgets."""
    step = view.step
    return len(step.final) or step.next_chunk or view.query_frames


def in_proportion(
    scores: Tensor, held: Tensor, anchor: Tensor, middle: Tensor, may: Tensor
) -> tuple[Tensor, Tensor]:
    """Every query frame's anchor, itself, and the best of the rest, shared by their numbers.

    Args:
        scores: ``[H, Q, F + Q]`` of held frames and of those in flight.
        held: bool ``[1 or H, 1, F]``: what may be read.
        anchor: bool ``[H, Q, F]``: what is read of the first frames.
        middle: bool, as ``held``: those among which a share of the budget is chosen.
        may: int64 ``[1 or H, 1, 1]``: frames of each head; one that may read all reads all.

    Returns:
        What is read of held frames ``[H, Q, F]`` and of those in flight ``[H, Q, Q]``, bool.
    """
    heads, flight, past = len(scores), scores.shape[1], held.shape[-1]
    now = torch.ones_like(scores[..., past:], dtype=torch.bool)
    itself = torch.eye(flight, dtype=torch.bool, device=scores.device).expand_as(now)
    first = anchor.sum(-1, keepdim=True)
    from_middle, from_tail = shared(
        (may - first - 1).clamp_min(0), middle.sum(-1, keepdim=True), flight - 1
    )
    size = (middle | anchor).expand(heads, flight, -1).long()
    frames = top_units(scores[..., :past], (from_middle + first)[..., 0], anchor, size)
    current = top_units(scores[..., past:], (from_tail + 1)[..., 0], itself, now.long())
    every = may >= held.sum(-1, keepdim=True) + flight
    return frames | (every & held), current | every


def shared(need: Tensor, middle: Tensor, tail: int) -> tuple[Tensor, Tensor]:
    """Split a need between two regions by their sizes; what one cannot give, the other does."""
    part = (need * middle // (middle + tail).clamp_min(1)).minimum(middle)
    return part, (need - part).clamp_max(tail)
