"""Statistics that parts may ask for; only what is declared is collected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_kv.cache.decisions import Event
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

    def event(self, event: Event) -> None:
        """Something happens between two chunks."""
        ...


@dataclass
class Moments:
    """What queries before rotation look like, in one layer.

    Args:
        mean: ``[H, G, D]``, one for each spatial cell of the frame.
        variance: ``[H, D / 2]``: mean squared distance of a complex pair from the mean of its cell.
        cell: int64 ``[tokens]``: the cell, 0 to G - 1, of every place of a frame.
        count: Clean passes that went in since the start or the last prompt switch.
    """

    mean: Tensor
    variance: Tensor
    cell: Tensor
    count: int


class QueryMoments:
    """Running mean and variance of the queries before rotation, over clean passes.

    A prompt switch forgets them.

    Args:
        cells: Rows and columns of spatial cells; each has its own mean. Never more than tokens.
        rate: Smallest weight of a new pass: 0 weighs all passes alike, 0.1 forgets old ones.
    """

    columns: ClassVar[dict[str, str]] = {}

    def __init__(self, cells: tuple[int, int] = (1, 1), rate: float = 0.0) -> None:
        self.cells, self.rate = cells, rate
        self.moments: dict[int, Moments] = {}

    def observe(self, view: CacheView) -> None:
        """See :class:`Collector`."""
        query = clean_queries(view)
        if query is None:
            return
        layout = cell_index(view.geometry.grid, self.cells, query.device)
        cell = layout.repeat(query.shape[1] // len(layout))
        share = one_hot(cell).to(query)  # [T, G]
        mean = torch.einsum("htd,tg->hgd", query, share / share.sum(0))
        spread = (query - mean[:, cell]).square().mean(1)
        old = self.moments.get(view.layer)
        if old is not None:
            weight = max(1 / (old.count + 1), self.rate)
            delta = mean - old.mean
            moved = torch.einsum("hgd,g->hd", delta.square(), share.mean(0))
            mean = old.mean + weight * delta
            spread = weight * spread + weight * (1 - weight) * moved
        variance = spread.unflatten(-1, (-1, 2)).sum(-1)
        if old is not None:
            variance = variance + (1 - weight) * old.variance
        count = 1 if old is None else old.count + 1
        self.moments[view.layer] = Moments(mean, variance, layout, count)

    def value(self, layer: int) -> Moments | None:
        """See :class:`Collector`."""
        return self.moments.get(layer)

    def initial(self, layer: int) -> dict[str, Tensor]:
        """See :class:`Collector`."""
        return {}

    def event(self, event: Event) -> None:
        """See :class:`Collector`."""
        if event.kind == "prompt_switch":
            self.moments.clear()


@dataclass
class Bank:
    """Queries before rotation that were asked lately, in one layer.

    Args:
        query: ``[H, R, D]``, oldest first.
        place: int64 ``[R]``, their positions in the frame.
    """

    query: Tensor
    place: Tensor


class QueryBank:
    """The queries before rotation of the newest clean frames. A prompt switch empties it.

    Args:
        frames: How many frames are remembered.
        rows: Queries of each of them, evenly spaced, another set for each frame; all where the
            frame has no more.
    """

    columns: ClassVar[dict[str, str]] = {}

    def __init__(self, frames: int = 24, rows: int = 16) -> None:
        self.frames, self.rows = frames, rows
        self.banks: dict[int, Bank] = {}

    def observe(self, view: CacheView) -> None:
        """See :class:`Collector`."""
        query = clean_queries(view)
        if query is None:
            return
        tokens = view.geometry.tokens
        rows = min(self.rows, tokens)
        first = torch.arange(rows, device=query.device) * tokens // rows
        ids = torch.tensor(view.step.final, device=query.device).unsqueeze(1)
        place = (first + ids) % tokens  # [frames, rows]
        index = torch.arange(len(place), device=query.device).unsqueeze(1) * tokens + place
        query, place = query[:, index.flatten()], place.flatten()
        if view.layer in self.banks:
            old = self.banks[view.layer]
            query, place = torch.cat([old.query, query], 1), torch.cat([old.place, place])
        kept = self.frames * rows
        self.banks[view.layer] = Bank(query[:, -kept:].clone(), place[-kept:].clone())

    def value(self, layer: int) -> Bank | None:
        """See :class:`Collector`."""
        return self.banks.get(layer)

    def initial(self, layer: int) -> dict[str, Tensor]:
        """See :class:`Collector`."""
        return {}

    def event(self, event: Event) -> None:
        """See :class:`Collector`."""
        if event.kind == "prompt_switch":
            self.banks.clear()


def clean_queries(view: CacheView) -> Tensor | None:
    """Queries before rotation of the frames that become final now, ``[H, T, D]``, float32 up."""
    step = view.step
    if step.phase == "denoise" or step.rebuild or not step.final:
        return None
    tokens, low = view.geometry.tokens, step.frames.index(step.final[0])
    query = view.raw_query[:, low * tokens : (low + len(step.final)) * tokens]
    return query.to(torch.promote_types(query.dtype, torch.float32))


def cell_index(
    grid: tuple[int, int], cells: tuple[int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """The spatial cell of every place of a frame, int64 ``[tokens]``, cells in raster order."""
    index = torch.zeros(1, dtype=torch.int64, device=device)
    for size, count in zip(grid, cells, strict=True):
        count = min(size, count)
        own = torch.arange(size, device=device) * count // size
        index = (index.unsqueeze(1) * count + own).flatten()
    return index


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
        work = torch.promote_types(view.query.dtype, torch.float32)
        fresh = view.query.new_zeros(view.heads, view.cell.provisional, dtype=work)
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

    def event(self, event: Event) -> None:
        """Mass that was paid stays paid."""


COLLECTORS: dict[str, type[Collector]] = {
    "query_bank": QueryBank,
    "query_moments": QueryMoments,
    "attention_mass": AttentionMass,
}
