"""Parts of frames that change: how much, and which of them fit into a pool.

Shapes: H heads, F frames, P segments of a frame in raster order, N rows, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_kv.cache.host import upload
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.layout import Layout
from lightning_kv.policies.statistics import cosine


def segment_of(place: Tensor, tokens: int, segments: int) -> Tensor:
    """Segment of each place in raster order; the last one takes the remainder.

    Frames of fewer tokens than segments have a segment for each token.

    >>> segment_of(torch.arange(7), 7, 3).tolist()
    [0, 0, 1, 1, 2, 2, 2]
    """
    segments = min(segments, tokens)
    return (place // (tokens // segments)).clamp_max(segments - 1)


def steadiness(view: CacheView, frames: Sequence[int], heads: Tensor, segments: int) -> Tensor:
    """How much keys stay the same from each of some frames to the next, mean over segments.

    The cosine of a token's keys at both times, of all heads together.

    Args:
        view: A layer that holds these frames and those after them whole.
        frames: Their ids.
        heads: bool ``[H, 1]``: which are compared.
        segments: Of a frame.

    Returns:
        ``[len(frames), P]``.
    """
    tokens = view.geometry.tokens
    keys = Layout.of(view).spread(view.keys("read"))  # [H, F, T, D]
    keys = keys.expand(view.heads, -1, -1, -1) * heads.view(-1, 1, 1, 1)
    at = [view.frames.index(frame) for frame in frames]
    now, then = (
        keys.index_select(1, upload(own, view._like, torch.int64)).permute(1, 2, 0, 3).flatten(2)
        for own in (at, [index + 1 for index in at])
    )
    same = cosine(now, then)  # [len(frames), T]
    segment = segment_of(torch.arange(tokens, device=same.device), tokens, segments)
    members = torch.arange(min(segments, tokens), device=same.device) == segment.unsqueeze(1)
    return (same @ members.to(same)) / members.sum(0)


Known = dict[int, tuple[int, Tensor]]
"""Of frames by id, the chunk at which they were compared, and how alike they were ``[P]``."""


def compare(
    views: Sequence[CacheView], frames: Sequence[int], heads: Tensor, segments: int, known: Known
) -> None:
    """Note how alike some frames and those after them are in a layer, and forget what is gone.

    Args:
        views: Of the layers that follow the first.
        frames: Ids.
        heads: bool ``[H, 1]``: those of the first layer that are compared.
        segments: Of a frame.
        known: Where it is noted.
    """
    if frames:
        alike, chunk = steadiness(views[0], frames, heads, segments), views[0].step.chunk
        known |= {frame: (chunk, own) for frame, own in zip(frames, alike, strict=True)}
    for frame in known.keys() - {frame for view in views for frame in view.frames}:
        del known[frame]


def fitting(
    view: CacheView, known: Known, room: Sequence[int], fixed: Tensor, segments: int
) -> Tensor:
    """Rows of the segments that fit into a pool, bool ``[H, N]``.

    Those compared last first, the least alike of them first, until the next would exceed the pool
    or the number of segments that frames of its size have.

    Args:
        view: Of one layer.
        known: See :func:`compare`; other frames have no segments.
        room: Rows that each head (one number: all) may have.
        fixed: Of these, rows that are no segments, int64 ``[1 or H, 1]``.
        segments: Of a frame.
    """
    tokens = view.geometry.tokens
    each, room = min(segments, tokens), upload(room, view._like, torch.int64).unsqueeze(1) - fixed
    blank = view._like.new_zeros(each)
    when = upload([known.get(f, (-1, blank))[0] for f in view.frames], view._like, torch.int64)
    alike = torch.stack([known.get(f, (-1, blank))[1].double() for f in view.frames]).flatten()
    when = when.unsqueeze(1).expand(-1, each).flatten()
    index = view.frame_index * each + segment_of(view.raster, tokens, segments)
    there = (view.valid & (when >= 0)[index]).expand(view.heads, -1)
    index = index.expand(view.heads, -1)
    size = index.new_zeros(view.heads, len(when)).scatter_add(1, index, there.long())
    order = alike.argsort(stable=True)
    order = order[when[order].argsort(descending=True, stable=True)]
    size = size[:, order]
    fits = (size.cumsum(1) <= room) & ((size > 0).cumsum(1) <= room * each // tokens)
    chosen = torch.zeros_like(fits).scatter(1, order.expand_as(fits), fits)
    return chosen.gather(1, index) & there
