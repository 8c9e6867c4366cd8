"""What can be known at a commit about the queries to come, and what that says of held rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kv.cache.needs import Bank, Moments
from lightning_kv.cache.view import CacheView
from lightning_kv.policies.layout import Layout
from lightning_kv.policies.proxies import FutureQueries, expected_mass, future_queries
from lightning_kv.policies.redundancy import features, frame_distances, nearest_newer
from lightning_kv.policies.scores import wide


@dataclass(frozen=True)
class Foresight:
    """One layer at a commit.

    Args:
        view: At the commit.
        ahead: The view of the next chunk.
        layout: Of both.
        asked: Queries to come.
        mass: Per group ``[h, J, N]``: their softmax mass on every held row.
    """

    view: CacheView
    ahead: CacheView
    layout: Layout
    asked: FutureQueries
    mass: list[Tensor]

    @classmethod
    def of(
        cls, view: CacheView, collected: Moments | Bank, horizon: int, steps: int, variance: bool
    ) -> Foresight:
        """Ask the queries of the past again, at ``steps`` times within ``horizon`` frames."""
        ahead = view.ahead()
        asked = future_queries(collected, ahead, horizon, steps)
        mass = expected_mass(view, ahead, asked, variance)
        return cls(view, ahead, Layout.of(view), asked, mass)

    def scores(self, alive: Tensor, frames: bool, largest: bool, value_norm: bool) -> Tensor:
        """Expected mass of the living rows, as if the others had never been.

        Args:
            alive: bool ``[H, F, T]``.
            frames: Sum over the rows of each frame first.
            largest: The maximum over the queries to come, else the mean.
            value_norm: Multiply the mass by the length of the row's value.

        Returns:
            ``[H, F]`` for frames, ``[H, F * T]`` otherwise.
        """
        found = []
        for group, mass in zip(self.view.groups, self.mass, strict=True):
            own = mass * self.layout.gather(self.view, group, alive).unsqueeze(1)
            own = own / own.sum(-1, keepdim=True).clamp_min(torch.finfo(own.dtype).tiny)
            if value_norm:
                own = own * wide(group.payload("v")).norm(dim=-1).unsqueeze(1)
            found.append(own)
        if frames:
            return _reduced(self.view.per_frame(found), largest)
        return self.layout.spread(self.view, [_reduced(x, largest) for x in found]).flatten(1)

    def alike(self, metric: str, frames: bool, radius: int) -> tuple[Tensor, Tensor]:
        """The most alike younger frame (or row) of each: squared distance and index.

        Counts every held key once for every row of another frame that it is compared with.
        """
        points = features(metric, self.view, self.ahead, self.asked, self.layout)
        places = (2 * radius + 1) ** 2
        self.view.scored += int(self.layout.there.sum()) * len(self.layout.frame_ids) * places
        if frames:
            return frame_distances(points, self.layout)
        grid = self.view.geometry.grid
        distance, match = nearest_newer(points, self.layout, grid, radius)
        return distance.flatten(1), match.flatten(1)


def _reduced(mass: Tensor, largest: bool) -> Tensor:
    return mass.amax(1) if largest else mass.mean(1)
