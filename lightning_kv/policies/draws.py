"""Numbers that look random and are the same wherever and whenever they are asked for.

Shapes: N rows, F frames, T tokens of a frame.
"""

from __future__ import annotations

import random
from functools import lru_cache

import torch
from torch import Tensor

from lightning_kv.cache.host import send
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.layout import Layout


def row_draws(view: CacheView, salt: str) -> Tensor:
    """A uniform number for the place of every row in its frame, ``[1 or H, N]``.

    Args:
        view: Whose seed they depend on; heads and layers share them.
        salt: What else they depend on.
    """
    tokens = view.geometry.tokens
    each = [_uniform(f"{view.seed} {salt} {frame}", tokens) for frame in view.frames]
    return Layout.of(view).at_rows(view, send(torch.stack(each), view.weight).unsqueeze(0))


@lru_cache(maxsize=4096)
def _uniform(text: str, count: int) -> Tensor:
    with torch.inference_mode(False):  # kept for later
        rng = torch.Generator().manual_seed(random.Random(text).getrandbits(63))
        return torch.rand(count, generator=rng)
