"""How far chunks are from each other, by the camera's pose or by their keys.

Shapes: F frames; distances ``[C]``, C chunks that are compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_kv.cache.rotary import wide
from lightning_kv.cache.view import CacheView


def pose_distance(pose: Tensor, chunks: Sequence[range], now: Sequence[int]) -> Tensor:
    """Half squared distance, half angle, each over the largest of the chunks, ``[C]``.

    WorldKV (arXiv 2605.22718). The pose of a chunk is the mean of its matrices.

    Args:
        pose: Camera-to-world matrices ``[F, 4, 4]`` by frame.
        chunks: Frames of each.
        now: Frames of the chunk that asks.
    """
    every = torch.stack([pose[own[0] : own[-1] + 1].mean(0) for own in chunks])
    mine = pose[now[0] : now[-1] + 1].mean(0)
    far = (every[:, :3, 3] - mine[:3, 3]).square().sum(-1)
    trace = (every[:, :3, :3] * mine[:3, :3]).sum((1, 2))
    turned = ((trace - 1) / 2).clamp(-1, 1).acos()
    return sum(0.5 * x / torch.where(x.amax() > 0, x.amax(), 1.0) for x in (far, turned))


def key_distance(view: CacheView, chunks: Sequence[range], now: Sequence[int]) -> Tensor:
    """1 minus the cosine between mean keys before rotation, all heads together, ``[C]``.

    Args:
        view: Holds all of them; its rows count as scored.
        chunks: Frames of each.
        now: Frames they are compared with.
    """
    keys = wide(view.keys("raw"))
    view.scored += sum(view.lengths)

    def mean(frames: Sequence[int]) -> Tensor:
        rows = view.rows_from(frames).to(keys).unsqueeze(-1)
        return normalize((keys * rows).sum((0, 1)), dim=0)

    mine = mean(now)
    return 1 - torch.stack([mean(own) @ mine for own in chunks])
