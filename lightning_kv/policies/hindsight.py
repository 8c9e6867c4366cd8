"""What queries to come will look at, from tables of the reference rollout.

Shapes: C chunks, H heads, U candidate frames, E queries, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kv.cache.host import upload
from lightning_kv.cache.mass import FrameMass
from lightning_kv.cache.outputs import FrameOutputs, Outputs
from lightning_kv.cache.view import CacheView

OBJECTIVES = ("mass", "output")
TABLES = {"mass": "mass", "output": "outputs"}
NOTHING = 1e30  # error of an output of nothing, where every share has underflowed


@dataclass(frozen=True, eq=False)
class Place:
    """Where a decision is made and between which frames: a view without its rows.

    Args:
        namespace: Of the cache.
        layer: Of the model.
        frames: Ids of the candidates.
        present: Which of them each head has, bool ``[1 or H, U]``.
        made: The first frame that is not made yet, or in flight.
    """

    namespace: str
    layer: int
    frames: tuple[int, ...]
    present: Tensor
    made: int

    @classmethod
    def of(cls, view: CacheView) -> Place:
        """The place of a view."""
        step = view.step
        made = step.final[-1] + 1 if step.final and view.query is None else step.start
        return cls(step.namespace, view.layer, view.frames, view.present, made)


@dataclass(frozen=True, eq=False)
class ComingOutputs:
    """What queries to come get from the frames of a place, and from what they read in any case.

    In words of :class:`~lightning_kv.cache.outputs.Outputs`. What is neither, as it was dropped
    before, is left out.

    Args:
        share: Of each frame, ``[H, E, U]``.
        pull: Of each frame, ``[H, E, U, D]``.
        base_share: Of all that is made later or in flight, ``[H, E]``.
        base_pull: Of the same, ``[H, E, D]``.
        weight: Of each query, ``[E]``: 1 for all of the nearest chunk together, and discounted.
    """

    share: Tensor
    pull: Tensor
    base_share: Tensor
    base_pull: Tensor
    weight: Tensor

    @classmethod
    def of(
        cls, table: FrameOutputs, place: Place, chunks: Sequence[int], discount: float
    ) -> ComingOutputs:
        """Of all queries of some chunks.

        Args:
            table: What each frame gave to some queries.
            place: The frames.
            chunks: The nearest first.
            discount: What the next chunk counts of the one before.

        Raises:
            ValueError: The table does not know a frame.
        """
        seen = [table.outputs[place.namespace, chunk, place.layer] for chunk in chunks]
        parts = [_split(place, own) for own in seen]
        weight = [discount**i * x.weight / x.weight.sum() for i, x in enumerate(seen)]
        return cls(*(torch.cat(x, 1) for x in zip(*parts, strict=True)), torch.cat(weight))

    def of_queries(self, index: Tensor) -> ComingOutputs:
        """The same of some of the queries, int64 ``[R]``."""
        weight = self.weight.index_select(0, index)
        every = (self.share, self.pull, self.base_share, self.base_pull)
        return ComingOutputs(*(own.index_select(1, index) for own in every), weight)

    def over(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Shares ``[H, E]`` and pulls ``[H, E, D]`` of kept frames, bool ``[H, U]``, and base."""
        total = self.base_share + (self.share * kept.unsqueeze(1)).sum(-1)
        rest = self.base_pull + torch.einsum("heud,hu->hed", self.pull, kept.to(self.pull))
        return total, rest

    def loss(self, size: Tensor, total: Tensor) -> Tensor:
        """Weighted squared error of outputs ``[H, .]``, for squares of pulls and shares of sets.

        Args:
            size: ``[H, E, .]``; overwritten.
            total: ``[H, E, .]``.
        """
        error = size.div_(total.square())
        error = error.nan_to_num(NOTHING, NOTHING).clamp_max(NOTHING)
        return torch.einsum("e,heu->hu", self.weight, error)


def mass_by_chunk(table: FrameMass, place: Place, chunks: Sequence[int]) -> Tensor:
    """Softmax mass of some chunks on the frames of a place, ``[C, H, U]``."""
    mass = table.mass[place.namespace][:, place.layer]  # [chunks of the clip, H, frames of it]
    mass = mass.index_select(0, upload(chunks, mass, torch.int64))
    return mass.index_select(2, upload(place.frames, mass, torch.int64))


def coming_mass(
    table: FrameMass, place: Place, chunks: Sequence[int], discount: float = 1.0
) -> Tensor:
    """Softmax mass of some chunks on the frames of a place, added up, ``[H, 1, U]``.

    Args:
        table: What the reference attended to.
        place: The frames.
        chunks: The nearest first.
        discount: What the next chunk counts of the one before.
    """
    mass = mass_by_chunk(table, place, chunks)
    found = mass.new_zeros(mass.shape[1:])
    for ahead, own in enumerate(mass):
        found += discount**ahead * own
    return found.unsqueeze(1).to(place.present.device)


