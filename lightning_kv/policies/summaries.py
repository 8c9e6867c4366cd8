"""Frames that are averaged into one, place by place.

Shapes: E pairs of a summary and a frame, T tokens of a frame; sums take rows ``[1, E T]``, alike in
all heads, and weights are ``[1, N]``, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kv.cache.decisions import Retention, Sums
from lightning_kv.cache.host import upload
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.layout import Layout


@dataclass(frozen=True)
class Summary:
    """A frame that stands for several.

    Args:
        frame: The held frame that it counts for.
        centre: Its rotary time.
        span: How many frames it stands for.
        parts: Held frames that it is made of, with their shares; one alone stays as it is.
    """

    frame: int
    centre: float
    span: int
    parts: tuple[tuple[int, float], ...]


def summarised(view: CacheView, entries: Sequence[Summary]) -> Retention:
    """The retention that makes a list of summaries of the frames of a view.

    Keys are averaged before rotation, each place for itself; all heads hold the same whole frames.
    """
    still = [entry for entry in entries if len(entry.parts) == 1]
    made = [entry for entry in entries if len(entry.parts) > 1]
    weight = torch.ones(1, len(view), device=view.device)
    for entry in still:
        weight = torch.where(view.rows_from((entry.frame,)), float(entry.span), weight)
    keep = view.rows_from([entry.frame for entry in still])
    if not made:
        return Retention(weight=weight, keep=keep)
    rows, tokens = Layout.of(view).row, view.geometry.tokens
    place = torch.arange(tokens, device=view.device)
    pairs = [(i, *part) for i, entry in enumerate(made) for part in entry.parts]

    def each(numbers: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return upload(numbers, view.time, dtype).repeat_interleave(tokens).unsqueeze(0)

    source = [rows[:, view.frames.index(frame)] for _, frame, _ in pairs]
    sums = Sums(
        torch.cat(source, 1),
        torch.cat([i * tokens + place for i, _, _ in pairs]).unsqueeze(0),
        each([share for _, _, share in pairs], torch.float64),
        each([entry.frame for entry in made], torch.int64),
        each([entry.centre for entry in made]),
        view.geometry.places(view.device).float().repeat(len(made), 1).unsqueeze(0),
        each([entry.span for entry in made]),
    )
    return Retention(weight=weight, sums=sums, keep=keep)
