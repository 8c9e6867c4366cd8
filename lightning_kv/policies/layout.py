"""Held rows laid out by frame and place, so that rows of different frames can be compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kv.cache.rows import Group
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.scores import by_head


@dataclass(frozen=True)
class Layout:
    """Where the rows of one layer stand.

    Args:
        row: int64 ``[H, F, T]``: the row at a frame and place, -1 where a head has none.
        frame_ids: int64 ``[F]``.
    """

    row: Tensor
    frame_ids: Tensor

    @classmethod
    def of(cls, view: CacheView) -> Layout:
        """The layout of a view."""
        tokens, found = view.geometry.tokens, []
        for group in view.groups:
            heads = len(group.heads)
            place = group.meta["place"].long()
            index = (view.frame_index(group) * tokens + place).expand(heads, -1)
            order = torch.arange(len(group), device=index.device).expand(heads, -1)
            blank = index.new_full((heads, len(view.frame_ids) * tokens), -1)
            found.append(blank.scatter(1, index, order))
        return cls(by_head(view.groups, found).unflatten(1, (-1, tokens)), view.frame_ids)

    @property
    def there(self) -> Tensor:
        """Whether there is a row, bool ``[H, F, T]``."""
        return self.row >= 0

    def spread(self, view: CacheView, values: list[Tensor]) -> Tensor:
        """Row values per group ``[h, N, ...]`` as ``[H, F, T, ...]``; 0 where there is no row."""
        found = []
        for group, value in zip(view.groups, values, strict=True):
            row = self.row[list(group.heads)].flatten(1)
            padded = torch.cat([value, value.new_zeros(len(value), 1, *value.shape[2:])], 1)
            index = torch.where(row < 0, len(group), row)
            index = index.view(*index.shape, *(1,) * (value.ndim - 2))
            found.append(padded.gather(1, index.expand(*row.shape, *value.shape[2:])))
        return by_head(view.groups, found).unflatten(1, self.row.shape[1:])

    def gather(self, view: CacheView, group: Group, values: Tensor) -> Tensor:
        """Values ``[H, F, T]`` of the rows of one group, ``[h, N]``."""
        heads = len(group.heads)
        index = view.frame_index(group) * view.geometry.tokens + group.meta["place"].long()
        return values[list(group.heads)].flatten(1).gather(1, index.expand(heads, -1))

    def rows(self, kept: Tensor) -> list[Tensor]:
        """Row indices of each head that are kept, ascending; ``kept`` is bool ``[H, F, T]``."""
        chosen = (kept & self.there).flatten(1)
        return [
            own[hit].sort().values for own, hit in zip(self.row.flatten(1), chosen, strict=True)
        ]