def greedy_order(
    table: FrameOutputs,
    place: Place,
    chunks: Sequence[int],
    discount: float,
    guard: Tensor,
    steps: int,
) -> Tensor:
    """In which order frames should be taken so that outputs to come change least, ``[H, 1, U]``.

    Forward greedy: each time the frame is added that, together with those already there, brings
    the heads' outputs nearest to those of the reference (squared distance, mean over the queries of
    each chunk, discounted). So of two frames that say the same only one is wanted, which a score
    for each frame alone cannot say.

    Args:
        table: What each frame gave to some queries.
        place: The frames.
        chunks: The nearest first. What they hold that was not there to be kept, as it was made
            later or is in flight, is taken as read.
        discount: What the next chunk counts of the one before.
        guard: bool ``[1 or H, U]``: frames that are kept in any case.
        steps: How many others to put in order.

    Returns:
        0 for the first, -1 for the second; far below for frames that are not among them, the newer
        the higher.
    """
    coming = ComingOutputs.of(table, place, chunks, discount)
    order = _unranked(coming.share)
    for step, (best, found, _) in enumerate(_greedy(coming, place, guard, steps)):
        order = torch.where(found, order.scatter(1, best, -float(step)), order)
    return order.unsqueeze(1).to(place.present.device)


def greedy_gains(
    table: FrameOutputs,
    place: Place,
    chunks: Sequence[int],
    discount: float,
    guard: Tensor,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """The order of :func:`greedy_order`, and by how much each step of it lessens the error.

    Args:
        table: As there, and so are all the others.
        place: The frames.
        chunks: The nearest first.
        discount: What the next chunk counts of the one before.
        guard: bool ``[1 or H, U]``: frames that are kept in any case.
        steps: How many others to put in order.

    Returns:
        The order, and as a share of the error of what is read in any case, guarded frames included,
        the gain of each step at the place of its frame, both ``[H, 1, U]``. Below 0 where a frame
        does more harm than good beside those before it; 0 for frames that are not in the order.
    """
    coming = ComingOutputs.of(table, place, chunks, discount)
    order = _unranked(coming.share)
    gain = torch.zeros_like(order)
    total, rest = coming.over(_guarded(coming, place, guard))
    first = last = coming.loss(rest.square().sum(-1, keepdim=True), total.unsqueeze(-1))  # [H, 1]
    for step, (best, found, loss) in enumerate(_greedy(coming, place, guard, steps)):
        order = torch.where(found, order.scatter(1, best, -float(step)), order)
        now = torch.where(found, loss.gather(1, best), last)
        gain = gain.scatter_add(1, best, torch.where(first > 0, (last - now) / first, 0.0))
        last = now
    device = place.present.device
    return order.unsqueeze(1).to(device), gain.unsqueeze(1).to(device)


def _greedy(
    coming: ComingOutputs, place: Place, guard: Tensor, steps: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each step the frame taken ``[H, 1]``, whether one was, and all losses ``[H, U]``."""
    share, pull = coming.share, coming.pull
    present = place.present.expand(len(share), -1).to(share.device)
    taken = _guarded(coming, place, guard)
    total, rest = coming.over(taken)
    size = pull.square().sum(-1)  # [H, E, U]
    for _ in range(min(steps, share.shape[2])):
        error = rest.square().sum(-1, keepdim=True) + size
        error += 2 * torch.einsum("hed,heud->heu", rest, pull)
        loss = coming.loss(error, total.unsqueeze(-1) + share)
        best = loss.masked_fill(taken | ~present, torch.inf).argmin(-1, keepdim=True)
        found = ~taken.gather(1, best) & present.gather(1, best)  # a head may have none left
        yield best, found, loss
        taken = taken.scatter(1, best, taken.gather(1, best) | found)
        pick = best.view(-1, 1, 1).expand(-1, share.shape[1], 1)
        total = total + share.gather(2, pick)[..., 0] * found
        own = pull.gather(2, pick.unsqueeze(-1).expand(-1, -1, 1, pull.shape[3]))[:, :, 0]
        rest = rest + own * found.unsqueeze(-1)


def _guarded(coming: ComingOutputs, place: Place, guard: Tensor) -> Tensor:
    """Frames that are kept in any case, bool ``[H, U]``."""
    of, heads = coming.share.device, len(coming.share)
    return guard.expand(heads, -1).to(of) & place.present.expand(heads, -1).to(of)


def _unranked(share: Tensor) -> Tensor:
    """Below every rank, the newer the higher, ``[H, U]`` for shares ``[H, E, U]``."""
    heads, _, count = share.shape
    return (torch.arange(count).double() - 10 * count).expand(heads, -1).to(share)


def _split(place: Place, own: Outputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shares and pulls of the place's frames, ``[H, E, U]`` and with D; and sums of the newer."""
    where = {frame: index for index, frame in enumerate(own.frames)}
    if absent := [frame for frame in place.frames if frame not in where]:
        raise ValueError(
            f"The reference table 'outputs' knows nothing of the frames {absent}, which this "
            "policy holds: the reference itself had dropped them. Record it under `full`."
        )
    mine = upload([where[frame] for frame in place.frames], own.share, torch.int64)
    newer = upload([where[f] for f in own.frames if f >= place.made], own.share, torch.int64)
    return (
        own.share.index_select(2, mine),
        own.pull.index_select(2, mine),
        own.share.index_select(2, newer).sum(2),
        own.pull.index_select(2, newer).sum(2),
    )
