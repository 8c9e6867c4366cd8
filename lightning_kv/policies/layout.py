"""Held rows laid out by frame and place, so that rows of different frames can be compared.

Shapes: H heads, F frames, T tokens of a frame, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kv.cache.view import CacheView


@dataclass(frozen=True)
class Layout:
    """Where the rows of one layer stand, so that rows of different frames can be compared.

    Args:
        row: int64 ``[1 or H, F, T]``: the row at a frame and place, -1 where a head has none.
        extra: bool ``[1 or H, N]``: rows that share frame and place with a later one.
    """

    row: Tensor
    extra: Tensor

    @classmethod
    def of(cls, view: CacheView) -> Layout:
        """The layout of a view."""
        tokens, frames = view.geometry.tokens, len(view.frames)
        if view.whole:
            slot, inside = view.slot_of.unsqueeze(-1), torch.arange(tokens, device=view.device)
            row = torch.where(slot * tokens < len(view), slot * tokens + inside, -1)
            return cls(row, torch.zeros(1, len(view), dtype=torch.bool, device=view.device))
        index = view.frame_index * tokens + view.raster
        lines = max(len(index), len(view.valid))
        index = torch.where(view.valid, index, frames * tokens).expand(lines, -1)
        order = torch.arange(len(view), device=index.device).expand(lines, -1)
        blank = index.new_full((lines, frames * tokens + 1), -1)
        row = blank.scatter_reduce(1, index, order, "amax")
        extra = (row.gather(1, index) != order) & view.valid
        return cls(row[:, :-1].unflatten(1, (frames, tokens)), extra)

    @property
    def there(self) -> Tensor:
        """Whether there is a row, bool ``[1 or H, F, T]``."""
        return self.row >= 0

    def spread(self, values: Tensor) -> Tensor:
        """Row values ``[1 or H, N, ...]`` as ``[1 or H, F, T, ...]``; 0 where there is no row."""
        row = self.row.flatten(1)
        lines, size = max(len(row), len(values)), values.shape[1]
        values = values.expand(lines, *values.shape[1:])
        base = torch.arange(lines, device=row.device).unsqueeze(1) * size
        flat = values.reshape(lines * size, *values.shape[2:])
        found = flat.index_select(0, (row.clamp_min(0) + base).flatten())
        absent = (row < 0).expand(lines, -1).reshape(-1, *(1,) * (flat.ndim - 1))
        found = found.masked_fill_(absent, 0)
        return found.unflatten(0, (lines, *self.row.shape[1:]))

    def at_rows(self, view: CacheView, values: Tensor) -> Tensor:
        """Values ``[1 or H, F, T]`` of all rows, ``[1 or H, N]``."""
        index = view.frame_index * view.geometry.tokens + view.raster
        lines = max(len(values), len(index))
        return values.expand(lines, -1, -1).flatten(1).gather(1, index.expand(lines, -1))
