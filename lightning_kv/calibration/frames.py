"""Attention of one pass frame by frame: what any set of frames would give, from one look.

Shapes: H heads, R query rows, F held frames, U = F + 1 units (held frames in order, and last the
frames in flight as one, which are always read), D head width, N budgets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_kv.cache.rotary import wide
from lightning_kv.cache.table import BLOCK
from lightning_kv.cache.view import PassView


def check_frames(view: PassView) -> None:
    """Refuse a memory that cannot be taken apart by frames.

    Raises:
        ValueError: Heads hold different rows, or parts of frames, or query frames meet rows at
            different times.
    """
    alike = view.whole and not view.ragged and len(view.frame_id) == 1
    if not alike or view.apart or view.log_weight:
        raise ValueError(
            "Calibration takes attention apart by frames, and the reference policy does not hold "
            "the same whole frames in every head, read at one time. Use full, or a window such as "
            "sliding-window@18f."
        )


def by_frame(view: PassView, rows: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-sum-exp ``[H, R]`` of each unit's logits and the output ``[H, R, D]`` of it alone.

    Args:
        view: Of a pass.
        rows: int64, which of its queries; all where None.
    """
    query = wide(view.query if rows is None else view.query.index_select(1, rows))
    tokens = view.geometry.tokens
    if view.frames:
        keys, values = view.keys("read"), view.values()
        for slot in view.slot_of[0].tolist():
            here = slice(slot * tokens, (slot + 1) * tokens)
            yield _attended(query, keys[:, here], values[:, here])
    yield _attended(query, view.own_keys(), view.own_values())


def _attended(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = (x.to(query) for x in (keys, values))
    lse, out = [], []
    for q in query.split(max(1, BLOCK // (keys.shape[0] * keys.shape[1])), 1):
        logits = q @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5
        total = logits.logsumexp(-1)
        lse.append(total)
        out.append((logits - total.unsqueeze(-1)).exp() @ values)
    return torch.cat(lse, 1), torch.cat(out, 1)


def attention_over(view: PassView, kept: Tensor) -> Tensor:
    """Attention of every head to some of the frames, and to those in flight, ``[T, H, D]``.

    Args:
        view: Of a pass.
        kept: bool ``[H, F]``.
    """
    total, out = None, None
    every = torch.cat([kept, kept.new_ones(view.heads, 1)], 1)
    for (lse, own), keep in zip(by_frame(view), every.T, strict=True):
        lse = lse.masked_fill(~keep.unsqueeze(1), -torch.inf)
        if total is None:
            total, out = lse, own
            continue
        both = torch.logaddexp(total, lse)
        old, new = (_share(x, both).unsqueeze(-1) for x in (total, lse))
        total, out = both, out * old + own * new
    return out.transpose(0, 1)


def _share(lse: Tensor, of: Tensor) -> Tensor:
    """``exp(lse - of)``; 0 where there is nothing yet."""
    return torch.where(lse == -torch.inf, 0.0, (lse - of).exp())


def kept_by_score(
    scores: Tensor, frames: Sequence[int], budgets: Sequence[int], sink: int = 0
) -> Tensor:
    """Frames that each head keeps at some budgets: the sink, then the highest scores.

    Ties go to the earlier frame.

    Args:
        scores: ``[H, F]``.
        frames: Ids of the held frames.
        budgets: Numbers of frames.
        sink: So many first frames of the clip come before all others.

    Returns:
        bool ``[N, H, F]``.
    """
    first = torch.tensor([frame < sink for frame in frames], device=scores.device)
    key = scores.double().masked_fill(first, torch.inf)
    order = key.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.zeros_like(order).scatter(1, order, places)
    return rank < torch.tensor(budgets, device=rank.device).view(-1, 1, 1)


def _units(kept: Tensor) -> Tensor:
    """Units that count, float64 ``[H, U, N]``: those in flight always do."""
    own = kept.new_ones(*kept.shape[:2], 1)
    return torch.cat([kept, own], -1).permute(1, 2, 0).double()


def kept_shares(lse: Tensor, kept: Tensor) -> Tensor:
    """Softmax mass of the units kept at each budget, ``[H, R, N]``.

    Args:
        lse: ``[H, R, U]``.
        kept: bool ``[N, H, F]``.
    """
    return (lse.double().softmax(-1) @ _units(kept)).clamp_max(1)


def kept_means(lse: Tensor, values: Tensor, kept: Tensor) -> Tensor:
    """Mean of values of units under the softmax over those kept at each budget.

    Composition of attention: with a softmax restricted to a set K, the output is the mean of the
    units' own outputs under the softmax of their log-sum-exp over K.

    Args:
        lse: ``[H, R, U]``.
        values: ``[..., H, R, U]``.
        kept: bool ``[N, H, F]``.

    Returns:
        ``[..., H, R, N]``.
    """
    share, units = (lse - lse.amax(-1, keepdim=True)).double().exp(), _units(kept)
    return (share * values.double()) @ units / (share @ units)
