"""Statistics that parts may ask for; only what is declared is collected."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lightning_kv.cache.view import CacheView


class Collector(Protocol):
    """Collects one statistic of one sample. Its tensors count as cache bytes."""

    columns: ClassVar[dict[str, str]]

    def observe(self, view: CacheView) -> None:
        """Look at a pass of one layer, before its attention."""
        ...

    def value(self, layer: int) -> object:
        """What parts get as ``view.collected[name]``."""
        ...

    def initial(self, layer: int) -> dict[str, Tensor]:
        """Column values ``[H, P]`` of the rows that are about to be committed."""
        ...


class QueryMoments:
    """Running mean and variance of the queries before rotation, over clean passes.

    ``value`` is ``(mean [H, D], variance [H, D], count)``, or None before the first clean pass.
    """

    columns: ClassVar[dict[str, str]] = {}

    def __init__(self) -> None:
        self.moments: dict[int, tuple[Tensor, Tensor, int]] = {}

    def observe(self, view: CacheView) -> None:
        """See :class:`Collector`."""
        if view.step.phase == "denoise" or view.step.rebuild:
            return
        query = view.raw_query.double()
        count, mean = query.shape[1], query.mean(1)
        spread = query.var(1, unbiased=False)
        if view.layer in self.moments:
            old_mean, old_spread, old = self.moments[view.layer]
            total, delta = old + count, mean - old_mean
            share = count / total
            spread = old_spread * (1 - share) + spread * share + delta**2 * share * (1 - share)
            mean, count = old_mean + delta * share, total
        self.moments[view.layer] = mean, spread, count

    def value(self, layer: int) -> tuple[Tensor, Tensor, int] | None:
        """See :class:`Collector`."""
        return self.moments.get(layer)

    def initial(self, layer: int) -> dict[str, Tensor]:
        """See :class:`Collector`."""
        return {}


class AttentionMass:
    """Softmax mass that clean passes put on each row, summed in the column ``mass``.

    Evenly spaced query rows stand for all of them; the mass is scaled to the full number.

    Args:
        sampled: Largest number of query rows per pass.
    """

    columns: ClassVar[dict[str, str]] = {"mass": "sum"}

    def __init__(self, sampled: int = 520) -> None:
        self.sampled = sampled
        self.pending: dict[int, Tensor] = {}

    def observe(self, view: CacheView) -> None:
        """See :class:`Collector`."""
        if view.step.phase == "denoise":
            return
        tokens = view.query.shape[1]
        picked = torch.linspace(0, tokens - 1, min(tokens, self.sampled)).round().long()
        fresh = torch.zeros(view.heads, view.cell.provisional, device=view.query.device)
        for group, keys in zip(view.groups, view.read_keys, strict=True):
            query = view.query[list(group.heads)][:, picked]
            mass = view.softmax(group, query, keys).sum(1) * (tokens / len(picked))
            view.scored += len(group.heads) * len(picked) * len(group)
            group.meta["mass"] = group.meta["mass"] + mass[:, : len(group)]
            fresh[list(group.heads)] = mass[:, len(group) :]
        self.pending[view.layer] = fresh

    def value(self, layer: int) -> None:
        """The mass is in the column ``mass``."""

    def initial(self, layer: int) -> dict[str, Tensor]:
        """See :class:`Collector`."""
        return {"mass": self.pending.pop(layer)} if layer in self.pending else {}


COLLECTORS: dict[str, type[Collector]] = {
    "query_moments": QueryMoments,
    "attention_mass": AttentionMass,
}
