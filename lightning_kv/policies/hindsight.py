"""What queries to come will look at, from tables of the reference rollout.

Shapes: L layers, H heads, U candidate frames, E queries, F frames, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_kv.cache.host import upload
from lightning_kv.cache.mass import FrameMass
from lightning_kv.cache.outputs import FrameOutputs, Outputs
from lightning_kv.cache.view import CacheView

OBJECTIVES = ("mass", "output")
TABLES = {"mass": "mass", "output": "outputs"}
NOTHING = 1e30  # error of an output of nothing, where every share has underflowed


def coming_mass(view: CacheView, chunks: Sequence[int], discount: float) -> Tensor:
    """Softmax mass of some chunks on the frames of a view, ``[H, 1, U]``.

    Args:
        view: Of one layer; its ``mass`` table says what the reference attended to.
        chunks: The nearest first.
        discount: What the next chunk counts of the one before.
    """
    table: FrameMass = view.tables["mass"]
    mass = table.mass[view.step.namespace][:, view.layer]  # [C, H, F]
    mass = mass.index_select(2, view.frame_ids.to(mass.device))
    found = mass.new_zeros(mass.shape[1:])
    for place, chunk in enumerate(chunks):
        found += discount**place * mass[chunk]
    return found.unsqueeze(1).to(view.device)


def greedy_order(
    view: CacheView, chunks: Sequence[int], discount: float, guard: Tensor, steps: int
) -> Tensor:
    """In which order frames should be taken so that outputs to come change least, ``[H, 1, U]``.

    Forward greedy: each time the frame is added that, together with those already there, brings
    the heads' outputs nearest to those of the reference (squared distance, mean over the queries of
    each chunk, discounted). So of two frames that say the same only one is wanted, which a score
    for each frame alone cannot say.

    Args:
        view: Of one layer; its ``outputs`` table holds what each frame gave to some queries.
        chunks: The nearest first. What they hold that was not there to be kept, as it was made
            later or is in flight, is taken as read.
        discount: What the next chunk counts of the one before.
        guard: bool ``[1 or H, U]``: frames that are kept in any case.
        steps: How many others to put in order.

    Returns:
        0 for the first, -1 for the second; far below for frames that are not among them, the newer
        the higher.
    """
    table: FrameOutputs = view.tables["outputs"]
    place = (view.step.namespace, view.layer)
    seen = [table.outputs[place[0], chunk, place[1]] for chunk in chunks]
    parts = [_split(view, own) for own in seen]
    weight = torch.cat([discount**i * x.weight / x.weight.sum() for i, x in enumerate(seen)])  # [E]
    share, pull, base_share, base_pull = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    present = view.present.expand(view.heads, -1).to(share.device)
    taken = guard.expand(view.heads, -1).to(share.device) & present
    total = base_share + (share * taken.unsqueeze(1)).sum(-1)  # [H, E]
    rest = base_pull + torch.einsum("heud,hu->hed", pull, taken.to(pull))  # [H, E, D]
    size = pull.square().sum(-1)  # [H, E, U]
    order = _unranked(view).to(share)
    for step in range(min(steps, len(view.frames))):
        error = rest.square().sum(-1, keepdim=True) + size
        error += 2 * torch.einsum("hed,heud->heu", rest, pull)
        error /= (total.unsqueeze(-1) + share).square()
        error = error.nan_to_num(NOTHING, NOTHING).clamp_max(NOTHING)
        loss = torch.einsum("e,heu->hu", weight, error)
        best = loss.masked_fill(taken | ~present, torch.inf).argmin(-1, keepdim=True)  # [H, 1]
        open_ = ~taken.gather(1, best) & present.gather(1, best)  # a head may have none left
        order = torch.where(open_, order.scatter(1, best, -float(step)), order)
        taken = taken.scatter(1, best, taken.gather(1, best) | open_)
        pick = best.view(-1, 1, 1).expand(-1, share.shape[1], 1)
        total = total + share.gather(2, pick)[..., 0] * open_
        own = pull.gather(2, pick.unsqueeze(-1).expand(-1, -1, 1, pull.shape[3]))[:, :, 0]
        rest = rest + own * open_.unsqueeze(-1)
    return order.unsqueeze(1).to(view.device)


def _unranked(view: CacheView) -> Tensor:
    """Below every rank, the newer the higher, ``[H, U]``."""
    count = len(view.frames)
    return (torch.arange(count).double() - 10 * count).expand(view.heads, -1)


def _split(view: CacheView, own: Outputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shares and pulls of the view's frames, ``[H, E, U]`` and with D; and sums of the newer."""
    step = view.step
    made = step.final[-1] + 1 if step.final and view.query is None else step.start
    where = {frame: place for place, frame in enumerate(own.frames)}
    if absent := [frame for frame in view.frames if frame not in where]:
        raise ValueError(
            f"The reference table 'outputs' knows nothing of the frames {absent}, which this "
            "policy holds: the reference itself had dropped them. Record it under `full`."
        )
    mine = upload([where[frame] for frame in view.frames], own.share, torch.int64)
    newer = upload([where[f] for f in own.frames if f >= made], own.share, torch.int64)
    return (
        own.share.index_select(2, mine),
        own.pull.index_select(2, mine),
        own.share.index_select(2, newer).sum(2),
        own.pull.index_select(2, newer).sum(2),
    )
